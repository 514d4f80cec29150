"""The weights of a package in NumPy, and the layers that the decoder and the vision tower have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.config import Quantization
from trimkv_export.graph.stored import stored_tensors
from trimkv_export.quantization.rounding import unpack

__all__ = ["Array", "StoredWeights", "activate"]

Array = NDArray[np.float32]


class StoredWeights:
    """The weights of one graph by name, in float32. Each is read from its file when it is needed.

    A quantised `X.weight` is stored in parts (graph/weights.py); what is read are the values that these stand for.
    """

    def __init__(self, folder: Path, graph: str, quantization: Quantization | None = None) -> None:
        """Find the weights.

        Args:
            folder: of the package.
            graph: file name of the graph.
            quantization: how quantised weights are stored; None if there are none.
        """
        self._stored = stored_tensors(folder, graph)
        self._block_size = quantization.block_size if quantization else 0
        self._signed = quantization is not None and quantization.qdq

    def read(self, name: str) -> Array:
        """Return the whole tensor."""
        return self._read(name, None)

    def read_rows(self, name: str, rows: Sequence[int]) -> Array:
        """Return some rows of a tensor, a copy."""
        return self._read(name, list(rows))

    def _read(self, name: str, rows: list[int] | None) -> Array:
        if name in self._stored:
            return self._stored[name].read(rows).astype(np.float32)
        stem = name.removesuffix("weight")
        numbers, scales, zeros = (
            next((self._stored[stem + kind].read(rows) for kind in kinds if stem + kind in self._stored), None)
            # Before format 2.3 an embedding had rows of its own.
            for kinds in (("qweight", "qweight_rows"), ("scales",), ("qzeros",))
        )
        if numbers is None or scales is None:
            raise KeyError(name)
        bits = self._bits(stem, numbers, scales)
        zero: Array | int = 1 << (bits - 1)
        if self._signed:
            numbers = numbers.view(np.uint8) ^ np.uint8(0x88 if bits == 4 else 0x80)
        if zeros is not None:
            zero = unpack(zeros, bits)[:, : scales.shape[1], None].astype(np.float32)
        scales = scales.reshape(len(scales), -1)
        blocks = unpack(numbers.reshape(len(scales), -1), bits).reshape(*scales.shape, -1)
        values: Array = (blocks.astype(np.float32) - zero) * scales.astype(np.float32)[..., None]
        return values.reshape(len(scales), -1)

    def _bits(self, stem: str, numbers: NDArray[Any], scales: NDArray[Any]) -> int:
        """Of a matrix: head and single matrices may have others than the rest."""
        if self._signed:
            return self._stored[f"{stem}qweight"].bits
        return 8 * int(numbers[0].size) // (int(scales.shape[-1]) * self._block_size)

    def linear(self, x: Array, module: str) -> Array:
        """Return x·Wᵀ, plus the bias where the module has one: [rows, in] -> [rows, out]."""
        out: Array = x @ self.read(f"{module}.weight").T
        return out + self.read(f"{module}.bias") if f"{module}.bias" in self._stored else out


def activate(x: Array, kind: str) -> Array:
    """Return an activation of `x`.

    Args:
        x: any shape.
        kind: `hidden_act` of a Hugging Face config: silu, relu, gelu (by the error function), gelu_pytorch_tanh or
            quick_gelu.
    """
    match kind:
        case "silu":
            return np.asarray(x / (1 + np.exp(-x)), np.float32)
        case "quick_gelu":
            return np.asarray(x / (1 + np.exp(-1.702 * x)), np.float32)
        case "relu":
            return np.maximum(x, 0)
        case "gelu_pytorch_tanh":
            return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), np.float32)
        case "gelu":
            # The error function to 1.5e-7, Abramowitz and Stegun 7.1.26.
            z = np.abs(x) / np.sqrt(2)
            t = 1 / (1 + 0.3275911 * z)
            series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
            return np.asarray(0.5 * x * (1 + np.sign(x) * (1 - series * np.exp(-z * z))), np.float32)
    raise ValueError(f"activation {kind!r}")
