"""The vision tower of Qwen3-VL in plain NumPy: what a package's vision graph is checked against.

Written from the definition of the model, not from the graph; it shares only the package's weights with the engine.
"""

import math

import numpy as np
from numpy.typing import NDArray

from trimkv_export.engine.package import VISION, Package, VisionInfo
from trimkv_export.verify.stored_weights import Array, StoredWeights, activate

__all__ = ["ReferenceTower"]

# Not in the config of a checkpoint: Qwen3-VL has no others.
LAYER_NORM_EPS = 1e-6
ROPE_THETA = 10_000.0


class ReferenceTower:
    """The tower in float32. Weights are read from the package as they are needed."""

    def __init__(self, package: Package, info: VisionInfo) -> None:
        self.info = info
        self._width = package.config.model.hidden_size
        self._weights = StoredWeights(package.path, VISION)

    def _linear(self, x: Array, module: str) -> Array:
        return self._weights.linear(x, f"{self.info.prefix}{module}")

    def _norm(self, x: Array, module: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(LAYER_NORM_EPS))
        weight, bias = (self._weights.read(f"{self.info.prefix}{module}.{part}") for part in ("weight", "bias"))
        out: Array = centred * scale * weight + bias
        return out

    def encode(self, patches: Array, grid: tuple[int, int, int]) -> tuple[Array, Array]:
        """The tokens of a picture: what they put in place of embeddings [n, d], and their DeepStack features [K, n, d].

        patches: [t·h·w, patch_dim], frame by frame, those of a token together. grid: (t, h, w) in patches.
        """
        frames = patches.reshape(grid[0], -1, self.info.patch_dim)
        encoded = [self._encode_frame(frame, *grid[1:]) for frame in frames]
        return (
            np.concatenate([embeds for embeds, _ in encoded]),
            np.concatenate([deepstack for _, deepstack in encoded], axis=1),
        )

    def _encode_frame(self, patches: Array, height: int, width: int) -> tuple[Array, Array]:
        """Patches of different frames do not see each other, so each frame goes alone."""
        info = self.info
        rows, columns = _places(height, width, info.spatial_merge_size)
        # The kernel of the patch embedding covers a patch, so the convolution is a product.
        weight = self._weights.read(f"{info.prefix}patch_embed.proj.weight").reshape(info.hidden_size, -1)
        hidden = patches @ weight.T + self._weights.read(f"{info.prefix}patch_embed.proj.bias")
        hidden = hidden + self._position_embedding(height, width)[rows, columns]
        angles = self._angles(rows, columns)
        deepstack = [np.empty((0, len(patches) // info.spatial_merge_size**2, self._width), np.float32)]
        for block in range(info.depth):
            path = f"blocks.{block}"
            hidden = hidden + self._attend(self._norm(hidden, f"{path}.norm1"), angles, f"{path}.attn")
            inner = self._linear(self._norm(hidden, f"{path}.norm2"), f"{path}.mlp.linear_fc1")
            hidden = hidden + self._linear(activate(inner, info.hidden_act), f"{path}.mlp.linear_fc2")
            if block in info.deepstack_visual_indexes:
                merger = f"deepstack_merger_list.{info.deepstack_visual_indexes.index(block)}"
                merged = self._norm(self._side_by_side(hidden), f"{merger}.norm")
                deepstack.append(self._merge(merged, merger)[None])
        embeds = self._merge(self._side_by_side(self._norm(hidden, "merger.norm")), "merger")
        return embeds, np.concatenate(deepstack)

    def _position_embedding(self, height: int, width: int) -> Array:
        """[h, w, hidden]: the square of learned embeddings stretched over the picture, corner to corner."""
        side = math.isqrt(self.info.num_position_embeddings)
        square = self._weights.read(f"{self.info.prefix}pos_embed.weight").reshape(side, side, -1)
        by_row = np.tensordot(_stretch(height, side), square, 1)
        return np.asarray(np.tensordot(by_row, _stretch(width, side), (1, 1)).swapaxes(1, 2), np.float32)

    def _angles(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        """Rotary angles [P, D/2]: the first D/4 by row, the others by column, with the same frequencies."""
        quarter = self.info.hidden_size // self.info.num_heads // 4
        frequencies = np.float32(ROPE_THETA) ** (-np.arange(quarter, dtype=np.float32) / np.float32(quarter))
        return np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1).astype(np.float32)

    def _attend(self, x: Array, angles: Array, module: str) -> Array:
        """Every patch of the frame sees every other."""
        heads, patches = self.info.num_heads, len(x)
        query, key, value = self._linear(x, f"{module}.qkv").reshape(patches, 3, heads, -1).transpose(1, 2, 0, 3)
        query, key = _rotate(query, angles), _rotate(key, angles)
        logits = query @ key.swapaxes(1, 2) / np.sqrt(np.float32(query.shape[-1]))
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        attended = weights / weights.sum(axis=-1, keepdims=True) @ value
        return self._linear(attended.swapaxes(0, 1).reshape(patches, -1), f"{module}.proj")

    def _side_by_side(self, hidden: Array) -> Array:
        """The patches of a token in one row: [P, hidden] -> [P/m², m²·hidden]."""
        return hidden.reshape(-1, self.info.hidden_size * self.info.spatial_merge_size**2)

    def _merge(self, x: Array, module: str) -> Array:
        # GELU by the error function, whatever the blocks' activation is.
        return self._linear(activate(self._linear(x, f"{module}.linear_fc1"), "gelu"), f"{module}.linear_fc2")


def _places(height: int, width: int, merge: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each patch [P]: token by token in reading order, and so within a token."""
    places = [
        (row, column)
        for top in range(0, height, merge)
        for left in range(0, width, merge)
        for row in range(top, top + merge)
        for column in range(left, left + merge)
    ]
    rows, columns = np.array(places, np.int64).T
    return rows, columns


def _stretch(size: int, side: int) -> Array:
    """[size, side]: linear interpolation of `side` values at `size` even places from the first to the last."""
    place = np.linspace(0, side - 1, size)
    return np.asarray(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(side))), np.float32)


def _rotate(x: Array, angles: Array) -> Array:
    """Turn the pairs (i, i + D/2) of x [heads, P, D] by angles [P, D/2]."""
    left, right = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
