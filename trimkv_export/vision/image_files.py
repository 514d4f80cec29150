"""Image files, bytes, PIL images and arrays to RGB images, as the processors of transformers convert them.

Memory: an image of n pixels takes 4n bytes here, 8n where it is turned upright or is no RGB image. Its size is looked
at as soon as the header is read, before anything of that size is allocated: a file of a few kilobytes can hold a
hundred million pixels. Pillow's draft mode would read a large JPEG in less memory, but the pixels it gives are no
longer those of the reference.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trimkv_export.errors import OptionError, TrimKVError, missing
from trimkv_export.files import open_regular
from trimkv_export.words import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_IMAGE_PIXELS",
    "MOST_IMAGE_PIXELS",
    "ImageSource",
    "check_file",
    "check_pixels",
    "describe",
    "enough_memory",
    "explained",
    "import_pillow",
    "open_file",
    "open_image",
    "to_rgb",
]

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image | npt.NDArray[np.uint8]"

# Raster formats whose decoders run inside Pillow; it would start Ghostscript for an EPS file. Not JPEG 2000: its
# decoder allocates by what the code stream says, 3 GB for a file of 2 kB, whatever the size of the picture.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_IMAGE_PIXELS = 1 << 26  # 8,192 x 8,192; with it an image takes 0.5 GB at most while it is read
MOST_IMAGE_PIXELS = 178_956_970  # what may be asked for in its place: Pillow refuses more
STRIP_PIXELS = 1 << 20  # images are converted to RGB this many pixels at a time


def check_pixels(width: int, height: int, name: str = "the image", most: int = MAX_IMAGE_PIXELS) -> None:
    """Refuse a picture before it is decoded.

    Args:
        width: in pixels, as its header says.
        height: in pixels.
        name: what it is called in the message.
        most: pixels that are taken at most.

    Raises:
        OptionError: it is empty, or has more pixels.
    """
    if width < 1 or height < 1:
        raise OptionError(f"{name} is empty: {width} x {height} pixels")
    if width * height > most:
        raise OptionError(
            f"{name} is too large: {width} x {height} pixels, and at most {most:,} are taken; scale it down, or raise "
            "--max-image-pixels"
        )


def open_image(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> "Image":
    """An RGB image from a file, the bytes of one, a PIL image, or an array.

    Transparency is laid over white and other modes go through Pillow's `convert("RGB")`, as the reference does with a
    PIL image (so 16-bit grey is clipped at 255, not scaled). Of several frames the first is taken. Files and bytes are
    turned upright as their EXIF tag says, and PIL images are not, as in the reference. An RGB image is returned as it
    is, not copied.

    Args:
        source: an array is uint8: [h, w], [h, w, c] or [c, h, w], c = 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        OptionError: it is not an image, or is broken, cut off, empty or too large; the file is named.
        MissingDependencyError: Pillow is not installed.
    """
    pil = import_pillow()
    name = describe(source)
    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source, name), name)
    if isinstance(source, pil.Image):
        check_pixels(source.width, source.height, name, max_pixels)  # it may not be decoded yet
        return to_rgb(source, name)
    with open_file(source, max_pixels) as file:
        return to_rgb(file, name, upright=True)


@contextmanager
def enough_memory(source: Any, kind: str = "image") -> Iterator[None]:
    """Around all that is done with a picture: raise OptionError where memory runs out."""
    try:
        yield
    except MemoryError as error:
        raise OptionError(
            f"{describe(source, kind)} takes more memory than this machine has left; scale it down"
            + (", or take fewer frames (max-frames)" if kind == "video" else "")
        ) from error


def describe(source: Any, kind: str = "image") -> str:
    """A name for `source` in messages: its path, or what it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"the {kind} in {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"the array of shape {source.shape}"
    return getattr(source, "filename", "") or f"the {kind}"


def import_pillow() -> Any:
    """The module PIL.Image.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise missing("reading images and videos", "Pillow", "vision") from error
    return PIL.Image


def open_file(source: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> Any:
    """A file or bytes as a PIL image that is not decoded yet, of at most `max_pixels`; a context manager.

    Raises:
        OptionError: it is neither, is empty, cannot be read, is not an image of a known format, or is too large.
    """
    pil = import_pillow()
    name = describe(source)
    if isinstance(source, bytes):
        if not source:
            raise OptionError(f"{name} is empty")
        opened: Any = BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        opened = check_file(source)
    else:
        raise OptionError(
            f"an image must be a path, bytes, a PIL image or an array of uint8, got {type(source).__name__}"
        )
    with explained(name):
        image = _opened_unlimited(pil, opened)
    try:
        check_pixels(image.width, image.height, name, max_pixels)
    except OptionError:
        image.close()
        raise
    return image


def _opened_unlimited(pil: Any, opened: Any) -> Any:
    """What Pillow finds in a file. Its own limit, of the whole process, would warn of sizes that ours allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pil.DecompressionBombWarning)
        return pil.open(opened, formats=FORMATS)


def check_file(source: "str | os.PathLike[str]") -> Path:
    """The path of a file that exists, can be read and is not empty.

    Raises:
        OptionError: it is a URL, or there is no such file, or it is empty or cannot be read.
    """
    path = Path(source)
    if "://" in str(source) or str(source).startswith("data:"):
        raise OptionError(f"{shorten(str(source))} is a URL; download it and give the file's path")
    try:
        with open_regular(path) as file:
            if not file.read(1):
                raise OptionError(f"{path} is empty")
    except FileNotFoundError:
        raise OptionError(f"{path} does not exist") from None
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}") from error
    return path


def _from_array(array: npt.NDArray[Any], name: str) -> "Image":
    if array.dtype != np.uint8:
        raise OptionError(f"{name} must hold uint8 values from 0 to 255, got {array.dtype}")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):  # the reference looks at the first axis first
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise OptionError(f"{name} must be [height, width] or have 1, 3 or 4 channels first or last")
    if 0 in array.shape:
        raise OptionError(f"{name} is empty")
    image: Image = import_pillow().fromarray(np.ascontiguousarray(array))
    return image


def to_rgb(image: "Image", name: str, *, upright: bool = False) -> "Image":
    """The image in RGB, with any transparency laid over white.

    Args:
        image: in any mode.
        name: of the image, for messages.
        upright: turn it as its EXIF tag says.

    Raises:
        OptionError: it is empty, or its file cannot be decoded.
    """
    check_pixels(image.width, image.height, name, sys.maxsize)
    with explained(name):
        image.load()
        if upright:
            image = _upright(image)
        if image.mode == "RGB" and image.info.get("transparency") is None:
            return image
        return _convert(image)


def _upright(image: "Image") -> "Image":
    """The image, turned as its EXIF tag says; the image itself where there is no tag, without Pillow's copy."""
    from PIL import ExifTags, ImageOps

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag does not make the image unusable
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _convert(image: "Image") -> "Image":
    """The image in RGB, made in strips, so that a large image is held twice at most, not four times."""
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return _convert_whole(image)
    result: Image = import_pillow().new("RGB", image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        result.paste(_convert_whole(image.crop(box)), box[:2])
    return result


def _convert_whole(image: "Image") -> "Image":
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    pil = import_pillow()
    white = pil.new("RGBA", image.size, (255, 255, 255, 255))
    flat: Image = pil.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return flat


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what Pillow raises while it reads the image `name` into an OptionError; each decoder has its own errors."""
    pil = import_pillow()
    try:
        yield
    except TrimKVError:
        raise
    except pil.UnidentifiedImageError as error:
        raise OptionError(f"{name} is not an image of a known format ({', '.join(FORMATS)})") from error
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:  # warnings may be errors
        raise OptionError(f"{name} is too large: {str(error).rstrip('.')}") from error
    except MemoryError as error:
        raise OptionError(f"{name} is too large for the memory of this machine") from error
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise OptionError(f"{name} cannot be read as an image: {reason}; it may be damaged or incomplete") from error
