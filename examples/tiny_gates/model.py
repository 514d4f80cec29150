"""A small Qwen3 of transformers, with retention gates next to its attention layers.

While gates are trained, attention is weighted by retention: a key at position i counts β_i^(t − i) times for the query
at t, so its logit gets (t − i)·log β_i (TrimKV, arXiv 2512.03324). Elsewhere the model is the plain Qwen3.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

__all__ = ["GatedModel", "gate_state", "make_config", "open_gates", "run_gate", "seed_induction"]

FAST_PAIRS = 4  # of the dimensions that RoPE turns, those that tell one position from the next
SHARPER = 2.0  # weights of the norms of queries and keys: logits are 4 times as far apart
PREFIX = "model.layers.{}.self_attn.retention_gate."
BIAS_INIT = 10.0  # as in the official code: gates start with β near 1, so nothing is forgotten


def make_config(vocab_size: int, end_of_text: int) -> Qwen3Config:
    """The backbone's configuration: 4 layers of width 256, 2 KV heads of 64, 3.7M parameters."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
        attn_implementation="sdpa",
    )


def seed_induction(model: Qwen3ForCausalLM) -> None:
    """Let two heads start as an induction circuit: find what followed the last time (Olsson et al., arXiv 2209.11895).

    Recall needs it, and from random weights it comes late: not in 15 minutes on two cores. All weights are trained on
    from here.

    Head 0 of layer 0 attends to the token before and passes on a projection of what it is; head 0 of layer 1 attends to
    where that equals the token at hand, and copies what stands there. For the former, all embeddings share a direction,
    which makes queries and keys that are the same everywhere, and RoPE turns them against each other by one position.
    The latter matches in the dimensions that RoPE turns slowly. Other output projections start at 0, not to drown them.
    """
    config = model.config
    hidden, dim = config.hidden_size, config.head_dim
    half = dim // 2
    basis = nn.init.orthogonal_(torch.empty(hidden, hidden))
    shared, projection, stored, copied = basis[0], basis[1 : 1 + half], basis[half + 1 : 2 * half + 1], basis[-dim:]
    scale = config.initializer_range * hidden**0.5  # norm of an embedding
    written = 3 * config.initializer_range
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    slow = torch.arange(dim) % half >= half // 2
    fast = torch.arange(dim) % half < FAST_PAIRS
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight += scale * shared
        rate = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
        query, key = torch.zeros(dim), torch.zeros(dim)
        query[fast & (torch.arange(dim) < half)] = 1.0
        key[:half], key[half:] = query[:half] * rate.cos(), query[:half] * rate.sin()
        first.q_proj.weight[:dim] = query[:, None] * shared
        first.k_proj.weight[:dim] = key[:, None] * shared
        for norm in (first.q_norm, first.k_norm, second.q_norm, second.k_norm):
            norm.weight *= SHARPER
        first.v_proj.weight[:half] = projection
        first.o_proj.weight[:, :half] = written * stored.T
        second.q_proj.weight[:dim] = 0
        second.k_proj.weight[:dim] = 0
        second.q_proj.weight[:dim][slow] = projection
        second.k_proj.weight[:dim][slow] = stored
        second.v_proj.weight[:dim] = copied
        second.o_proj.weight[:, :dim] = written * copied.T


class Gate(nn.Module):  # type: ignore[misc]  # torch is not typed for mypy here
    """A layer's retention gate: x [B, S, d] -> log β [B, S, H] float32, at most 0 (docs/design.md, section 3)."""

    def __init__(self, hidden: int, width: int, heads: int, last: nn.Linear | None) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden, width)
        if last is None:  # rg
            self.linear2 = nn.Linear(width, heads, bias=False)
        else:  # rg10: `linear3` is one module, shared by all layers
            self.linear2 = nn.Linear(width, width)
            self.linear3 = last
        self.bias = nn.Parameter(torch.full((heads,), BIAS_INIT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        out = self.linear2(functional.silu(self.linear1(x)))
        if hasattr(self, "linear3"):
            out = self.linear3(functional.silu(out))
        return functional.logsigmoid(out.float() + self.bias)


class GatedModel(nn.Module):  # type: ignore[misc]
    """The backbone, frozen, and one gate per layer."""

    def __init__(self, backbone: Qwen3ForCausalLM, kind: str, width: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.gates = make_gates(backbone.config, kind, width)
        for layer, gate in zip(backbone.model.layers, self.gates, strict=True):
            layer.self_attn.__dict__["gate"] = gate  # no child module: the backbone's state stays its own

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, T] -> last hidden states [B, T, d] under retention-weighted attention, log β [B, L·H, T]."""
        with _attention(self.backbone, "retention"):
            hidden = self.backbone.model(tokens).last_hidden_state
        log_beta = [layer.self_attn.__dict__["log_beta"] for layer in self.backbone.model.layers]
        return hidden, torch.cat(log_beta, dim=1)


def make_gates(config: Qwen3Config, kind: str, width: int) -> nn.ModuleList:
    """One new gate per layer; kind is rg or rg10."""
    heads = config.num_key_value_heads
    last = nn.Linear(width, heads, bias=False) if kind == "rg10" else None
    return nn.ModuleList(Gate(config.hidden_size, width, heads, last) for _ in range(config.num_hidden_layers))


def open_gates(config: Qwen3Config, folder: Path) -> nn.ModuleList:
    """The gates of a checkpoint in the official layout, in float32."""
    fields = json.loads((folder / "config.json").read_text())
    gates = make_gates(config, fields["retention_gate"], fields["retention_gate_intermediate_size"])
    stored = torch.load(folder / "trimkv_weights.pth", weights_only=True)
    for index, gate in enumerate(gates):
        prefix = PREFIX.format(index)
        gate.load_state_dict({name: stored[prefix + name].float() for name in gate.state_dict()})
    return gates.requires_grad_(False)


def gate_state(gates: nn.ModuleList) -> dict[str, torch.Tensor]:
    """Gate weights under the official names."""
    return {
        PREFIX.format(index) + name: value.detach().clone()
        for index, gate in enumerate(gates)
        for name, value in gate.state_dict().items()
    }


@contextmanager
def _attention(model: Qwen3ForCausalLM, name: str) -> Iterator[None]:
    """Within it the model attends by the function `name`, and each layer leaves its gate's log β [B, H, T]."""
    hooks = [layer.self_attn.register_forward_pre_hook(run_gate, with_kwargs=True) for layer in model.model.layers]
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for hook in hooks:
            hook.remove()


def run_gate(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
    """A hook before an attention layer with a `gate`: leaves its `log_beta` [B, H, T] for the attention function."""
    x = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
    module.__dict__["log_beta"] = module.__dict__["gate"](x).transpose(1, 2)


def _retention_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention with logits q·k·scale + (t − i)·log β_i, for query [B, H·G, T, D], key and value [B, H, T, D].

    (t − i)·log β_i is the product of (t, 1) and (log β_i, −i·log β_i): two more columns of query and key, so that
    torch's fused attention does the rest and no [T, T] matrix exists.
    """
    log_beta = module.__dict__["log_beta"].float()
    batch, heads, length, _dim = query.shape
    group = heads // key.shape[1]
    position = torch.arange(length, device=query.device, dtype=torch.float32)
    columns = torch.stack([position, torch.ones_like(position)], dim=-1).expand(batch, heads, -1, -1) / scaling
    query = torch.cat([query.float(), columns], dim=-1)
    key = torch.cat([key.float(), torch.stack([log_beta, -position * log_beta], dim=-1)], dim=-1)
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value.float()))
    value = functional.pad(value, (0, 2))
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out[..., :-2].transpose(1, 2).contiguous(), None


AttentionInterface.register("retention", _retention_attention)
