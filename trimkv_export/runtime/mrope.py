"""M-RoPE positions of a conversation of text, images and video frames, step by step (NumPy only).

The rule is that of Qwen3-VL's `get_rope_index` (transformers): text counts on from the position before it, the same on
all three axes; a grid of h x w merged patches starts there too and counts rows and columns; what follows it starts
max(h, w) further on. An image is thus many tokens but few positions, so positions are not token indices: those still
count every token, and they are what retention scores use.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import OptionError

__all__ = ["Grid", "MRopePositions", "count_tokens", "frame_grids"]

Grid = tuple[int, int, int]


def count_tokens(grid: Sequence[int], merge_size: int = 2) -> int:
    """How many visual tokens an image or video of `grid` (t, h, w) has."""
    t, h, w = grid
    return t * h * w // merge_size**2


def frame_grids(grid: Iterable[int]) -> list[Grid]:
    """The grids of a video's frames: Qwen3-VL writes a timestamp before each, so each is placed like an image.

    Raises OptionError if `grid` is not three numbers.
    """
    sizes = tuple(int(size) for size in grid)
    if len(sizes) != 3:
        raise OptionError(f"a video grid is (t, h, w) in patches, got {sizes}")
    return [(1, sizes[1], sizes[2])] * sizes[0]


class MRopePositions:
    """Where the next token of a conversation goes.

    Attributes:
        spatial_merge_size: patches per side that the vision tower merges into one token.
        next_position: the position of the next text token, or the start of the image that is being fed. Between images
            it is all there is to save.
    """

    def __init__(self, spatial_merge_size: int, next_position: int = 0) -> None:
        self.spatial_merge_size = spatial_merge_size
        self.reset(next_position)

    def reset(self, next_position: int = 0) -> None:
        """Start again, or go on from a saved conversation; expected images are forgotten."""
        self.next_position = next_position
        self._expected: tuple[Grid, ...] = ()  # images not begun
        self._offsets = np.empty((3, 0), np.int64)  # of the tokens still to come of the image being fed
        self._extent = 0  # what it adds to next_position at its end

    def drop(self) -> None:
        """Expect no more images; the rest of the one being fed is left out."""
        self.reset(self.next_position + (self._extent if self._offsets.size else 0))

    @property
    def visual_tokens_left(self) -> int:
        """Tokens still to come of all expected images."""
        return self._offsets.shape[1] + sum(self._tokens(grid) for grid in self._expected)

    @property
    def images_left(self) -> int:
        """Expected images that have not begun."""
        return len(self._expected)

    def _tokens(self, grid: Grid) -> int:
        return count_tokens(grid, self.spatial_merge_size)

    def expect(self, grids: Iterable[Sequence[int]]) -> None:
        """Say which images and video frames (`frame_grids`) come next: (t, h, w) of each, in patches before merging.

        Raises OptionError for a grid that cannot be; nothing has changed then.
        """
        self._expected += tuple([_checked(grid, self.spatial_merge_size) for grid in grids])

    def check(self, visual: NDArray[np.bool_], grids: Iterable[Sequence[int]] = ()) -> Self:
        """Raise OptionError if `expect(grids)` and then steps over the tokens `visual` would; nothing changes.

        Returns the positions as they would be then.
        """
        trial = copy.copy(self)
        trial.expect(grids)
        trial.step(visual)
        return trial

    def step(self, visual: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The positions [3, n] (time, height, width) of the next n tokens.

        visual: [n], which tokens are of an image or a video frame. An image may end in a later step.

        Raises OptionError when these are not the tokens of the expected images; nothing has changed then.
        """
        merge = self.spatial_merge_size
        position, offsets, extent, begun = self.next_position, self._offsets, self._extent, 0
        out = np.empty((3, len(visual)), np.int64)
        at = 0
        for end in _run_ends(visual):
            if not visual[at]:
                if offsets.size:
                    raise OptionError(
                        f"token {at} of this step is text, but the image before it has {offsets.shape[1]} more tokens; "
                        "feed as many image tokens as its grid has after merging"
                    )
                out[:, at:end] = np.arange(position, position + end - at)
                position, at = position + end - at, end
            while at < end:
                if not offsets.size:
                    if begun == len(self._expected):
                        raise OptionError(
                            f"token {at} of this step stands for an image that was not given; give one for each run of "
                            "image or video tokens"
                        )
                    time, height, width = self._expected[begun]
                    rows, columns = height // merge, width // merge
                    offsets = np.indices((time, rows, columns), np.int64).reshape(3, -1)
                    extent, begun = max(rows, columns), begun + 1
                count = min(end - at, offsets.shape[1])
                out[:, at : at + count] = position + offsets[:, :count]
                offsets, at = offsets[:, count:], at + count
                if not offsets.size:
                    position += extent
        self.next_position, self._offsets, self._extent = position, offsets, extent
        self._expected = self._expected[begun:]
        return out


def _run_ends(visual: NDArray[np.bool_]) -> list[int]:
    """Where the runs of equal values end."""
    changes = np.flatnonzero(visual[1:] != visual[:-1]) + 1
    return [*changes.tolist(), len(visual)] if len(visual) else []


def _checked(grid: Iterable[int], merge: int) -> Grid:
    sizes = tuple(int(size) for size in grid)
    if len(sizes) != 3 or min(sizes) < 1 or sizes[1] % merge or sizes[2] % merge:
        raise OptionError(
            f"an image grid is (t, h, w) in patches, above 0, with h and w multiples of {merge}; got {sizes}"
        )
    return sizes[0], sizes[1], sizes[2]
