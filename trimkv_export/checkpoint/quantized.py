"""Checkpoints that are quantised already: the layouts of GPTQ, AWQ and compressed-tensors on the Hugging Face hub.

All mean value = (number - zero point) * scale, a scale (and zero point) for each group of columns of a row. They differ
in how numbers of N rows and K columns are packed into int32, low bits first, and in their names:

    gptq                 X.qweight [K·bits/32, N], X.qzeros [G, N·bits/32], X.scales [G, N], X.g_idx [K]; in its first
                         version a zero point is stored less one
    awq (gemm)           X.qweight [K, N/8], X.qzeros [G, N/8], of eight rows 0 2 4 6 1 3 5 7, X.scales [G, N]
    compressed-tensors   X.weight_packed [N, K·bits/32], X.weight_scale [N, G], X.weight_shape [2] and, if asymmetric,
                         X.weight_zero_point [N·bits/32, G]

Here they become numbers [N, K], scales and zero points [N, G]; nothing is computed, so nothing is rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.words import shorten

__all__ = ["StoredQuantization", "read_quantization"]

METHODS = ("awq", "compressed-tensors", "gptq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What compressed-tensors calls those of the other two.
COMPRESSED_NAMES = {"qweight": "weight_packed", "scales": "weight_scale", "qzeros": "weight_zero_point"}

Numbers = NDArray[np.uint8]


@dataclass(frozen=True)
class StoredQuantization:
    """How the linear layers of a checkpoint are quantised.

    Attributes:
        method: one of `METHODS`.
        bits: 4 or 8.
        group_size: columns with one scale; None means the whole row.
        zeros: whether zero points are stored; without them they are 2^(bits-1).
        zero_offset: what is added to the stored ones.
        middle_zeros: they are stored, and config.json says that they are 2^(bits-1).
    """

    method: str
    bits: int
    group_size: int | None
    zeros: bool
    zero_offset: int = 0
    middle_zeros: bool = False

    def tensors(self, weight: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a checkpoint has in place of a `weight` of this shape: qweight, scales, qzeros -> name and shape."""
        rows, columns = shape
        groups, per = (1 if self.group_size is None else columns // self.group_size), 32 // self.bits
        shapes = {
            "gptq": {"qweight": (columns // per, rows), "scales": (groups, rows), "qzeros": (groups, rows // per)},
            "awq": {"qweight": (columns, rows // per), "scales": (groups, rows), "qzeros": (groups, rows // per)},
            "compressed-tensors": {
                "qweight": (rows, columns // per), "scales": (rows, groups), "qzeros": (rows // per, groups),
            },
        }[self.method]  # fmt: skip
        stem = weight.removesuffix("weight")
        names = COMPRESSED_NAMES if self.method == "compressed-tensors" else {}
        if not self.zeros:
            del shapes["qzeros"]
        return {part: (stem + names.get(part, part), found) for part, found in shapes.items()}

    @property
    def beside(self) -> tuple[str, ...]:
        """Ends of the names of further tensors, which say nothing new: the order of columns, the shape."""
        return {"gptq": (".g_idx",), "compressed-tensors": (".weight_shape",)}.get(self.method, ())

    def numbers(self, packed: NDArray[Any]) -> Numbers:
        """Stored qweight -> numbers [N, K]."""
        if self.method == "awq":
            return self._awq(packed).T
        if self.method == "gptq":
            return self._unpacked(packed, 0).T
        return self._unpacked(packed, 1)

    def zero_points(self, packed: NDArray[Any], name: str) -> Numbers:
        """Stored qzeros -> zero points [N, G].

        Raises:
            CheckpointError: one does not fit in `bits` bits.
        """
        if self.method == "awq":
            return self._awq(packed).T
        if self.method == "gptq":
            found = self._unpacked(packed, 1).T.astype(np.int16) + self.zero_offset
            if found.max(initial=0) >= 1 << self.bits:
                raise CheckpointError(f"{name}: a zero point is {found.max()}, above {(1 << self.bits) - 1}")
            return found.astype(np.uint8)
        return self._unpacked(packed, 0)

    def scales(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Stored scales -> scales [N, G], in their own type."""
        return stored if self.method == "compressed-tensors" else stored.T

    def _unpacked(self, packed: NDArray[Any], axis: int) -> Numbers:
        """Numbers of int32, those of one word side by side along `axis`."""
        words, per = packed.view(np.uint32), 32 // self.bits
        parts = [(words >> np.uint32(self.bits * i)).astype(np.uint8) & ((1 << self.bits) - 1) for i in range(per)]
        shape = [size * (per if at == axis else 1) for at, size in enumerate(packed.shape)]
        return np.stack(parts, axis + 1).reshape(shape)

    def _awq(self, packed: NDArray[Any]) -> Numbers:
        found = self._unpacked(packed, 1).reshape(len(packed), -1, 8)
        out = np.empty_like(found)
        out[..., AWQ_ORDER] = found
        return out.reshape(len(packed), -1)


def read_quantization(config: Mapping[str, Any], where: Path) -> StoredQuantization | None:
    """What a Hugging Face config.json (read from `where`) says; None if the checkpoint is not quantised.

    Raises:
        UnsupportedModelError: a method or an option that this version cannot read; key and value are named.
    """
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("quant_method") not in METHODS:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise UnsupportedModelError(
            f"{where}: quantization_config.quant_method {shorten(method)} is not supported; supported: "
            f"{', '.join(METHODS)}; or take the checkpoint that is not quantised"
        )
    read = _Reader(found, where)
    if found["quant_method"] == "compressed-tensors":
        return _compressed(read)
    bits, group = read.one_of("bits", (4, 8)), read.group(found.get("group_size"))
    if found["quant_method"] == "awq":
        read.one_of("version", ("gemm", "GEMM"), "gemm")
        read.one_of("bits", (4,))
        read.one_of("zero_point", (True,), True)
        return StoredQuantization("awq", 4, group, zeros=True)
    read.one_of("desc_act", (False,), False)
    first = read.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq"
    middle = found.get("sym") is True
    return StoredQuantization("gptq", bits, group, zeros=True, zero_offset=int(first), middle_zeros=middle)


def _compressed(read: "_Reader") -> StoredQuantization:
    read.one_of("format", ("pack-quantized",))
    groups = read.config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise read.unsupported("config_groups", groups, "one group of layers")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or group.get("input_activations") is not None:
        raise read.unsupported("config_groups", groups, "weights, and activations that are not quantised")
    inner = _Reader(weights, read.where, "quantization_config.config_groups.weights.")
    bits = inner.one_of("num_bits", (4, 8))
    inner.one_of("type", ("int",), "int")
    inner.one_of("actorder", (None, "weight", "static"), None)
    per_row = inner.one_of("strategy", ("group", "channel")) == "channel"
    size = None if per_row else inner.group(weights.get("group_size"))
    return StoredQuantization(
        "compressed-tensors", bits, size, zeros=not inner.one_of("symmetric", (True, False), True)
    )


@dataclass(frozen=True)
class _Reader:
    """Values of an object in config.json, each one of a few."""

    config: Mapping[str, Any]
    where: Path
    path: str = "quantization_config."

    def unsupported(self, key: str, value: Any, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.where}: {self.path}{key} {shorten(value)} is not supported; supported: {supported}"
        )

    def one_of(self, key: str, supported: tuple[Any, ...], default: Any = None) -> Any:
        value = self.config.get(key, default)
        if not any(value is known or (type(value) is type(known) and value == known) for known in supported):
            raise self.unsupported(key, value, ", ".join(map(str, supported)))
        return value

    def group(self, value: Any) -> int | None:
        """Columns with one scale; -1 is the whole row."""
        if type(value) is not int or value not in (-1, 16, 32, 64, 128, 256):
            raise self.unsupported("group_size", value, "-1, 16, 32, 64, 128, 256")
        return None if value == -1 else value
