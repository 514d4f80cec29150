"""Retention gates in PyTorch: the modules, and their names and files in the layout of the official checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from trimkv_export.checkpoint.gates import check_gates_fit, open_gates
from trimkv_export.models import DecoderSpec

__all__ = ["gate_state", "load_gates", "make_gates", "write_gates"]

WEIGHTS = "trimkv_weights.pth"


class Gate(nn.Module):  # type: ignore[misc]  # torch is not typed for mypy here
    """A layer's retention gate: x [B, S, d] -> log β [B, S, H] float32, at most 0 (docs/design.md, section 3)."""

    def __init__(self, spec: DecoderSpec, width: int, bias: float, last: nn.Linear | None) -> None:
        super().__init__()
        self.activation = ACT2FN[spec.hidden_act]
        self.linear1 = nn.Linear(spec.hidden_size, width)
        if last is None:  # rg
            self.linear2 = nn.Linear(width, spec.num_kv_heads, bias=False)
        else:  # rg10: `linear3` is one module, shared by all layers
            self.linear2 = nn.Linear(width, width)
            self.linear3 = last
        self.bias = nn.Parameter(torch.full((spec.num_kv_heads,), bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        out = self.linear2(self.activation(self.linear1(x)))
        if hasattr(self, "linear3"):
            out = self.linear3(self.activation(out))
        return functional.logsigmoid(out.float() + self.bias)


def make_gates(spec: DecoderSpec, kind: str, width: int, *, bias: float = 8.0, seed: int = 0) -> nn.ModuleList:
    """One new gate for each layer, in float32.

    Args:
        spec: the decoder.
        kind: "rg" or "rg10".
        width: i, of the hidden layers.
        bias: what outputs begin at.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        last = nn.Linear(width, spec.num_kv_heads, bias=False) if kind == "rg10" else None
        return nn.ModuleList(Gate(spec, width, bias, last) for _ in range(spec.num_layers))


def load_gates(spec: DecoderSpec, folder: Path) -> tuple[str, int, nn.ModuleList]:
    """The gates of a checkpoint, in float32 and frozen: kind, width and modules.

    Raises: as `checkpoint.gates.open_gates` and `check_gates_fit`.
    """
    found = open_gates(folder)
    check_gates_fit(found, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, hidden_size=spec.hidden_size)
    gates = make_gates(spec, found.kind, found.intermediate_size)
    for gate, parts in zip(gates, found.layers, strict=True):
        read = {name: parts[name].read().astype(np.float32) for name in gate.state_dict()}
        gate.load_state_dict({name: torch.from_numpy(value) for name, value in read.items()})
    return found.kind, found.intermediate_size, gates.requires_grad_(False)


def gate_state(spec: DecoderSpec, gates: nn.ModuleList) -> dict[str, torch.Tensor]:
    """Gate weights under the official names, in bfloat16."""
    return {
        f"{spec.layer(index)}.self_attn.retention_gate.{name}": value.detach().to("cpu", torch.bfloat16)
        for index, gate in enumerate(gates)
        for name, value in gate.state_dict().items()
    }


def write_gates(
    folder: Path,
    spec: DecoderSpec,
    gates: nn.ModuleList,
    backbone: Mapping[str, Any],
    *,
    kind: str,
    memory_size: int,
    base_model: str,
) -> None:
    """Write gates as the official repositories have them: config.json and trimkv_weights.pth.

    Args:
        folder: is there.
        spec: the decoder.
        gates: of all layers.
        backbone: the config.json of the backbone.
        kind: "rg" or "rg10".
        memory_size: M of the training.
        base_model: where the backbone is: a hub id, or its path from `folder`.
    """
    fields = {
        "base_model": base_model,
        "memory_size": memory_size,
        "retention_gate": kind,
        "retention_gate_intermediate_size": gates[0].linear1.out_features,
        "tie_retention_gate_layers": kind == "rg10",
        "trainable_params": "retention_gate",
    }
    config = _older_layout(backbone) | fields
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    torch.save(gate_state(spec, gates), folder / WEIGHTS)


def _older_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json also for transformers 4, which the official package needs: RoPE under the names that it had."""
    out = dict(config)
    rope = out.get("rope_parameters")
    if isinstance(rope, Mapping):
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        if "rope_theta" in rope:
            out.setdefault("rope_theta", rope["rope_theta"])
        if scaling.get("rope_type", "default") != "default":
            out.setdefault("rope_scaling", scaling)
        del out["rope_parameters"]
    if "dtype" in out:
        out.setdefault("torch_dtype", out.pop("dtype"))
    return out
