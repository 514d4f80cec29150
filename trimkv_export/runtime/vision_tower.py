"""Images and videos on their way into the decoder: encoded when their tokens are fed, some frames at a time."""

import copy
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import EngineError, OptionError
from trimkv_export.package import PackageConfig, VisionInfo
from trimkv_export.runtime import heap
from trimkv_export.runtime.cache_memory import bind_array, numpy_dtype
from trimkv_export.vision.grid import vision_grid
from trimkv_export.vision.positions import Block, Grid, Interval, MRopePositions, picture_blocks
from trimkv_export.words import shorten

__all__ = ["EncodedPicture", "Features", "Picture", "VisionTower", "VisualFeed", "bind_visual", "raw_pictures"]


class Picture(Protocol):
    """An image, or a video, that is ready to be encoded.

    Attributes:
        grid: (t, h, w) in patches; an image has t = 1.
        second_per_grid: seconds from one temporal patch to the next, or of each from the first on.
    """

    @property
    def grid(self) -> Grid:
        """See the class."""

    @property
    def second_per_grid(self) -> Interval:
        """See the class."""

    def patches(self, first: int, end: int) -> NDArray[np.float32]:
        """Patches [(end - first)·h·w, patch_dim] of temporal patches first … end - 1."""


@dataclass(frozen=True, eq=False)
class _RawPatches:
    """A picture that was given as patches, [t·h·w, patch_dim] float32 in the order of the reference processor."""

    pixel_values: NDArray[np.float32]
    grid: Grid
    second_per_grid: Interval = 1.0

    def patches(self, first: int, end: int) -> NDArray[np.float32]:
        """See Picture."""
        frame = self.grid[1] * self.grid[2]
        return self.pixel_values[first * frame : end * frame]


def raw_pictures(
    pixel_values: NDArray[np.float32] | None, image_grid_thw: NDArray[np.int64] | None, patch_dim: int
) -> list[Picture]:
    """The pictures of patches [patches, patch_dim] that lie one after the other, and their grids [pictures, 3].

    Raises:
        OptionError: they do not fit together, or a value is not finite: the cache would keep it.
    """
    if pixel_values is None or image_grid_thw is None:
        raise OptionError("pixel_values and image_grid_thw go together; give both")
    try:
        values, grids = np.asarray(pixel_values), np.asarray(image_grid_thw)
    except ValueError:
        raise OptionError("pixel_values and image_grid_thw must be arrays, got lists of unequal length") from None
    if grids.ndim != 2 or grids.shape[1] != 3 or grids.dtype.kind not in "iu" or grids.min(initial=1) < 1:
        raise OptionError(
            f"image_grid_thw must be whole numbers above 0 of shape [pictures, 3], got {shorten(image_grid_thw)}"
        )
    ends = list(itertools.accumulate(map(math.prod, grids.tolist())))  # Python's numbers do not overflow
    if values.dtype.kind != "f" or values.shape != (ends[-1] if ends else 0, patch_dim):
        raise OptionError(
            f"pixel_values must be floats of shape [{ends[-1] if ends else 0}, {patch_dim}] for these grids, got "
            f"{values.dtype} of {list(values.shape)}"
        )
    with np.errstate(over="ignore"):
        patches = values.astype(np.float32, copy=False)
    if not np.isfinite(patches).all():
        raise OptionError("pixel_values must be finite float32 numbers, got NaN, infinity or more than float32 holds")
    return [
        _RawPatches(patches[end - t * h * w : end], (t, h, w))
        for end, (t, h, w) in zip(ends, grids.tolist(), strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Features:
    """What the tower makes for n tokens: `embeds` [n, d] and `deepstack` [K, n, d]; bfloat16 as uint16."""

    embeds: NDArray[Any]
    deepstack: NDArray[Any]


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """A Picture that has been through the tower already, all of it.

    Attributes:
        grid, second_per_grid: as of the picture.
        features: of all its tokens.
    """

    grid: Grid
    second_per_grid: Interval
    features: Features

    def patches(self, first: int, end: int) -> NDArray[np.float32]:
        """Patches are not kept. Raises EngineError."""
        raise EngineError(f"the patches {first} to {end} of a picture were encoded already, and are gone")


class VisionTower:
    """The vision tower of a package. All rows share it; it keeps nothing between calls."""

    def __init__(self, backend: Any, config: PackageConfig, info: VisionInfo) -> None:
        self.info, self._backend = info, backend
        self._width, self._layers = config.model.hidden_size, config.model.deepstack_layers
        self._dtype = config.precision.dtype

    def frames_at_once(self, grid: Grid) -> int:
        """How many temporal patches of a picture go through the tower together: as many as an image may have tokens."""
        return max(1, self.info.max_image_tokens // self.info.frame_tokens(*grid[1:]))

    def encode(self, patches: NDArray[np.float32], grid: Grid) -> Features:
        """Run the tower on `grid`[0] temporal patches, and raise what ONNX Runtime raises."""
        frames, height, width = grid
        tokens = frames * self.info.frame_tokens(height, width)
        found = Features(
            np.empty((tokens, self._width), numpy_dtype(self._dtype)),
            np.empty((self._layers, tokens, self._width), numpy_dtype(self._dtype)),
        )
        binding = self._backend.io_binding()
        pixels = np.ascontiguousarray(patches, np.float32).reshape(frames, -1, self.info.patch_dim)
        inputs: dict[str, NDArray[Any]] = {"pixel_values": pixels}
        inputs |= vision_grid(self.info, height, width)
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        bind_array(binding.bind_output, "visual_embeds", found.embeds, self._dtype)
        if self._layers:
            bind_array(binding.bind_output, "deepstack_embeds", found.deepstack, self._dtype)
        self._backend.run_with_iobinding(binding)
        return found


def bind_visual(binding: Any, config: PackageConfig, feed: "VisualFeed | None" = None) -> None:
    """Bind the decoder's visual inputs (docs/design.md, section 6): what `feed` holds for this step, or none at all."""
    width, layers, dtype = config.model.hidden_size, config.model.deepstack_layers, config.precision.dtype
    arrays = feed.arrays() if feed else (_NOWHERE, _NOTHING, _NOTHING)
    count = feed.count if feed else 0
    bind_array(binding.bind_input, "visual_index", arrays[0], "int64", (count,))
    bind_array(binding.bind_input, "visual_embeds", arrays[1], dtype, (count, width))
    if layers:
        bind_array(binding.bind_input, "deepstack_embeds", arrays[2], dtype, (layers, count, width))


# Something to point at where there is no visual token.
_NOWHERE, _NOTHING = np.zeros(1, np.int64), np.zeros(1, np.uint8)


class VisualFeed:
    """The pictures that one session is still to feed, and the visual inputs of its current step.

    Buffers for a step are made once; features live until their tokens are fed.

    Attributes:
        positions: where tokens and pictures go.
        count: visual tokens of the current step.
    """

    def __init__(self, tower: VisionTower | None, config: PackageConfig, info: VisionInfo) -> None:
        self._tower, self._info = tower, info
        self.positions = MRopePositions(1 if config.model.rope.axes is None else 3)
        self.count = 0
        self._waiting: deque[tuple[Picture, int]] = deque()  # picture, temporal patches that were encoded
        self._features: Features | None = None
        self._used = 0  # tokens of `_features` that were fed
        chunk, width, layers = config.prefill_chunk, config.model.hidden_size, config.model.deepstack_layers
        dtype = numpy_dtype(config.precision.dtype)
        self._width, self._layers = width, layers
        self._index = np.zeros(chunk, np.int64)
        self._embeds = np.zeros(chunk * width, dtype)
        self._deepstack = np.zeros(layers * chunk * width, dtype)

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The buffers of the three visual inputs."""
        return self._index, self._embeds, self._deepstack

    def is_visual(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which tokens stand for pictures, [n]."""
        return np.isin(np.asarray(tokens, np.int64), self._info.placeholder_ids)

    @property
    def empty(self) -> bool:
        """Whether no picture, or part of one, is still to be fed."""
        return not self.positions.visual_tokens_left

    def check(self, tokens: Sequence[int], pictures: Sequence[Picture], *, whole: bool) -> None:
        """Check that `pictures` and then `tokens` can be fed; nothing changes.

        The last of `pictures` must begin in `tokens`; with `whole`, no picture may be left unfinished.

        Raises:
            OptionError: they cannot.
            EngineError: there are pictures and no vision tower.
        """
        if pictures and self._tower is None:
            raise EngineError("the engine was opened without its vision tower; open it with vision=True")
        for picture in pictures:
            self._check_size(picture.grid)
        visual, blocks = self.is_visual(tokens), list(map(self._blocks, pictures))
        if pictures or not self.empty or visual.any():
            ahead = self.positions.check(visual, itertools.chain.from_iterable(blocks))
            if pictures and ahead.images_left >= len(blocks[-1]):
                raise OptionError(
                    f"the last of the {len(pictures)} pictures given has no token here; give each picture together "
                    "with its first token"
                )
            if whole and ahead.visual_tokens_left:
                raise OptionError(
                    f"the prompt ends with {ahead.visual_tokens_left} tokens of a picture still to come; feed them too"
                )

    def _check_size(self, grid: Grid) -> None:
        info, (_, height, width) = self._info, grid
        if info.image_size is not None and grid != (1, *[info.image_size // info.patch_size] * 2):
            raise OptionError(
                f"this model takes images of {info.image_size} x {info.image_size} pixels only, "
                f"{info.image_size // info.patch_size} patches a side; got the grid {grid}"
            )
        needed, most = info.frame_tokens(height, width), info.max_image_tokens
        if needed > most:
            raise OptionError(
                f"an image of {height} x {width} patches takes {needed} tokens, and the package was built for at "
                f"most {most}; scale it down, or build with --max-image-tokens {needed}"
            )

    def position_after(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> int:
        """The next position once `pictures` and then `tokens` were fed.

        Raises:
            OptionError: they do not fit together.
        """
        blocks = itertools.chain.from_iterable(map(self._blocks, pictures))
        return self.positions.check(self.is_visual(tokens), blocks).next_position

    def _blocks(self, picture: Picture) -> list[Block]:
        return picture_blocks(self._info, picture.grid, self.positions.axes, picture.second_per_grid)

    def add(self, pictures: Sequence[Picture]) -> None:
        """Queue pictures; their tokens come next."""
        self.positions.expect(itertools.chain.from_iterable(map(self._blocks, pictures)))
        self._waiting.extend((picture, 0) for picture in pictures)

    def drop(self) -> None:
        """Forget what is still to be fed: the rest of a picture is left out."""
        self.positions.drop()
        self._clear()

    def reset(self, next_position: int = 0) -> None:
        """Start a conversation, or go on with a saved one."""
        self.positions.reset(next_position)
        self._clear()

    def _clear(self) -> None:
        self._waiting.clear()
        self._features, self._used, self.count = None, 0, 0

    def mark(self) -> Any:
        """What `rollback` needs to forget all that was added and begun since."""
        return copy.copy(self.positions), self._waiting.copy(), self._features, self._used

    def rollback(self, mark: Any) -> None:
        """Go back to a `mark`, which then is used up."""
        self.positions, self._waiting, self._features, self._used = mark
        self.count = 0

    def begin(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Make the visual inputs of a step of these tokens, [n]; returns their positions [axes, n].

        Raises:
            EngineError: the vision tower fails. Nothing has changed then, nor when it is interrupted.
        """
        visual = self.is_visual(tokens)
        places = np.flatnonzero(visual)
        if not len(places):
            self.count = 0
            return self.positions.step(visual)
        mark = self.mark()
        try:
            positions = self.positions.step(visual)
            self.count = len(places)
            self._index[: self.count] = places
            self._fill()
        except BaseException:
            self.rollback(mark)
            raise
        del mark  # it holds the features
        if self._features is None and not self._waiting:
            heap.trim()
        return positions

    def _fill(self) -> None:
        """Move the features of the next `count` tokens into the buffers, encoding as needed."""
        size = self.count * self._width
        embeds = self._embeds[:size].reshape(self.count, self._width)
        deepstack = self._deepstack[: self._layers * size].reshape(self._layers, self.count, self._width)
        done = 0
        while done < self.count:
            features = self._features or self._encode_next()
            part = min(self.count - done, len(features.embeds) - self._used)
            source, target = slice(self._used, self._used + part), slice(done, done + part)
            embeds[target] = features.embeds[source]
            deepstack[:, target] = features.deepstack[:, source]
            done, self._used = done + part, self._used + part
            if self._used == len(features.embeds):
                self._features, self._used = None, 0

    def _encode_next(self) -> Features:
        if self._tower is None:  # `check` lets no picture in then
            raise EngineError("the engine was opened without its vision tower")
        picture, first = self._waiting[0]
        if isinstance(picture, EncodedPicture):
            self._waiting.popleft()
            self._features = picture.features
            return self._features
        end = min(picture.grid[0], first + self._tower.frames_at_once(picture.grid))
        grid = (end - first, *picture.grid[1:])
        try:
            self._features = self._tower.encode(picture.patches(first, end), grid)
        except Exception as error:  # onnxruntime raises its own types; memory may also end before it
            raise EngineError(
                f"the vision tower failed on {grid[0]} frames of {grid[1]} x {grid[2]} patches: "
                f"{str(error) or type(error).__name__}"
            ) from error
        if end == picture.grid[0]:
            self._waiting.popleft()
        else:
            self._waiting[0] = picture, end
        return self._features
