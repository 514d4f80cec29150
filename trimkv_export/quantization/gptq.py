"""Rounding with error feedback: GPTQ (arXiv 2210.17323), for one layer's matrices at a time.

Column after column is rounded, and what its error does to the layer's output is taken back by the columns after it.
Let H = Σ x·xᵀ over the inputs of the matrix, and e = w − ŵ the errors of a row; the output is off by e·H·eᵀ in all.
With H = R·Rᵀ, R upper triangular, that is Σⱼ (eⱼ·Rⱼⱼ + Σᵢ﹤ⱼ eᵢ·Rᵢⱼ)². So the j-th number is that of
wⱼ + Σᵢ﹤ⱼ eᵢ·Rᵢⱼ / Rⱼⱼ: then its term is the error of this rounding alone, times Rⱼⱼ.
This is the form of LDLQ (arXiv 2307.13304, theorem 6), which makes the same numbers as GPTQ and needs no inverse:
H becomes R where it lies.
"""

import numpy as np
from numpy.typing import NDArray

from trimkv_export.config import Quantization
from trimkv_export.quantization.rounding import Rounding, block_scales, rounded

__all__ = ["add_products", "factorize", "round_with_feedback"]

PANEL = 256  # columns that are factorised at once, and rows of which products are made
SLAB = 1024  # rows of a matrix that are best rounded together
# Of the diagonal of H, what is added to it at least, and times K / tokens: few tokens say little of how channels go
# together, and that little is not relied on.
DAMPING, SHRINKAGE = 0.01, 1.0

Array = NDArray[np.float32]


def add_products(total: Array, inputs: Array) -> None:
    """Add xᵀ·x of inputs x [tokens, K] to `total` [K, K], in its memory."""
    for start in range(0, len(total), 1024):
        total[start : start + 1024] += inputs[:, start : start + 1024].T @ inputs


def factorize(products: Array, tokens: int) -> Array:
    """Turn H [K, K] into R in its memory, by panels; what lies below the diagonal means nothing then.

    H is damped in each channel by a share of its own size, so the numbers do not depend on how channels are scaled. A
    channel that is never active counts as one of the least size.

    Args:
        products: Σ x·xᵀ, which is overwritten.
        tokens: how many it is of.

    Returns:
        R, which is `products`.
    """
    size = np.sqrt(products.diagonal())
    size = np.maximum(size, max(float(size.max()) * 1e-6, 1e-12)).astype(np.float32)
    products /= size
    products /= size[:, None]
    products[np.diag_indices_from(products)] = 1 + DAMPING + SHRINKAGE * len(products) / tokens
    turned = products[::-1, ::-1]  # its lower factor is R, turned
    for start in range(0, len(turned), PANEL):
        end = min(start + PANEL, len(turned))
        corner = _cholesky(turned[start:end, start:end])
        turned[start:end, start:end] = corner
        turned[end:, start:end] = turned[end:, start:end] @ np.linalg.inv(corner).T
        for row in range(end, len(turned), PANEL):
            stop = min(row + PANEL, len(turned))
            turned[row:stop, end:stop] -= turned[row:stop, start:end] @ turned[end:stop, start:end].T
    products *= size[:, None]
    return products


def _cholesky(corner: Array) -> Array:
    """The lower factor. Where float32 leaves it not quite positive definite, the diagonal is raised."""
    more = DAMPING
    while True:
        try:
            return np.linalg.cholesky(corner)
        except np.linalg.LinAlgError:
            corner = corner + np.float32(more) * np.eye(len(corner), dtype=np.float32)
            more *= 10


def round_with_feedback(rows: Array, factor: Array, quantization: Quantization, scale_dtype: np.dtype) -> Rounding:
    """Round rows [N, K] with R [K, K] of their inputs.

    Scales and zero points are of least squares (`Rounding.of`) for what a block's columns are with the errors of all
    blocks before; each column counts by Rⱼⱼ². Those of whole rows are of the rows as they are. In memory are 10 bytes
    for each element of the rows: give it `SLAB` at a time.
    """
    (count, columns), size = rows.shape, quantization.block_size
    weights = np.ascontiguousarray(rows.T)
    errors, numbers = np.empty_like(weights), np.empty(weights.shape, np.uint8)
    scales, zeros = np.empty((columns // size, count), scale_dtype), np.empty((columns // size, count), np.uint8)
    diagonal = factor.diagonal()
    importance = np.broadcast_to((diagonal * diagonal)[:, None], weights.shape)
    if quantization.per_row:
        scale, zero = block_scales(weights, quantization, scale_dtype, importance)
        scales[:], zeros[:] = scale, zero
    for start in range(0, columns, size):
        end = start + size
        ahead: Array = (factor[:end, start:end] / diagonal[start:end]).astype(np.float32)
        block: Array = weights[start:end] + ahead[:start].T @ errors[:start]
        if not quantization.per_row:
            scale, zero = block_scales(block, quantization, scale_dtype, importance[start:end])
            scales[start // size], zeros[start // size] = scale, zero
        step = scale.astype(np.float32)
        for column in range(size):
            target = block[column]
            if column:
                target = target + ahead[start : start + column, column] @ errors[start : start + column]
            found = rounded(target, scale, zero, quantization.bits)
            numbers[start + column] = found
            errors[start + column] = weights[start + column] - (found - zero) * step
    if quantization.per_row:
        scales, zeros = scales[:1], zeros[:1]
    turned = (np.ascontiguousarray(part.T) for part in (numbers, scales, zeros))
    return Rounding(*turned)
