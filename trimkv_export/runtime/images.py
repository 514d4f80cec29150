"""Images to the patches that the vision tower reads, as `Qwen2VLImageProcessor` makes them, with Pillow and NumPy.

Grids are equal. Pixels are bit-equal to the Pillow-backed processor of transformers (but see `resize_image` for
Pillow 13). The torchvision-backed one, which the official files name, resizes 8-bit tensors with the same filter in
fixed point of fewer bits: of the values that it interpolates, about 1 in 100 differ by 1 of 255 and fewer than 1 in
5000 by 2. tests/unit/runtime/test_runtime_images.py compares with both.

Memory: `image_files` says what reading takes. Resizing adds 4 bytes per pixel of (new width x old height); then the
source is released, if it was a file, and the patches take 27 bytes per pixel of the resized image, of which 24 stay
as pixel_values. That image has at most `max_pixels` (official: 16.8 million), or what `max_image_tokens` allows. So
a 12000 x 9000 JPEG peaks at 0.67 GB with the official limits, and at 0.48 GB with 1024 tokens.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trimkv_export.errors import OptionError
from trimkv_export.runtime.image_files import ImageSource, describe, import_pillow, open_image
from trimkv_export.runtime.processor_config import ImageProcessorConfig, ProcessorConfig

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ImageProcessorConfig",
    "ImageSource",
    "PatchWriter",
    "ProcessedImage",
    "check_aspect",
    "fit_tokens",
    "open_image",
    "process_image",
    "resize_image",
    "smart_resize",
]

MAX_ASPECT = 200  # of the reference


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """An image as the vision tower takes it.

    pixel_values: [h*w, 3*temporal_patch_size*patch_size²] float32, the patches of a token one after the other.
    grid: (1, h, w) in patches. size: (height, width) in pixels after resizing; source_size: before.
    tokens: how many tokens the image takes in the prompt.
    """

    pixel_values: npt.NDArray[np.float32]
    grid: tuple[int, int, int]
    size: tuple[int, int]
    source_size: tuple[int, int]
    tokens: int


def smart_resize(
    height: int, width: int, *, factor: int = 32, min_pixels: int = 65_536, max_pixels: int = 16_777_216
) -> tuple[int, int]:
    """(height, width) that the reference resizes an image to: multiples of `factor`, the aspect ratio nearly kept.

    An image of more than max_pixels is scaled to at most that many (unless its short side is `factor` already), one of
    fewer than min_pixels to at least that many.
    Raises OptionError for an empty image and for sides that differ by a factor above 200.
    """
    check_aspect(height, width, "the image")
    # Python's round, as in the reference: halves go to the even neighbour.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def fit_tokens(
    size: tuple[int, int], source_size: tuple[int, int], factor: int, max_tokens: int | None
) -> tuple[int, int]:
    """`size`, or if it gives more than `max_tokens` tokens of factor² pixels, the size that just does not.

    size: (height, width) that the reference chose, in pixels, for an image of source_size (height, width).
    The aspect ratio is kept as `smart_resize` keeps it, but an image too thin for that loses length: the limit holds.
    """
    if max_tokens is None:
        return size
    if type(max_tokens) is not int or max_tokens < 1:
        raise OptionError(f"max_image_tokens must be a whole number of at least 1, got {max_tokens!r}")
    if size[0] * size[1] <= max_tokens * factor**2:
        return size
    shrink = math.sqrt(source_size[0] * source_size[1] / max_tokens)
    rows, columns = (max(1, math.floor(side / shrink)) for side in source_size)
    if rows * columns > max_tokens:
        rows, columns = (rows, max_tokens // rows) if rows < columns else (max_tokens // columns, columns)
    return rows * factor, columns * factor


def process_image(
    source: ImageSource,
    config: ImageProcessorConfig | None = None,
    *,
    max_image_tokens: int | None = None,
    exif_orientation: bool | None = None,
) -> ProcessedImage:
    """Read, resize, normalise and cut an image into patches. See `open_image` for `source` and `exif_orientation`.

    config: by default that of Qwen3-VL.
    max_image_tokens: the most tokens the image may take, such as a package's limit. A larger image is scaled down to
        fit, never refused; with None only the configuration's max_pixels limits it.
    Raises OptionError for an image that cannot be used.
    """
    config = config or ImageProcessorConfig()
    name = describe(source)
    image = open_image(source, exif_orientation=exif_orientation)
    source_size = (image.height, image.width)
    check_aspect(*source_size, name)
    size = source_size
    if config.do_resize:
        size = smart_resize(
            *source_size, factor=config.factor, min_pixels=config.min_pixels, max_pixels=config.max_pixels
        )
    size = fit_tokens(size, source_size, config.factor, max_image_tokens)
    pixels = resize_image(image, size)
    del image  # the largest thing here, unless the caller holds it
    patches = PatchWriter(1, size, config, name)
    patches.write(0, pixels)
    grid = patches.grid
    return ProcessedImage(patches.values, grid, size, source_size, math.prod(grid) // config.merge_size**2)


def resize_image(image: "Image", size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The pixels [height, width, 3] of an RGB image at `size` (height, width), by Pillow's bicubic filter.

    Width first: values are rounded and clipped to 8 bits between the two passes, so the order matters. torchvision and
    Pillow before 13 begin with the width; Pillow 13 does not where the width grows and the height shrinks.
    """
    bicubic = import_pillow().Resampling.BICUBIC
    if image.width != size[1]:
        image = image.resize((size[1], image.height), bicubic)
    if image.height != size[0]:
        image = image.resize((size[1], size[0]), bicubic)
    return np.asarray(image)


class PatchWriter:
    """Cuts frames of one size into patches, in the order that the vision tower reads them.

    values: [t*h*w, 3*T*p*p] float32; rows are ordered (t, h/m, w/m, m, m) with merge size m, so that the patches of
        one token follow each other; columns are (channel, frame of T, row, column) with patch size p.
    grid: (t, h, w), t = frames / T rounded up; the last frame is repeated to fill its patches.
    """

    def __init__(self, frames: int, size: tuple[int, int], config: ProcessorConfig, name: str) -> None:
        """Allocate for `frames` frames of `size` (height, width); `name` is for the error when it does not divide."""
        height, width = size
        if height % config.factor or width % config.factor:
            raise OptionError(
                f"{name} is {width} x {height} pixels; without resizing (do_resize is false) both sides must be "
                f"multiples of {config.factor}"
            )
        p, m, group = config.patch_size, config.merge_size, config.temporal_patch_size
        self.grid = (-(-frames // group), height // p, width // p)
        t, h, w = self.grid
        self._frames, self._group, self._p, self._m = frames, group, p, m
        self._table = _table(config)
        self._blocks = np.empty((t, h // m, w // m, m, m, 3, group, p, p), np.float32)

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The patches; every frame must have been written."""
        return self._blocks.reshape(math.prod(self.grid), -1)

    def write(self, frame: int, pixels: npt.NDArray[np.uint8]) -> None:
        """Put in frame number `frame`; pixels: [height, width, 3]."""
        _, h, w = self.grid
        p, m = self._p, self._m
        # [h/m, w/m, m, m, 3, p, p], a view
        cut = pixels.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        t, place = divmod(frame, self._group)
        end = self._group if frame == self._frames - 1 else place + 1
        for row in range(h // m):  # since NumPy makes 8-byte indices of what it looks up
            for channel, table in enumerate(self._table):
                values = table[cut[row, :, :, :, channel]]
                for k in range(place, end):
                    self._blocks[t, row, :, :, :, channel, k] = values


def _table(config: ProcessorConfig) -> npt.NDArray[np.float32]:
    """[3, 256] float32: what each value of each channel becomes, rounded where the Pillow-backed reference rounds."""
    levels = np.arange(256)
    scaled = levels.astype(np.float32)
    if config.do_rescale:
        scaled = (levels.astype(np.float64) * config.rescale_factor).astype(np.float32)
    if not config.do_normalize:
        return np.stack([scaled] * 3)
    mean = np.array(config.image_mean, np.float32)[:, None]
    deviation = np.array(config.image_std, np.float32)[:, None]
    return np.asarray((scaled - mean) / deviation, np.float32)


def check_aspect(height: int, width: int, name: str) -> None:
    """Raise OptionError for an empty picture, or one whose sides differ by a factor above 200."""
    if height < 1 or width < 1:
        raise OptionError(f"{name} is empty: {width} x {height} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise OptionError(
            f"{name} is {width} x {height} pixels: its sides differ by more than a factor of {MAX_ASPECT}, "
            "which the model does not take; crop it"
        )
