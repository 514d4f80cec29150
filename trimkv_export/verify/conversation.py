"""The conversation of a self-check: random text and, for vision models, pictures of random patches."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimkv_export.package import PackageConfig, VisionInfo
from trimkv_export.verify.stored_weights import Array

__all__ = ["Conversation", "Picture", "Turn"]

TEXT_BEFORE = 2  # tokens; between pictures there is text, as in the prompts of the model


@dataclass(frozen=True, eq=False)
class Picture:
    """An image or a video.

    Attributes:
        start: its first token.
        grid: (t, h, w) in patches.
        patches: [t·h·w, patch_dim].
    """

    start: int
    grid: tuple[int, int, int]
    patches: Array


@dataclass(frozen=True, eq=False)
class Turn:
    """What one step feeds.

    Attributes:
        tokens: S of them.
        positions: [3, S], of each token in time, height and width; without M-RoPE all three are the same.
        place: [V], which tokens of the step are visual.
        number: [V], which of the conversation's visual tokens they are.
        pixel_values: patches of the pictures that begin in this step, for `Session.step`; None if there are none.
        image_grid_thw: their grids; None if there are none.
    """

    tokens: list[int]
    positions: NDArray[np.int64]
    place: NDArray[np.int64]
    number: NDArray[np.int64]
    pixel_values: Array | None
    image_grid_thw: NDArray[np.int64] | None


class Conversation:
    """Random tokens, made as steps ask for them, or earlier when a picture is added.

    Positions follow the definition of M-RoPE. Text counts on from what was before it, the same on all axes. An image of
    h x w tokens starts where text would go on, stands still in time and counts its rows and columns; what follows
    starts after the largest position in it. Each frame of a video is placed like an image, with text between frames;
    or, where the model has positions per second, frames follow each other a second apart. Without M-RoPE tokens count.
    """

    def __init__(self, config: PackageConfig, rng: np.random.Generator) -> None:
        self._rng, self._flat = rng, config.model.rope.axes is None
        self._text = np.setdiff1d(np.arange(config.model.vocab_size), config.placeholder_ids)
        self._tokens: list[int] = []
        self._positions: list[tuple[int, int, int]] = []
        self._number: list[int] = []  # of each token; -1 for text
        self._next = 0  # position of the next token of text
        self._fed = self._visual = 0
        self.pictures: list[Picture] = []

    @property
    def pending(self) -> int:
        """How many tokens were made and not taken yet."""
        return len(self._tokens) - self._fed

    def add_text(self, count: int) -> None:
        """Add random tokens, none of which stands for a picture."""
        self._tokens += [int(token) for token in self._text[self._rng.integers(0, len(self._text), count)]]
        self._positions += [(self._next + i,) * 3 for i in range(count)]
        self._number += [-1] * count
        self._next += count

    def add_picture(self, info: VisionInfo, frames: int, rows: int, columns: int) -> Picture:
        """Add text, then a picture of `rows` x `columns` tokens; with several `frames` a video, with text before each.

        Where the package takes no picture that large, it has fewer columns, then fewer rows; where the model takes no
        video, or one size only, it is an image, or has that size.

        Args:
            info: of the vision tower.
            frames: temporal patches.
            rows: tokens of a frame from top to bottom.
            columns: tokens of a frame from left to right.
        """
        merge = info.spatial_merge_size
        frames = 1 if info.video_token_id is None else frames
        rows = min(rows, info.max_image_tokens)
        columns = min(columns, info.max_image_tokens // rows)
        if info.image_size is not None:
            rows = columns = info.image_size // info.patch_size // merge
        grid = frames, rows * merge, columns * merge
        patches = self._rng.uniform(-1, 1, (int(np.prod(grid)), info.patch_dim)).astype(np.float32)
        token = info.image_token_id if frames == 1 or info.video_token_id is None else info.video_token_id
        start = len(self._tokens) + TEXT_BEFORE
        pace = info.tokens_per_second
        for times in [[0.0]] * frames if pace is None else [[frame * pace for frame in range(frames)]]:
            self.add_text(TEXT_BEFORE)
            count, at = len(times) * info.frame_tokens(*grid[1:]), self._next
            if self._flat:
                places = [(i, i, i) for i in range(count)]
            else:
                places = [(int(t), row, column) for t in times for row in range(rows) for column in range(columns)]
            self._tokens += [token] * count
            self._positions += [(at + t, at + row, at + column) for t, row, column in places]
            self._number += range(self._visual, self._visual + count)
            self._visual += count
            self._next = at + max(map(max, places)) + 1
        picture = Picture(start, grid, patches)
        self.pictures.append(picture)
        return picture

    def take(self, length: int) -> Turn:
        """Return the next `length` tokens: what was made before, then more text."""
        self.add_text(max(0, length - self.pending))
        start, end = self._fed, self._fed + length
        self._fed = end
        number = np.array(self._number[start:end], np.int64)
        place = np.flatnonzero(number >= 0)
        begun = [picture for picture in self.pictures if start <= picture.start < end]
        return Turn(
            self._tokens[start:end],
            np.array(self._positions[start:end], np.int64).T,
            place,
            number[place],
            np.concatenate([picture.patches for picture in begun]) if begun else None,
            np.array([picture.grid for picture in begun], np.int64) if begun else None,
        )
