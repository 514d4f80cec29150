"""The vision towers in plain NumPy: what a package's vision graph is checked against.

Written from the definition of the models, not from the graph; it shares only the package's weights and its description
of the tower with the engine.
"""

import math

import numpy as np
from numpy.typing import NDArray

from trimkv_export.package import VISION, Package, VisionInfo
from trimkv_export.verify.stored_weights import Array, StoredWeights, activate

__all__ = ["ReferenceTower"]

ROPE_THETA = 10_000.0  # no tower has another


class ReferenceTower:
    """The tower in float32. Weights are read from the package as they are needed."""

    def __init__(self, package: Package, info: VisionInfo) -> None:
        self.info = info
        self._width = package.config.model.hidden_size
        self._weights = StoredWeights(package.path, VISION)

    def _linear(self, x: Array, module: str) -> Array:
        return self._weights.linear(x, f"{self.info.prefix}{module}")

    def _norm(self, x: Array, module: str) -> Array:
        info, path = self.info, f"{self.info.prefix}{module}"
        centred = x if info.rms_norm else x - x.mean(axis=-1, keepdims=True)
        scale = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(info.norm_eps))
        out: Array = centred * scale * self._weights.read(f"{path}.weight")
        return out if info.rms_norm else out + self._weights.read(f"{path}.bias")

    def encode(self, patches: Array, grid: tuple[int, int, int]) -> tuple[Array, Array]:
        """Encode a picture to n tokens.

        Args:
            patches: [t·h·w, patch_dim], frame by frame, those of a token together.
            grid: (t, h, w) in patches.

        Returns:
            What the tokens have in place of embeddings [n, d], and their DeepStack features [K, n, d].
        """
        frames = patches.reshape(grid[0], -1, self.info.patch_dim)
        encoded = [self._encode_frame(frame, *grid[1:]) for frame in frames]
        return (
            np.concatenate([embeds for embeds, _ in encoded]),
            np.concatenate([deepstack for _, deepstack in encoded], axis=1),
        )

    def _encode_frame(self, patches: Array, height: int, width: int) -> tuple[Array, Array]:
        """Patches of different frames do not see each other, so each frame goes alone."""
        info, names = self.info, self.info.modules
        rows, columns = _places(height, width, info.spatial_merge_size)
        # The kernel of the patch embedding covers a patch, so the convolution is a product.
        hidden = self._linear(patches, names.patch)
        if names.class_embedding is not None:
            hidden = np.concatenate([self._weights.read(f"{info.prefix}{names.class_embedding}")[None], hidden])
        if names.position is not None:
            hidden = hidden + self._positions(names.position, height, width, rows, columns)
        if names.pre_norm is not None:
            hidden = self._norm(hidden, names.pre_norm)
        angles = self._angles(rows, columns) if info.rotary else None
        window = self._windows(rows, columns)
        deepstack = [np.empty((0, info.frame_tokens(height, width), self._width), np.float32)]
        for block in range(info.depth):
            path = info.block(block)
            within = None if block in info.fullatt_block_indexes else window
            hidden = hidden + self._attend(self._norm(hidden, f"{path}.{names.norm1}"), angles, within, path)
            normed = self._norm(hidden, f"{path}.{names.norm2}")
            inner, *up = (self._linear(normed, f"{path}.{name}") for name in names.mlp_in)
            inner = activate(inner, info.hidden_act)
            hidden = hidden + self._linear(inner * up[0] if up else inner, f"{path}.{names.mlp_out}")
            if block in info.deepstack_visual_indexes:
                merger = str(names.deepstack).format(info.deepstack_visual_indexes.index(block))
                merged = self._norm(self._side_by_side(hidden), f"{merger}.{names.merger_norm}")
                deepstack.append(self._merge(merged, merger)[None])
        if names.class_embedding is not None and not info.keeps_class_token:
            hidden = hidden[1:]
        if names.merger_norm is not None:
            hidden = self._norm(hidden, f"{names.merger}.{names.merger_norm}")
        return self._merge(self._side_by_side(hidden), names.merger), np.concatenate(deepstack)

    def _positions(
        self, name: str, height: int, width: int, rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> Array:
        """Learned embeddings: one a row where all images have one size, else a square that is stretched over them."""
        table = self._weights.read(f"{self.info.prefix}{name}")
        if self.info.image_size is not None:
            return table
        side = math.isqrt(len(table))
        by_row = np.tensordot(_stretch(height, side), table[: side * side].reshape(side, side, -1), 1)
        stretched = np.tensordot(by_row, _stretch(width, side), (1, 1)).swapaxes(1, 2)  # [h, w, hidden]
        return np.asarray(stretched[rows, columns], np.float32)

    def _windows(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """[P, P]: which patches are in the window of each patch; None where every patch sees every other."""
        info = self.info
        if info.window_size is None:
            return None
        # Windows hold whole tokens.
        side = info.window_size // info.spatial_merge_size // info.patch_size * info.spatial_merge_size
        same = [places[:, None] // side == places // side for places in (rows, columns)]
        return np.asarray(same[0] & same[1])

    def _angles(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        """Rotary angles [P, D/2]: the first D/4 by row, the others by column, with the same frequencies."""
        quarter = self.info.hidden_size // self.info.num_heads // 4
        frequencies = np.float32(ROPE_THETA) ** (-np.arange(quarter, dtype=np.float32) / np.float32(quarter))
        return np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1).astype(np.float32)

    def _attend(self, x: Array, angles: Array | None, window: NDArray[np.bool_] | None, block: str) -> Array:
        """Every patch of the frame, or of its window, sees every other."""
        heads, rows, names = self.info.num_heads, len(x), self.info.modules
        projected = np.concatenate([self._linear(x, f"{block}.{name}") for name in names.qkv], axis=1)
        query, key, value = projected.reshape(rows, 3, heads, -1).transpose(1, 2, 0, 3)
        if angles is not None:
            query, key = _rotate(query, angles), _rotate(key, angles)
        logits = query @ key.swapaxes(1, 2) / np.sqrt(np.float32(query.shape[-1]))
        if window is not None:
            logits = np.where(window, logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        attended = weights / weights.sum(axis=-1, keepdims=True) @ value
        return self._linear(attended.swapaxes(0, 1).reshape(rows, -1), f"{block}.{names.proj}")

    def _side_by_side(self, hidden: Array) -> Array:
        """The patches of a token in one row: [P, hidden] -> [P/m², m²·hidden]."""
        return hidden.reshape(-1, self.info.hidden_size * self.info.spatial_merge_size**2)

    def _merge(self, x: Array, module: str) -> Array:
        names = self.info.modules
        inner = activate(self._linear(x, f"{module}.{names.merger_in}"), self.info.merger_act)
        return self._linear(inner, f"{module}.{names.merger_out}")


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
