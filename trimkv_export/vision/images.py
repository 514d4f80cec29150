"""Images to the patches that the vision tower reads, with Pillow and NumPy, as `Qwen2VLImageProcessor` and
`CLIPImageProcessor` make them.

Grids are equal. Pixels are bit-equal to the Pillow-backed processor of transformers (but see `resize_image` for
Pillow 13). The torchvision-backed one, which the official files name, resizes 8-bit tensors with the same filter in
fixed point of fewer bits: of the values that it interpolates, about 1 in 100 differ by 1 of 255 and fewer than 1 in
5000 by 2. tests/unit/vision/test_vision_images.py compares with both.

Memory: `image_files` says what reading takes. Resizing adds 4 bytes per pixel of (new width x old height); then the
source is released, if it was a file, and 3 bytes per pixel of the resized image stay. It has at most `max_pixels`
(official: 16.8 million), or what `max_image_tokens` allows. Patches, 24 bytes per pixel, are cut when the vision tower
asks for them.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trimkv_export.checks import require_whole
from trimkv_export.errors import OptionError
from trimkv_export.vision.image_files import MAX_IMAGE_PIXELS, ImageSource, describe, import_pillow, open_image
from trimkv_export.vision.patches import ResizedFrames
from trimkv_export.vision.processor_config import CropProcessorConfig, ImageProcessorConfig

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ProcessedImage",
    "check_aspect",
    "crop_image",
    "fit_tokens",
    "process_image",
    "resize_image",
    "smart_resize",
]

MAX_ASPECT = 200  # of the reference


@dataclass(frozen=True, eq=False)
class ProcessedImage(ResizedFrames):
    """An image as the vision tower takes it; its grid is (1, h, w).

    Attributes:
        source_size: (height, width) before resizing.
    """

    source_size: tuple[int, int]


def smart_resize(
    height: int, width: int, *, factor: int = 32, min_pixels: int = 65_536, max_pixels: int = 16_777_216
) -> tuple[int, int]:
    """(height, width) that the reference resizes an image to: multiples of `factor`, the aspect ratio nearly kept.

    An image of more than max_pixels is scaled to at most that many (unless its short side is `factor` already), one of
    fewer than min_pixels to at least that many.

    Raises:
        OptionError: the image is empty, or its sides differ by a factor above 200.
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
    """`size`, or the largest size below it that gives at most `max_tokens` tokens.

    The aspect ratio is kept as `smart_resize` keeps it, but an image too thin for that loses length: the limit holds.

    Args:
        size: (height, width) in pixels that the reference chose.
        source_size: (height, width) of the image.
        factor: side in pixels of the square that becomes one token.
        max_tokens: None is no limit.
    """
    if max_tokens is None:
        return size
    require_whole("max_image_tokens", max_tokens, 1)
    if size[0] * size[1] <= max_tokens * factor**2:
        return size
    shrink = math.sqrt(source_size[0] * source_size[1] / max_tokens)
    rows, columns = (max(1, math.floor(side / shrink)) for side in source_size)
    if rows * columns > max_tokens:
        rows, columns = (rows, max_tokens // rows) if rows < columns else (max_tokens // columns, columns)
    return rows * factor, columns * factor


def process_image(
    source: ImageSource,
    config: ImageProcessorConfig | CropProcessorConfig | None = None,
    *,
    max_image_tokens: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> ProcessedImage:
    """Read, resize and normalise an image, and cut it into patches.

    Args:
        source: see `open_image`.
        config: by default that of Qwen3-VL.
        max_image_tokens: the most tokens the image may take, such as a package's limit. A larger image is scaled down
            to fit, not refused; with None only the configuration's max_pixels limits it. Cropped images have one size.
        max_pixels: the most pixels of the file itself; a larger one is refused before it is decoded.

    Raises:
        OptionError: the image cannot be used.
    """
    config = config or ImageProcessorConfig()
    name = describe(source)
    image = open_image(source, max_pixels)
    source_size = (image.height, image.width)
    check_aspect(*source_size, name)
    if isinstance(config, CropProcessorConfig):
        return ProcessedImage(crop_image(image, config)[None], config, name, source_size)
    size = source_size
    if config.do_resize:
        size = smart_resize(
            *source_size, factor=config.factor, min_pixels=config.min_pixels, max_pixels=config.max_pixels
        )
    size = fit_tokens(size, source_size, config.factor, max_image_tokens)
    return ProcessedImage(resize_image(image, size)[None], config, name, source_size)


def resize_image(image: "Image", size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The pixels [height, width, 3] of an RGB image at `size` (height, width), by Pillow's bicubic filter.

    Width first: values are rounded and clipped to 8 bits between the two passes, so the order matters. torchvision and
    Pillow before 13 begin with the width; Pillow 13 begins with the height for some sizes, always where the width grows
    and the height shrinks, sometimes where both shrink.
    """
    bicubic = import_pillow().Resampling.BICUBIC
    if image.width != size[1]:
        image = image.resize((size[1], image.height), bicubic)
    if image.height != size[0]:
        image = image.resize((size[1], size[0]), bicubic)
    return np.asarray(image)


def crop_image(image: "Image", config: CropProcessorConfig) -> npt.NDArray[np.uint8]:
    """The middle [crop_size, crop_size, 3] of an RGB image that is resized to `shortest_edge`; black beyond its edges.

    An odd row or column is lost at the bottom or on the right, as in the reference.
    """
    size = image.height, image.width
    if config.do_resize:
        short, long = config.shortest_edge, int(config.shortest_edge * max(size) / min(size))
        size = (long, short) if image.width <= image.height else (short, long)
    pixels = resize_image(image, size)
    out = np.zeros((config.crop_size, config.crop_size, 3), np.uint8)
    rows, columns = (_centred(side, config.crop_size) for side in size)
    out[rows[1], columns[1]] = pixels[rows[0], columns[0]]
    return out


def _centred(side: int, crop: int) -> tuple[slice, slice]:
    """What a side and a crop of it with the same middle share: in the picture, and in the crop."""
    start, length = (side - crop) // 2, min(side, crop)
    first, placed = max(0, start), max(0, -start)
    return slice(first, first + length), slice(placed, placed + length)


def check_aspect(height: int, width: int, name: str) -> None:
    """Refuse a picture that the model does not take.

    Raises:
        OptionError: it is empty, or its sides differ by a factor above 200.
    """
    if height < 1 or width < 1:
        raise OptionError(f"{name} is empty: {width} x {height} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise OptionError(
            f"{name} is {width} x {height} pixels: its sides differ by more than a factor of {MAX_ASPECT}, "
            "which the model does not take; crop it"
        )
