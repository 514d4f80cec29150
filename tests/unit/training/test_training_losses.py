import numpy as np
import pytest
import torch

from trimkv_export.training import losses
from trimkv_export.training.losses import capacity_loss, prediction_losses


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_capacity_loss(kind: str) -> None:
    """Against the formula, position by position; layers have their own tensors."""
    length, budget = 200, 20
    log_beta = -(np.random.default_rng(0).random((3, 2, 2, length)) ** 8)  # [L, B, H, T]
    queries = np.array([0, 3, 19, 20, 21, 60, 111, 199])
    excess = []
    for t in queries:
        mass = np.exp(log_beta[..., : t + 1] * (t - np.arange(t + 1))).sum(-1)  # [L, B, H]
        share = mass.mean((0, 2)) if kind == "rg10" else mass
        excess += list(np.maximum(0, (share - budget) / max(1, t - budget)).reshape(-1))
    above = [value for value in excess if value > 0]
    assert above
    layers = [torch.from_numpy(layer).requires_grad_() for layer in log_beta]
    found = capacity_loss(layers, kind, budget, torch.from_numpy(queries))
    assert found.item() == pytest.approx(np.mean(above), rel=1e-5)
    found.backward()
    gradients = torch.stack([layer.grad for layer in layers])
    assert (gradients >= 0).all()  # to retain less, log β falls
    assert gradients.abs().sum() > 0


def test_nothing_is_lost_within_the_budget() -> None:
    layers = [torch.zeros(1, 2, 50, requires_grad=True)]
    loss = capacity_loss(layers, "rg10", 50, torch.arange(50))
    loss.backward()
    assert loss.item() == 0
    assert layers[0].grad is not None
    assert not layers[0].grad.any()


@pytest.mark.parametrize("count", [1, 5, 13])
def test_prediction_losses_do_not_depend_on_chunks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30).requires_grad_(False)
    ours, full, targets = torch.randn(count, 8, requires_grad=True), torch.randn(count, 8), torch.randint(30, (count,))
    wanted, logits = head(full).softmax(-1), head(ours)
    expected_kl = (wanted * (wanted.log() - logits.log_softmax(-1))).sum(-1).mean()
    expected_loss = torch.nn.functional.cross_entropy(logits, targets)
    (expected_kl + expected_loss).backward()
    gradient = ours.grad
    monkeypatch.setattr(losses, "CHUNK", 4)
    ours.grad = None
    kl, loss = prediction_losses(head, ours, full, targets)
    torch.testing.assert_close((kl, loss), (expected_kl, expected_loss))
    (kl + loss).backward()
    torch.testing.assert_close(ours.grad, gradient)


def test_logits_of_few_positions_exist_at_a_time() -> None:
    """Also in the backward pass."""
    torch.manual_seed(0)
    largest = 0
    head = torch.nn.Linear(8, 1000).requires_grad_(False)

    def measure(_module: torch.nn.Module, arguments: tuple[torch.Tensor], _out: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, arguments[0].numel() // 8)

    head.register_forward_hook(measure)
    ours = torch.randn(3 * losses.CHUNK + 1, 8, requires_grad=True)
    kept: list[int] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        kl, loss = prediction_losses(head, ours, ours.detach(), torch.zeros(len(ours), dtype=torch.long))
    (kl + loss).backward()
    assert largest == losses.CHUNK
    assert max(kept, default=0) <= losses.CHUNK * 8
