"""Round-to-nearest quantisation of rows of weights, by blocks of columns (formats: graph/functions/quantized.py)."""

import numpy as np
from numpy.typing import NDArray

from trimkv_export.config import Quantization

__all__ = ["pack", "quantize"]

Rows = NDArray[np.float32]


def quantize(rows: Rows, quantization: Quantization, scale_dtype: np.dtype) -> dict[str, NDArray[np.generic]]:
    """Rows [R, K] -> qweight [R, K·bits/8] and qzeros [R, ⌈blocks·bits/8⌉] uint8, scales [R, blocks].

    Symmetric: the scale is the least with which the largest and the smallest value of the block fit in −2^(bits−1) …
    2^(bits−1) − 1. Else the block's range, 0 included, is spread over all 2^bits numbers. Numbers are rounded with the
    scale as it is stored, in `scale_dtype`. With `per_row` the whole row is one block, and its scale is repeated.
    """
    levels, half = 1 << quantization.bits, 1 << (quantization.bits - 1)
    blocks = rows.reshape(len(rows), -1, quantization.block_size)
    axes = (1, 2) if quantization.per_row else 2
    low, high = (np.asarray(found(blocks, axis=axes, keepdims=True)) for found in (np.min, np.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    exact = np.maximum(high / (half - 1), low / -half) if quantization.symmetric else (high - low) / (levels - 1)
    scales = exact.astype(scale_dtype)
    step = scales.astype(np.float32)
    step[step == 0] = 1  # a block of zeros, or too small for the type
    zeros = np.full_like(step, half) if quantization.symmetric else np.clip(np.rint(-low / step), 0, levels - 1)
    numbers = np.clip(np.rint(blocks / step) + zeros, 0, levels - 1).astype(np.uint8)
    shape = len(rows), blocks.shape[1]
    parts: dict[str, NDArray[np.generic]] = {
        "qweight": pack(numbers.reshape(len(rows), -1), quantization.bits),
        "scales": np.ascontiguousarray(np.broadcast_to(scales[..., 0], shape)),
    }
    if not quantization.symmetric:
        found = np.broadcast_to(zeros[..., 0], shape).astype(np.uint8)
        parts["qzeros"] = pack(found, quantization.bits)
    return parts


def pack(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers [R, n] side by side: 4 bits two to a byte, the even one in the low half, and a last one alone."""
    if bits == 8:
        return np.ascontiguousarray(numbers)
    if numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    packed: NDArray[np.uint8] = np.bitwise_or(numbers[:, ::2], np.left_shift(numbers[:, 1::2], 4), dtype=np.uint8)
    return packed
