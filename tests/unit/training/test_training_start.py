from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.models import decoder_spec
from trimkv_export.training import start
from trimkv_export.training.gates import make_gates
from trimkv_export.training.model import GatedModel
from trimkv_export.training.options import TrainingOptions
from trimkv_export.training.rows import Row

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "attn_implementation": "sdpa",
}  # fmt: skip


class Drawn:
    """Rows of random tokens."""

    fingerprint = "drawn"

    def row(self, index: int) -> Row:
        return Row(np.random.default_rng(index).integers(0, 101, 96), np.zeros(96, bool))


def test_what_a_token_is_used_for() -> None:
    """Σ τ·a(τ) and the attention itself, against the whole matrix; queries come in several parts."""
    torch.manual_seed(0)
    length = start.QUERIES * 2 + 37
    query, key, value = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    module = torch.nn.Module()
    module.__dict__["measured"] = x = torch.randn(length, 5)
    found, _ = start.measured_attention(module, query, key, value, None, scaling=0.5)
    age = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.5
    shares = logits.masked_fill(age < 0, float("-inf")).softmax(-1)
    torch.testing.assert_close(found, (shares @ value.repeat_interleave(2, 1)).transpose(1, 2), atol=1e-5, rtol=1e-5)
    inputs, used = module.__dict__["measured"]
    expected = (shares * age.clamp(min=0)).sum(2)[0].view(2, 2, length).sum(1).T
    torch.testing.assert_close(used, expected, atol=1e-3, rtol=1e-4)
    assert inputs is x


@pytest.mark.parametrize("decay", [1e-6, 1e-3, 0.1, 3.0])
def test_the_sum_of_powers(decay: float) -> None:
    rest = torch.tensor([[1.0], [10.0], [2000.0]])
    found = start._sum(torch.full((3, 2), decay), rest)
    expected = [np.exp(-decay * np.arange(1, int(count) + 1)).sum() for count in rest[:, 0]]
    torch.testing.assert_close(found[:, 0].double(), torch.tensor(expected), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["rg10", "rg"])
def test_the_first_price_retains_the_budget(kind: str) -> None:
    torch.manual_seed(0)
    used = torch.randn(3, 200, 2).exp() * torch.tensor([1.0, 10.0])
    options = TrainingOptions(kind=kind, budget=20, steps=1, context=200)
    price = start._first_price(used, options)
    assert price.shape == ((1, 1) if kind == "rg10" else (3, 2))
    decay = (price[:, None] / used).sqrt()
    mass = torch.stack([start._mass(layer) for layer in decay])
    share = mass.mean() if kind == "rg10" else mass
    torch.testing.assert_close(share, torch.full_like(share, 20.0), rtol=1e-3, atol=1e-2)
    if kind == "rg10":
        assert (mass[:, 1] > mass[:, 0]).all()  # heads that use tokens longer get more of the one budget


def test_the_closed_form_is_where_the_loss_is_least() -> None:
    """Far from the end of a row."""
    use, price = torch.tensor(40.0), torch.tensor(0.01)
    decay = torch.logspace(-4, 0, 2000)
    loss = decay * use / price + start._sum(decay[:, None], torch.tensor([[1e7]]))[:, 0]
    assert decay[loss.argmin()].item() == pytest.approx((price / use).sqrt().item(), rel=0.02)


def test_bfloat16_makes_little_difference(tmp_path: Path) -> None:
    """Gates read their own weights as they are after each update, and not copies of the first."""
    found = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        backbone = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
        if bf16:
            for module in backbone.modules():
                if isinstance(module, torch.nn.Linear):
                    module.to(torch.bfloat16)
        backbone.save_pretrained(tmp_path / "base")
        spec = decoder_spec(read_config(tmp_path / "base"), tmp_path)
        gates = make_gates(spec, "rg10", 16)
        options = TrainingOptions(kind="rg10", budget=12, steps=1, context=96, width=16, start_rows=12)
        start.start_gates(GatedModel(backbone, gates), Drawn(), options, bf16=bf16)
        x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found.append(torch.stack([gate(x) for gate in gates]))
    assert (found[0] - found[1]).abs().mean() < 0.02 * found[0].abs().mean()
