"""Checkpoints in the layouts of GPTQ, AWQ and compressed-tensors, packed number by number as their formats say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

__all__ = ["LAYOUTS", "quantize_checkpoint"]

ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}
AWQ_LANES = [0, 2, 4, 6, 1, 3, 5, 7]  # column of each half byte of a word, from the lowest
LAYOUTS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "gptq-8": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False},
    "gptq-sym": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    "gptq-sym-8": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"},
    "gptq-row": {"quant_method": "gptq", "bits": 4, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
                "input_activations": None,
            }
        },
        "ignore": ["lm_head"],
    },
}
LAYOUTS["compressed-8"] = json.loads(json.dumps(LAYOUTS["compressed"]))
LAYOUTS["compressed-8"]["config_groups"]["group_0"]["weights"] |= {"num_bits": 8, "symmetric": False}

Numbers = NDArray[np.int64]


def quantize_checkpoint(
    checkpoint: Path,
    layout: str,
    seed: int = 0,
    *,
    middle: bool | None = None,
    only: Callable[[str], bool] = lambda name: name.endswith("_proj.weight"),
    config: dict[str, Any] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Replace matrices in checkpoint/base by random ones in a layout; returns the values they stand for.

    middle: whether all zero points are 2^(bits-1); None: as the layout says.
    only: the matrices that are replaced.
    config: what config.json says, where that is not the layout.
    """
    written, config, random = config, LAYOUTS[layout], np.random.default_rng(seed)
    method = config["quant_method"]
    options = config["config_groups"]["group_0"]["weights"] if method == "compressed-tensors" else config
    bits: int = options["num_bits"] if method == "compressed-tensors" else options["bits"]
    size: int = options["group_size"]
    file = checkpoint / "base" / "model.safetensors"
    tensors, values = dict(load_file(file)), {}
    for name in [name for name in tensors if only(name)]:
        rows, columns = tensors.pop(name).shape
        groups = 1 if size == -1 else -(-columns // size)
        numbers = random.integers(0, 1 << bits, (rows, columns))
        zeros = random.integers(0, 1 << bits, (rows, groups))
        if (options.get("symmetric") or options.get("sym")) if middle is None else middle:
            zeros[:] = 1 << (bits - 1)
        scales = (random.uniform(0.5, 1.5, (rows, groups)) * 2.0**-bits).astype(np.float16)
        each = columns if size == -1 else size
        values[name] = np.array(
            [
                [(int(numbers[r, c]) - int(zeros[r, c // each])) * float(scales[r, c // each]) for c in range(columns)]
                for r in range(rows)
            ],
            np.float32,
        )
        stem = name.removesuffix("weight")
        if method == "gptq":
            offset = np.uint32(0) if config.get("checkpoint_format") == "gptq_v2" else np.uint32(1)
            tensors |= {
                f"{stem}qweight": packed(numbers.T, bits, axis=0),
                # Subtracted in the word, where a zero point of 0 borrows from its neighbour.
                f"{stem}qzeros": (packed(zeros.T, bits, axis=1).view(np.uint32) - offset * ONES[bits]).view(np.int32),
                f"{stem}scales": np.ascontiguousarray(scales.T),
                f"{stem}g_idx": np.arange(columns, dtype=np.int32) // each,
            }
        elif method == "awq":
            tensors |= {
                f"{stem}qweight": packed(numbers.T, bits, axis=1, lanes=AWQ_LANES),
                f"{stem}qzeros": packed(zeros.T, bits, axis=1, lanes=AWQ_LANES),
                f"{stem}scales": np.ascontiguousarray(scales.T),
            }
        else:
            tensors |= {
                f"{stem}weight_packed": packed(numbers, bits, axis=1),
                f"{stem}weight_scale": scales,
                f"{stem}weight_shape": np.array([rows, columns], np.int64),
            }
            if not options["symmetric"]:
                tensors[f"{stem}weight_zero_point"] = packed(zeros, bits, axis=0)
    save_file(tensors, file)
    path = checkpoint / "base" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": config if written is None else written})
    )
    return values


def packed(numbers: Numbers, bits: int, axis: int, lanes: list[int] | None = None) -> NDArray[np.int32]:
    """Numbers side by side along `axis` in words of 32 bits, from the lowest; lanes: which one is where in a word."""
    per = 32 // bits
    moved = np.moveaxis(numbers, axis, -1)
    moved = np.pad(moved, ((0, 0), (0, -moved.shape[-1] % per)))
    words = np.zeros((*moved.shape[:-1], moved.shape[-1] // per), np.uint32)
    for word in range(words.shape[-1]):
        for lane, at in enumerate(lanes or range(per)):
            words[..., word] |= (moved[..., word * per + at] << (bits * lane)).astype(np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)
