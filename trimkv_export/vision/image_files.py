"""Image files, bytes, PIL images and arrays to RGB images, as the processors of transformers convert them.

Memory: an image of n pixels takes 4n bytes here, 8n where it is turned upright or is no RGB image, and what its decoder
works in (`READ_BYTES`). Its size is looked at as soon as the header is read, before anything of that size is allocated:
a file of a few kilobytes can hold a hundred million pixels. Pillow's draft mode would read a large JPEG in less memory,
but the pixels it gives are no longer those of the reference.
"""

import importlib
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trimkv_export.config import MAX_IMAGE_PIXELS, MOST_IMAGE_PIXELS
from trimkv_export.errors import MissingDependencyError, OptionError, TrimKVError, missing
from trimkv_export.files import open_regular
from trimkv_export.words import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_IMAGE_PIXELS",
    "MOST_IMAGE_PIXELS",
    "READ_BYTES",
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
# What photos of phones are, by the brands in their first bytes: the module and the package that make Pillow read them.
# Pillow's own wheels read AVIF since 11.3.
BRANDS = re.compile(rb"(?s)\A.{4}ftyp(?:.{8})?.*?(heic|heix|heim|heis|hevc|hevx|mif1|msf1|avif|avis)")
PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "AVIF": ("pillow_avif", "pillow-avif-plugin")}
URL = re.compile(r"(?i)[a-z][a-z0-9+.-]{1,20}:/|data:")
# Bytes a pixel that reading takes at most. Measured (Pillow 12, 30 megapixels): 4.9 of a plain JPEG or PNG, 6.6 of grey
# of 16 bits, 7.3 of a HEIC, 8 to 8.6 where it is turned or has alpha, 9.2 of an AVIF, 10 of a progressive JPEG, 12 with
# four colours; and 16 to 17.6 of a WebP, which therefore may have half as many pixels.
READ_BYTES = 12
COSTLY = {"WEBP": 2}
SNIFFED = 256  # bytes of a file that say what it is
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
    PIL image; but grey of 16 bits is scaled to 8, where the reference makes all above 255 white, and grey of numbers
    without a known white is refused. Of several frames the first is taken, and no other is decoded. Files and bytes are
    turned upright as their EXIF tag says, and PIL images are not, as in the reference. An RGB image is returned as it
    is, not copied.

    Args:
        source: an array is uint8: [h, w], [h, w, c] or [c, h, w], c = 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        OptionError: it is not an image, or is broken, cut off, empty or too large; the file is named.
        MissingDependencyError: Pillow is not installed, or the plugin that a HEIC file needs.
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
    """A file or bytes as a PIL image that is not decoded yet, of at most `max_pixels`, of WebP half as many; a context
    manager.

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
        formats = (*FORMATS, *_plugin(opened))
        with _UNWARNED:
            image = pil.open(opened, formats=formats)
    try:
        check_pixels(image.width, image.height, name, max(1, max_pixels // COSTLY.get(str(image.format), 1)))
    except OptionError:
        image.close()
        raise
    return image


class _Unwarned:
    """A context in which Pillow does not warn of sizes: its own limit, of the whole process, is below what ours allows.

    What warnings are shown is a setting of the whole process too: the first thread that comes changes it, and the last
    one that goes sets it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._settings = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._settings = warnings.catch_warnings()
                self._settings.__enter__()
                warnings.simplefilter("ignore", import_pillow().DecompressionBombWarning)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._settings.__exit__(None, None, None)


_UNWARNED = _Unwarned()


def _plugin(opened: Any) -> tuple[str, ...]:
    """Load what a HEIC or AVIF file needs; () if the file is another -> the formats to look for.

    Raises:
        MissingDependencyError: there is no such plugin.
    """
    if isinstance(opened, BytesIO):
        start = opened.getvalue()[:SNIFFED]
    else:
        with open_regular(opened) as file:
            start = file.read(SNIFFED)
    size = int.from_bytes(start[:4], "big")
    brand = BRANDS.match(start[: min(max(size, 12), SNIFFED)])
    if brand is None:
        return ()
    kind = "AVIF" if brand[1].startswith(b"avi") else "HEIF"
    from PIL import features

    if kind == "AVIF" and features.check("avif"):
        return ()
    module, package = PLUGINS[kind]
    try:
        plugin = importlib.import_module(module)
    except ImportError as error:
        if kind == "HEIF":
            raise missing("reading HEIC images", package, "heic") from error
        raise MissingDependencyError(
            f"reading AVIF images needs Pillow from PyPI, or the Python package {package}; install it with: "
            f"pip install {package}"
        ) from error
    if kind == "HEIF":
        plugin.register_heif_opener()
    return (kind,)


def check_file(source: "str | os.PathLike[str]") -> Path:
    """The path of a file that exists, can be read and is not empty.

    Raises:
        OptionError: it is a URL, or there is no such file, or it is empty or cannot be read.
    """
    path = Path(source)
    try:
        with open_regular(path) as file:
            if not file.read(1):
                raise OptionError(f"{path} is empty")
    except OSError as error:
        if URL.match(str(source)):  # a path has lost one of its slashes
            text = re.sub(r"\A([a-z0-9+.-]+:)/+", r"\1//", str(source), flags=re.IGNORECASE)
            raise OptionError(
                f"{shorten(text)} is a URL, and none is fetched; download it and give the file's path"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise OptionError(f"{path} does not exist") from None
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
        upright: turn it as its EXIF tag says. The image itself may be closed then, so that two of it are never held.

    Raises:
        OptionError: it is empty, or its file cannot be decoded, or nothing says which of its values is white.
    """
    check_pixels(image.width, image.height, name, sys.maxsize)
    with explained(name):
        with _UNWARNED:  # files of several strips are looked at again
            image.load()
        turns = _turns(image) if upright else None
        levels = _levels(image, name)
        found = image
        if levels is not None or image.mode != "RGB" or image.info.get("transparency") is not None:
            found = _convert(image, levels)
            if upright:
                image.close()
        return found if turns is None else found.transpose(turns)


# What Pillow's `exif_transpose` does for each value of the EXIF tag.
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


def _turns(image: "Image") -> Any:
    """How the image is turned upright, as its EXIF tag says; None where it is, or where the tag is damaged."""
    from PIL import ExifTags

    try:
        name = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag does not make the image unusable
        return None
    return None if name is None else import_pillow().Transpose[name]


def _levels(image: "Image", name: str) -> tuple[int, bool] | None:
    """Of grey of more than 8 bits: the value of white, and whether it is the other way round, white at 0; else None.

    Pillow, and with it the reference, makes all above 255 white: of a picture of 16 bits nothing is left.

    Raises:
        OptionError: nothing says what the values mean.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if image.mode.startswith("I;16"):
        return (1 << min(int(_first(tags.get(TIFF_BITS), 16)), 16)) - 1, _first(tags.get(TIFF_PHOTOMETRIC), 1) == 0
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65_535, False
    if image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise OptionError(f"{name} holds {kind}, and nothing says which of them is white; convert it to 8 or 16 bits")
    return None


TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262


def _first(value: Any, default: int) -> Any:
    return default if value is None else value[0] if isinstance(value, tuple) else value


def _convert(image: "Image", levels: tuple[int, bool] | None) -> "Image":
    """The image in RGB, made in strips, so that a large image is held twice at most, not four times."""
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return _convert_whole(image, levels)
    result: Image = import_pillow().new("RGB", image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        result.paste(_convert_whole(image.crop(box), levels), box[:2])
    return result


def _convert_whole(image: "Image", levels: tuple[int, bool] | None) -> "Image":
    if levels is not None:
        return _convert_grey(image, *levels)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    pil = import_pillow()
    white = pil.new("RGBA", image.size, (255, 255, 255, 255))
    flat: Image = pil.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return flat


def _convert_grey(image: "Image", white: int, inverted: bool) -> "Image":
    """Grey of up to 16 bits at 8, each value rounded to the nearest; a transparent value becomes white."""
    values = np.asarray(image).astype(np.uint32)
    scaled = (np.minimum(values, white) * 255 + white // 2) // white
    if inverted:
        scaled = 255 - scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    grey: Image = import_pillow().fromarray(scaled.astype(np.uint8))
    return grey.convert("RGB")


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what Pillow raises while it reads the image `name` into an OptionError; each decoder has its own errors."""
    pil = import_pillow()
    try:
        yield
    except TrimKVError:
        raise
    except pil.UnidentifiedImageError as error:
        raise OptionError(f"{name} is not an image of a known format ({', '.join(FORMATS)}, HEIC)") from error
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:  # warnings may be errors
        raise OptionError(f"{name} is too large: {str(error).rstrip('.')}") from error
    except MemoryError as error:
        raise OptionError(f"{name} is too large for the memory of this machine") from error
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise OptionError(f"{name} cannot be read as an image: {reason}; it may be damaged or incomplete") from error
