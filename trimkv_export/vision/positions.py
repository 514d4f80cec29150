"""Positions of a conversation of text, images and videos, step by step (NumPy only).

With M-RoPE a token has three. Text counts on from the position before it, the same on all axes; a grid of h x w merged
patches starts there too and counts rows and columns; what follows starts behind the largest position in it, so an image
takes max(h, w). Positions are thus not token indices: those still count every token, and they are what retention scores
use. A video is placed in one of two ways, as the model writes it into the prompt:

- with a timestamp before each temporal patch (Qwen3-VL), so that each is placed like an image;
- as one run of tokens (Qwen2.5-VL), in which time counts too: temporal patch i lies at i * interval, rounded down in
  float32. Text after it starts behind its last moment. So it is in the code that the model came out with, and in the
  paper; transformers 5 starts the text max(h, w) further on, within the video, but goes on behind it when it decodes.

Without M-RoPE each token takes one position, whatever it stands for.
"""

import copy
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from trimkv_export.compat import Self
from trimkv_export.errors import OptionError
from trimkv_export.package import VisionInfo

__all__ = ["Block", "Grid", "Interval", "MRopePositions", "picture_blocks"]

Grid = tuple[int, int, int]
# From one thing to the next; or of each, from the first on, where they do not come evenly.
Interval = float | tuple[float, ...]
# Tokens that are placed together: temporal patches, rows and columns of tokens, and the interval of temporal patches.
Block = tuple[int, int, int, Interval]
MAX_POSITION = np.iinfo(np.int32).max


def picture_blocks(info: VisionInfo, grid: Grid, axes: int = 3, second_per_grid: Interval = 1.0) -> list[Block]:
    """How the tokens of an image or a video are placed: temporal patch by temporal patch, or all together.

    Args:
        info: the vision tower.
        grid: (t, h, w) in patches.
        axes: see `MRopePositions`.
        second_per_grid: seconds from one temporal patch to the next, or of each of the t from the first on.

    Raises:
        OptionError: the grid's patches cannot be merged into tokens, or the video is too long.
    """
    (t, h, w), merge = grid, info.spatial_merge_size
    if min(t, h, w) < 1 or h % merge or w % merge:
        raise OptionError(
            f"an image grid is (t, h, w) in patches, above 0, with h and w multiples of {merge}; got {grid}"
        )
    if axes == 1:
        return [(1, 1, t * info.frame_tokens(h, w), 1.0)]
    if info.tokens_per_second is None:
        return [(1, h // merge, w // merge, 1.0)] * t
    seconds = max(second_per_grid) if isinstance(second_per_grid, tuple) else t * second_per_grid
    if seconds * info.tokens_per_second > MAX_POSITION:
        raise OptionError(f"a video of {seconds:g} seconds has more positions than can be counted; check its fps")
    a_second = np.float32(info.tokens_per_second)
    if isinstance(second_per_grid, tuple):
        return [(t, h // merge, w // merge, tuple(float(a_second * np.float32(each)) for each in second_per_grid))]
    return [(t, h // merge, w // merge, float(a_second * np.float32(second_per_grid)))]


class MRopePositions:
    """Where the next token of a conversation goes.

    Attributes:
        axes: positions of a token: 3 (time, height, width), or without M-RoPE 1.
        next_position: the position of the next text token, or the start of the image that is being fed. Between images
            it is all there is to save.
    """

    def __init__(self, axes: int = 3, next_position: int = 0) -> None:
        self.axes = axes
        self.reset(next_position)

    def reset(self, next_position: int = 0) -> None:
        """Start again, or go on from a saved conversation; expected images are forgotten."""
        self.next_position = next_position
        self._expected: tuple[Block, ...] = ()  # images not begun
        self._offsets = np.empty((self.axes, 0), np.int64)  # of the tokens still to come of the image being fed
        self._extent = 0  # what it adds to next_position at its end

    def drop(self) -> None:
        """Expect no more images; the rest of the one being fed is left out."""
        if self._offsets.size:
            # With one axis positions count tokens, so those that are left out take none.
            self.next_position += self._extent if self.axes > 1 else int(self._offsets[0, 0])
        self.reset(self.next_position)

    @property
    def visual_tokens_left(self) -> int:
        """Tokens still to come of all expected images."""
        return self._offsets.shape[1] + sum(math.prod(block[:3]) for block in self._expected)

    @property
    def images_left(self) -> int:
        """Expected images that have not begun."""
        return len(self._expected)

    def expect(self, blocks: Iterable[Block]) -> None:
        """Say which images and videos come next, as `picture_blocks` has them."""
        self._expected += tuple(blocks)

    def check(self, visual: NDArray[np.bool_], blocks: Iterable[Block] = ()) -> Self:
        """Try `expect(blocks)` and then steps over the tokens `visual`; nothing changes.

        Returns:
            The positions as they would be then.

        Raises:
            OptionError: as `step`.
        """
        trial = copy.copy(self)
        trial.expect(blocks)
        trial.step(visual)
        return trial

    def step(self, visual: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The positions [axes, n] of the next n tokens.

        Args:
            visual: [n], which tokens are of an image or a video. An image may end in a later step.

        Raises:
            OptionError: these are not the tokens of the expected images; nothing has changed then.
        """
        position, offsets, extent, begun = self.next_position, self._offsets, self._extent, 0
        out = np.empty((self.axes, len(visual)), np.int64)
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
                            "image or video tokens, or take the text literally (--literal)"
                        )
                    offsets, begun = self._place(self._expected[begun]), begun + 1
                    extent = int(offsets.max()) + 1
                count = min(end - at, offsets.shape[1])
                out[:, at : at + count] = position + offsets[:, :count]
                offsets, at = offsets[:, count:], at + count
                if not offsets.size:
                    position += extent
        self.next_position, self._offsets, self._extent = position, offsets, extent
        self._expected = self._expected[begun:]
        return out

    def _place(self, block: Block) -> NDArray[np.int64]:
        """Offsets [axes, n] of the block's tokens from its start."""
        sizes, interval = block[:3], block[3]
        if self.axes == 1:
            return np.arange(math.prod(sizes))[None]
        offsets = np.indices(sizes, np.int64).reshape(3, -1)
        if isinstance(interval, tuple):
            offsets[0] = np.array(interval, np.float32)[offsets[0]]
        else:
            offsets[0] = offsets[0].astype(np.float32) * np.float32(interval)
        return offsets


def _run_ends(visual: NDArray[np.bool_]) -> list[int]:
    """Where the runs of equal values end."""
    changes = np.flatnonzero(visual[1:] != visual[:-1]) + 1
    return [*changes.tolist(), len(visual)] if len(visual) else []
