"""M-RoPE positions of a conversation of text, images and video frames, step by step (NumPy only).

The rule is that of Qwen3-VL's `get_rope_index` (transformers): text counts on from the position before it, the same on
all three axes; a grid of h x w merged patches starts there too and counts rows and columns; what follows it starts
max(h, w) further on. An image is thus many tokens but few positions, so positions are not token indices: those still
count every token, and they are what retention scores use.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import OptionError

__all__ = ["Grid", "MRopePositions", "frame_grids"]

Grid = tuple[int, int, int]


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
        visual_tokens_left: tokens still to come of the image being fed; 0 between images.
    """

    def __init__(self, spatial_merge_size: int, next_position: int = 0) -> None:
        self.spatial_merge_size = spatial_merge_size
        self.reset(next_position)

    def reset(self, next_position: int = 0) -> None:
        """Start again, or go on from a saved conversation; an image that is being fed is forgotten."""
        self.next_position = next_position
        self._offsets = np.empty((3, 0), np.int64)  # of the tokens still to come of the image being fed
        self._extent = 0  # what it adds to next_position at its end

    @property
    def visual_tokens_left(self) -> int:
        """Tokens still to come of the image being fed."""
        return self._offsets.shape[1]

    def step(self, visual: NDArray[np.bool_], grids: Iterable[Iterable[int]] = ()) -> NDArray[np.int64]:
        """The positions [3, n] (time, height, width) of the next n tokens.

        Args:
            visual: [n], which tokens are of an image or a video frame. An image may end in a later step.
            grids: (t, h, w) in patches, before merging, of each image and each frame (`frame_grids`) that begins in
                this step, in order.

        Raises:
            OptionError: tokens and grids do not fit together; nothing has changed then.
        """
        merge, queue = self.spatial_merge_size, [_checked(grid, self.spatial_merge_size) for grid in grids]
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
                    if begun == len(queue):
                        raise OptionError(
                            f"token {at} of this step begins image {begun + 1}, but the step has {len(queue)} image "
                            "grids; give one for each image or video frame that begins in it"
                        )
                    time, height, width = queue[begun]
                    rows, columns = height // merge, width // merge
                    offsets = np.indices((time, rows, columns), np.int64).reshape(3, -1)
                    extent, begun = max(rows, columns), begun + 1
                count = min(end - at, offsets.shape[1])
                out[:, at : at + count] = position + offsets[:, :count]
                offsets, at = offsets[:, count:], at + count
                if not offsets.size:
                    position += extent
        if begun < len(queue):
            raise OptionError(f"this step has {len(queue)} image grids, but only {begun} images begin in its tokens")
        self.next_position, self._offsets, self._extent = position, offsets, extent
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
