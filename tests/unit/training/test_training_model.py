import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from trimkv_export.training.model import ATTENTION, GatedModel, weighted_attention


def weights_of(query: torch.Tensor, key: torch.Tensor, log_beta: torch.Tensor, scaling: float) -> torch.Tensor:
    """The matrix of attention, where a key counts β_i^(t − i) times."""
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    age = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    kept = (age.clamp(min=0) * log_beta[:, :, None]).repeat_interleave(group, 1)
    return (logits + kept).masked_fill(age < 0, float("-inf")).softmax(-1)


@pytest.mark.parametrize("dim", [6, 8, 10])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_is_weighted_by_retention(dim: int, autocast: bool) -> None:
    """The fused form against the matrix, at 700 tokens: bfloat16, which autocast would take, has no such positions."""
    torch.manual_seed(0)
    length = 700
    query, key, value = torch.randn(1, 4, length, dim), torch.randn(1, 2, length, dim), torch.randn(1, 2, length, dim)
    module = torch.nn.Module()
    log_beta = (-(torch.rand(1, 2, length) ** 8)).requires_grad_()
    module.__dict__["log_beta"] = log_beta
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = AttentionInterface()[ATTENTION](module, query, key, value, None, scaling=0.3)
    expected = weights_of(query, key, log_beta, 0.3) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(found.square().sum(), log_beta)
    (wanted,) = torch.autograd.grad(expected.square().sum(), log_beta)
    torch.testing.assert_close(gradient, wanted, atol=1e-2, rtol=1e-3)


def test_no_matrix_of_tokens_by_tokens_is_kept() -> None:
    length = 512
    shape = (1, 2, length, 8)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    module = torch.nn.Module()
    module.__dict__["log_beta"] = -torch.rand(1, 2, length).requires_grad_()
    kept: list[int] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        weighted_attention(module, query, key, value, None)
    assert 0 < max(kept) <= 2 * length * 16


class Constant(torch.nn.Module):  # type: ignore[misc]
    """A gate that says the same of every token."""

    def __init__(self, log_beta: float) -> None:
        super().__init__()
        self.log_beta = torch.nn.Parameter(torch.tensor(log_beta))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.log_beta.expand(*x.shape[:2], 2)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_where_nothing_is_forgotten_the_model_is_the_plain_one() -> None:
    backbone = small_model()
    tokens = torch.arange(40)[None] % 50
    expected = backbone.model(tokens).last_hidden_state
    model = GatedModel(backbone, torch.nn.ModuleList(Constant(0.0) for _ in range(3)))
    hidden, log_beta = model.weighted(tokens)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    assert [tuple(each.shape) for each in log_beta] == [(1, 2, 40)] * 3
    torch.testing.assert_close(model.full(tokens), expected)
    forgetting = GatedModel(backbone, torch.nn.ModuleList(Constant(-5.0) for _ in range(3)))
    assert (forgetting.weighted(tokens)[0] - expected).abs().max() > 1e-3
    torch.testing.assert_close(forgetting.full(tokens), expected)  # the weights end with the call


def test_recomputing_changes_nothing() -> None:
    tokens = torch.arange(40)[None] % 50
    found = []
    for recompute in (False, True):
        gates = torch.nn.ModuleList(Constant(-0.1) for _ in range(3))
        model = GatedModel(small_model(), gates, recompute=recompute)
        hidden, log_beta = model.weighted(tokens)
        (hidden.square().sum() + sum(each.exp().sum() for each in log_beta)).backward()
        found.append((hidden.detach(), [gate.log_beta.grad for gate in gates]))
        assert "forward" not in model.decoder.layers[0].__dict__
    torch.testing.assert_close(found[0], found[1])
