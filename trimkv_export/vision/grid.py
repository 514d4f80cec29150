"""Where the patches of a picture lie, in the numbers that the vision tower's graph takes (NumPy only).

The formulas are those of transformers: a learned position grid is stretched over the picture, corner to corner, and
read by bilinear interpolation; rotary angles are row times frequency, then column times frequency; windows begin at the
picture's upper left corner, and those at its lower and right edges are cut off.
"""

import math

import numpy as np
from numpy.typing import NDArray

from trimkv_export.models import VisionSpec

__all__ = ["position_corners", "rotary_angles", "vision_grid", "windows"]

ROTARY_THETA = 10_000.0


def vision_grid(spec: VisionSpec, height: int, width: int) -> dict[str, NDArray[np.generic]]:
    """The inputs of this tower's graph that say where patches lie (docs/design.md, section 6).

    Args:
        spec: the tower.
        height: patches in a column of the picture.
        width: patches in a row of it.

    Returns:
        Arrays by the names of the graph's inputs. Patches are in the processor's order: those that merge into one token
        follow each other.
    """
    inputs: dict[str, NDArray[np.generic]] = {}
    if spec.image_size is not None:  # the grid is always the same
        return inputs
    rows, columns = _places(height, width, spec.spatial_merge_size)
    if spec.num_position_embeddings is not None:
        side = math.isqrt(spec.num_position_embeddings)
        inputs["position_index"], inputs["position_weight"] = position_corners(rows, columns, height, width, side)
    if spec.rotary:
        inputs["rotary_angle"] = rotary_angles(rows, columns, spec.head_dim)
    if spec.window_side is not None:
        inputs |= windows(rows, columns, spec.window_side * spec.spatial_merge_size)
    return inputs


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


def windows(rows: NDArray[np.int64], columns: NDArray[np.int64], side: int) -> dict[str, NDArray[np.generic]]:
    """W windows of side x side patches, each a list of as many places as the largest has patches, S.

    Returns:
        window_patch [W, S] int64: the patch at each place, 0 where there is none; window_mask [W, S, S] bool: for each
        place, the places that have one; window_place [P] int64: window·S + place of each patch.
    """
    row, column = rows // side, columns // side
    window = row * (int(column.max()) + 1) + column
    order = np.argsort(window, kind="stable")
    counts = np.bincount(window)
    within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = np.empty_like(order)
    place[order] = window[order] * counts.max() + within
    places = np.arange(counts.max())
    patch = np.zeros((counts.size, places.size), np.int64)
    patch.flat[place] = np.arange(len(order))
    mask = np.repeat((places < counts[:, None])[:, None], places.size, axis=1)
    return {"window_patch": patch, "window_mask": mask, "window_place": place}
