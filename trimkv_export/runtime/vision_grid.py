"""Where the patches of a picture lie, in the numbers that the vision tower's graph takes (NumPy only).

The formulas are those of Qwen3-VL in transformers: the learned position grid is stretched over the picture, corner to
corner, and read by bilinear interpolation; rotary angles are row times frequency, then column times frequency.
"""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["position_corners", "rotary_angles", "vision_grid"]

ROTARY_THETA = 10_000.0


def vision_grid(
    height: int, width: int, *, merge: int, num_position_embeddings: int, head_dim: int
) -> dict[str, NDArray[np.generic]]:
    """The inputs position_index [4, P], position_weight [4, P] and rotary_angle [P, head_dim/2] of a grid in patches.

    Patches are in the processor's order: those that merge into one token follow each other.
    """
    rows, columns = _places(height, width, merge)
    index, weight = position_corners(rows, columns, height, width, math.isqrt(num_position_embeddings))
    return {
        "position_index": index,
        "position_weight": weight,
        "rotary_angle": rotary_angles(rows, columns, head_dim),
    }


def _places(height: int, width: int, merge: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each patch, [P] each."""
    grid = np.indices((height, width), np.int64).reshape(2, height // merge, merge, width // merge, merge)
    rows, columns = grid.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return rows, columns


def position_corners(
    rows: NDArray[np.int64], columns: NDArray[np.int64], height: int, width: int, side: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The four neighbours [4, P] of each patch in a `side` x `side` grid, flat, and their weights [4, P]."""
    axes = []
    for at, size in ((rows, height), (columns, width)):
        place = np.linspace(0, side - 1, size, dtype=np.float32)[at]
        low = place.astype(np.int64)
        axes.append((low, np.minimum(low + 1, side - 1), place - low.astype(np.float32)))
    (top, bottom, down), (left, right, across) = axes
    index = np.stack([top * side + left, top * side + right, bottom * side + left, bottom * side + right])
    weight = np.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across])
    return index, weight.astype(np.float32)


def rotary_angles(rows: NDArray[np.int64], columns: NDArray[np.int64], head_dim: int) -> NDArray[np.float32]:
    """Angles [P, head_dim/2]: the first half for rows, the second for columns, with the same frequencies."""
    half = head_dim // 2
    frequencies = 1 / np.float32(ROTARY_THETA) ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
    angles = [at[:, None].astype(np.float32) * frequencies.astype(np.float32) for at in (rows, columns)]
    return np.concatenate(angles, axis=1)
