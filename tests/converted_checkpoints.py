"""Checkpoints in other types and shards, and what a package must hold of them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from trimkv_export.checkpoint import open_backbone, open_gates

__all__ = ["DTYPES", "convert_checkpoint", "tensors"]

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def tensors(checkpoint: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of base and gates; all copies of linear3 are one, under the last layer's name."""
    found = {name: info.read() for name, info in open_backbone(checkpoint / "base").tensors.items()}
    for layer in open_gates(checkpoint / "gates").layers:
        found |= {info.name: info.read() for info in layer.values()}
    return found


def convert_checkpoint(source: Path, target: Path, dtype: np.dtype[Any], shards: int = 1) -> Path:
    """A copy with random low bits in another dtype, as safetensors in `shards` files."""
    rng = np.random.default_rng(0)
    shutil.copytree(source, target)
    converted = {
        name: (value.astype(np.float32) * rng.uniform(0.9, 1.1, value.shape)).astype(dtype)
        for name, value in tensors(target).items()
    }
    gates = {name: value for name, value in converted.items() if ".retention_gate." in name}
    layers = {int(match[1]) for name in gates if (match := re.search(r"layers\.(\d+)\.", name))}
    for layer in layers:  # the official files hold linear3 once per layer
        for name in [name for name in gates if "linear3" in name]:
            gates[re.sub(r"layers\.\d+\.", f"layers.{layer}.", name)] = gates[name].copy()
    (target / "gates" / "trimkv_weights.pth").unlink()
    save_file(gates, target / "gates" / "trimkv_weights.safetensors")
    base = {name: value for name, value in converted.items() if name not in gates}
    if shards == 1:
        save_file(base, target / "base" / "model.safetensors")
        return target
    (target / "base" / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(base.items())[shard::shards])
        save_file(part, target / "base" / file)
        index |= dict.fromkeys(part, file)
    (target / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return target
