"""Image files of every mode against transformers' conversion to RGB; broken files; EXIF; what Pillow must not do."""

import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pictures import picture
from PIL import ExifTags, Image, ImageFile, ImageOps
from transformers.image_transforms import convert_to_rgb

from trimkv_export.errors import MissingDependencyError, OptionError
from trimkv_export.vision import image_files
from trimkv_export.vision.image_files import check_pixels, open_image
from trimkv_export.vision.images import process_image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgba(height: int = 60, width: int = 70) -> Image.Image:
    return Image.fromarray(np.concatenate([picture(height, width), picture(height, width, seed=1)[..., :1]], 2))


def palette(transparency: bytes | int | None) -> Image.Image:
    image = Image.fromarray(picture(60, 70)).quantize(200)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def with_transparent_colour(mode: str, colour: Any) -> Image.Image:
    image = Image.fromarray(picture(60, 70, "edges")).convert(mode)
    image.info["transparency"] = colour
    return image


IMAGES: dict[str, Callable[[], Image.Image]] = {
    "RGB": lambda: Image.fromarray(picture(60, 70)),
    "RGB, transparent colour": lambda: with_transparent_colour("RGB", (255, 0, 255)),
    "L": lambda: Image.fromarray(picture(60, 70)[..., 0]),
    "L, transparent grey": lambda: with_transparent_colour("L", 0),
    "LA": lambda: rgba().convert("LA"),
    "RGBA": rgba,
    "RGBa": lambda: rgba().convert("RGBa"),
    "P": lambda: palette(None),
    "P, one transparent colour": lambda: palette(7),
    "P, alpha per colour": lambda: palette(bytes(range(200))),
    "PA": lambda: rgba().convert("PA"),
    "CMYK": lambda: Image.fromarray(picture(60, 70)).convert("CMYK"),
    "YCbCr": lambda: Image.fromarray(picture(60, 70)).convert("YCbCr"),
    "LAB": lambda: Image.frombytes("LAB", (70, 60), picture(60, 70).tobytes()),
    "HSV": lambda: Image.fromarray(picture(60, 70)).convert("HSV"),
    "1": lambda: Image.fromarray(picture(60, 70)[..., 0] > 100),
}


@pytest.mark.parametrize("strip", [1 << 20, 70 * 7])
@pytest.mark.parametrize("name", IMAGES)
def test_modes_as_in_the_reference(name: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "STRIP_PIXELS", strip)
    got = open_image(IMAGES[name]())
    assert got.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(got), convert_to_rgb(IMAGES[name](), return_numpy=True))


FILES: dict[str, Callable[[], bytes]] = {
    "grey.png": lambda: encoded(IMAGES["L"]()),
    "one.png": lambda: encoded(IMAGES["1"]()),
    "alpha.png": lambda: encoded(rgba()),
    "grey_alpha.png": lambda: encoded(IMAGES["LA"]()),
    "palette.png": lambda: encoded(palette(None), transparency=bytes(range(200))),
    "colour_key.png": lambda: encoded(IMAGES["RGB"](), transparency=(1, 2, 3)),
    "grey.jpg": lambda: encoded(IMAGES["L"](), "JPEG"),
    "colour.jpg": lambda: encoded(IMAGES["RGB"](), "JPEG"),
    "cmyk.jpg": lambda: encoded(IMAGES["CMYK"](), "JPEG"),
    "one.gif": lambda: encoded(palette(3), "GIF", transparency=3),
    "several.gif": lambda: encoded(palette(None), "GIF", save_all=True, append_images=[IMAGES["L"]()]),
    "alpha.webp": lambda: encoded(rgba(), "WEBP", lossless=True),
    "colour.bmp": lambda: encoded(IMAGES["RGB"](), "BMP"),
    "cmyk.tiff": lambda: encoded(IMAGES["CMYK"](), "TIFF"),
    "colour.ppm": lambda: encoded(IMAGES["RGB"](), "PPM"),
    "two.mpo": lambda: encoded(IMAGES["RGB"](), "MPO", save_all=True, append_images=[IMAGES["RGB"]()]),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    content = FILES[name]()
    path = tmp_path / name
    path.write_bytes(content)
    with Image.open(BytesIO(content)) as image:
        want = convert_to_rgb(image, return_numpy=True)
    for source in (path, str(path), content):
        np.testing.assert_array_equal(np.asarray(open_image(source)), want)


@pytest.mark.parametrize("orientation", range(10))
def test_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "turned.jpg"
    path.write_bytes(encoded(Image.fromarray(picture(40, 90, "gradient")), "JPEG", exif=exif))
    with Image.open(path) as image:
        as_stored = np.asarray(image)
        upright = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(np.asarray(open_image(image)), as_stored)
    np.testing.assert_array_equal(np.asarray(open_image(path)), upright)
    np.testing.assert_array_equal(np.asarray(open_image(path.read_bytes())), upright)
    assert (as_stored.shape != upright.shape) == (orientation in (5, 6, 7, 8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("tags", [b"II*\0\xff\xff\xff\xff\x12\x01", b"no tags at all"])
def test_damaged_exif_tags_are_ignored(tags: bytes) -> None:
    content = encoded(Image.fromarray(picture(40, 90)), "JPEG", exif=b"Exif\0\0" + tags)
    assert open_image(content).size == (90, 40)


def test_arrays() -> None:
    pixels = picture(60, 70)
    for array in (pixels, np.moveaxis(pixels, -1, 0), np.flip(np.flip(pixels, 0), 0)):
        np.testing.assert_array_equal(np.asarray(open_image(array)), pixels)
    grey = np.repeat(pixels[..., :1], 3, 2)
    for array in (pixels[..., 0], pixels[..., :1], pixels[None, ..., 0]):
        np.testing.assert_array_equal(np.asarray(open_image(array)), grey)
    alpha = np.asarray(rgba())
    want = convert_to_rgb(alpha, return_numpy=True, input_data_format="channels_last").astype(int)
    assert np.abs(np.asarray(open_image(alpha)) - want).max() <= 1  # the reference rounds arrays otherwise than images


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 5, 3), np.float32), r"shape \(5, 5, 3\) must hold uint8 values .* float32"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \(5, 5, 2\) must be \[height, width\]"),
        (np.zeros((2, 5, 5, 3), np.uint8), r"must be \[height, width\]"),
        (np.zeros(5, np.uint8), r"must be \[height, width\]"),
        (np.zeros((0, 5, 3), np.uint8), "is empty"),
    ],
)
def test_bad_arrays(array: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        open_image(array)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file that is all header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(200) + content[middle + 200 :]


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "is empty"),
    "text.jpg": (lambda: b"no image at all" * 50, "not an image of a known format"),
    "cut.png": (lambda: FILES["alpha.png"]()[:2000], "cannot be read as an image"),
    "cut.jpg": (lambda: FILES["colour.jpg"]()[:2000], "cannot be read as an image: .*truncated"),
    "cut_early.jpg": (lambda: FILES["colour.jpg"]()[:30], "damaged|not an image of a known format"),
    "cut.gif": (lambda: FILES["one.gif"]()[:2000], "cannot be read as an image"),
    "cut.webp": (lambda: FILES["alpha.webp"]()[:2000], "cannot be read as an image|not an image of a known"),
    "cut.bmp": (lambda: FILES["colour.bmp"]()[:2000], "cannot be read as an image: .*truncated"),
    "damaged.png": (lambda: damaged(FILES["alpha.png"]()), "cannot be read as an image"),
    "bomb.png": (lambda: png_of_size(60_000, 60_000), r"too large: .*3600000000 pixels"),
    "warned.png": (
        lambda: png_of_size(10_000, 9_000),
        r"too large: 10000 x 9000 pixels, and at most 67,108,864 are taken",
    ),
    "nothing.png": (lambda: png_of_size(0, 7), "is empty|cannot be read|known format"),
    "script.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "known format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, tmp_path: Path) -> None:
    make, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(OptionError, match=message) as caught:
        process_image(path)
    assert str(path) in str(caught.value)
    with pytest.raises(OptionError, match=f"in {len(make())} bytes"):
        process_image(make())


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.png does not exist"):
        process_image(tmp_path / "none.png")
    with pytest.raises(OptionError, match=f"{tmp_path} cannot be read"):
        process_image(tmp_path)
    for url in ("https://example.org/a.png", Path("https://example.org/a.png")):  # a path loses one of the slashes
        with pytest.raises(OptionError, match=r"'https://example\.org/a\.png' is a URL, and none is fetched; download"):
            process_image(url)
    for url in ("s3://bucket/a.png", Path("file:///tmp/none.png"), "data:image/png;base64,AAAA", "HTTP://a/b.png"):
        with pytest.raises(OptionError, match="is a URL, and none is fetched"):
            process_image(url)
    with pytest.raises(OptionError, match=r"must be a path, bytes, .* got dict"):
        process_image({"path": "a.png"})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="the image is empty: 0 x 5"):
        process_image(Image.new("RGB", (0, 5)))


def test_a_broken_pil_image(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(FILES["colour.jpg"]()[:2000])
    with Image.open(path) as image, pytest.raises(OptionError, match=r"cut\.jpg cannot be read .*truncated"):
        open_image(image)


# Grey of more than 8 bits. Pillow, and the reference with it, makes all above 255 white.


def grey16() -> np.ndarray[Any, np.dtype[np.uint16]]:
    """All values, in rows."""
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


def expected(values: Any, white: int) -> Any:
    return np.round(np.asarray(values, np.float64) * 255 / white).astype(np.uint8)


def tiff(values: Any, *, bits: int, inverted: bool = False) -> bytes:
    """A TIFF file of one strip of 16 bits a value, made by hand."""
    height, width = values.shape
    data: bytes = values.astype("<u2").tobytes()
    tags = [
        (256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if inverted else 1), (273, 4, 8),
        (277, 3, 1), (278, 4, height), (279, 4, len(data)),
    ]  # fmt: skip
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table + bytes(4)


@pytest.mark.parametrize("strip", [1 << 20, 256 * 7])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "array"])
def test_grey_of_16_bits_is_scaled(kind: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "STRIP_PIXELS", strip)
    image = Image.fromarray(grey16())
    if kind == "PPM":
        source: Any = b"P5 256 256 65535\n" + grey16().astype(">u2").tobytes()
    else:
        source = image if kind == "array" else encoded(image, kind)
    got = np.asarray(open_image(source))
    np.testing.assert_array_equal(got, expected(grey16(), 65535)[..., None].repeat(3, 2))
    # What was made from 8 bits comes back as it was.
    eight = np.asarray(open_image(Image.fromarray(np.arange(256, dtype=np.uint16)[None] * 257)))
    np.testing.assert_array_equal(eight[0, :, 0], np.arange(256))


def test_big_endian_grey_white_at_zero_and_transparency() -> None:
    big = Image.frombytes("I;16B", (256, 256), grey16().astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(open_image(big))[..., 0], expected(grey16(), 65535))
    got = np.asarray(open_image(tiff(grey16(), bits=16, inverted=True)))[..., 0]
    np.testing.assert_array_equal(got, 255 - expected(grey16(), 65535))
    np.testing.assert_array_equal(np.asarray(open_image(tiff(grey16(), bits=16)))[..., 0], expected(grey16(), 65535))
    clear = encoded(Image.fromarray(grey16()), transparency=300)
    got = np.asarray(open_image(clear))[..., 0]
    assert (got[1, 44], got[1, 43], got[1, 45]) == (255, 1, 1)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_without_a_known_white_is_refused(dtype: Any, tmp_path: Path) -> None:
    image = Image.fromarray(picture(60, 70)[..., 0].astype(dtype))
    image.save(tmp_path / "depth.tiff")
    for source in (image, tmp_path / "depth.tiff"):
        with pytest.raises(OptionError, match="nothing says which of them is white; convert it to 8 or 16 bits"):
            open_image(source)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16"])
def test_turned_and_converted(orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    flat = Image.fromarray(grey16()) if mode == "I;16" else rgba().convert(mode)
    got = open_image(encoded(flat, exif=exif))
    assert np.array_equal(
        np.asarray(got), np.asarray(ImageOps.exif_transpose(_tagged(open_image(encoded(flat)), exif)))
    )


def _tagged(image: Image.Image, exif: Image.Exif) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return Image.open(buffer)


# HEIC, which Pillow reads with a plugin.

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


class Heif(ImageFile.ImageFile):
    """Stands for the plugin's: the size is all that it reads."""

    format = "HEIF"

    def _open(self) -> None:
        self._size, self._mode = (40, 30), "RGB"

    def load(self) -> Any:
        self.im = Image.new("RGB", self.size, (9, 8, 7)).im
        return Image.Image.load(self)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_heic_is_read_where_its_plugin_is(brand: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(HEIC.replace(b"heic", brand))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for source in (path, path.read_bytes()):
        with pytest.raises(
            MissingDependencyError, match=r"HEIC images needs the Python package pillow-heif; .*\[heic\]"
        ):
            open_image(source)

    def register() -> None:
        Image.register_open("HEIF", Heif, lambda start: start[4:8] == b"ftyp")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    for source in (path, path.read_bytes()):
        image = open_image(source)
        assert (image.size, image.getpixel((0, 0))) == ((40, 30), (9, 8, 7))
    with pytest.raises(OptionError, match="40 x 30 pixels, and at most 1,199"):
        open_image(path, max_pixels=1199)


def test_avif_needs_no_plugin_where_pillow_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("RGB", (64, 48), (200, 10, 10)), "AVIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert open_image(content).size == (64, 48)
    monkeypatch.setattr("PIL.features.check", lambda _: False)
    monkeypatch.setitem(sys.modules, "pillow_avif", None)
    with pytest.raises(
        MissingDependencyError, match="AVIF images needs Pillow from PyPI, or the Python package pillow-avif-plugin"
    ):
        open_image(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP"])
def test_pillow_warns_of_no_size_that_is_taken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit of the whole process stays as it is, and so do the settings of warnings."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    content = encoded(Image.new("P" if kind == "GIF" else "RGB", (40, 30)), kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            assert {image.size for image in pool.map(open_image, [content] * 40)} == {(40, 30)}
        assert warnings.filters == before
    assert caught == []


def test_a_webp_may_have_half_the_pixels() -> None:
    """Its decoder takes four times as much memory a pixel as most."""
    content = encoded(Image.new("RGB", (40, 30)), "WEBP")
    assert open_image(content, max_pixels=2400).size == (40, 30)
    with pytest.raises(OptionError, match="40 x 30 pixels, and at most 1,199 are taken"):
        open_image(content, max_pixels=2399)


def test_no_copy_of_an_rgb_image() -> None:
    image = IMAGES["RGB"]()
    assert open_image(image) is image


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image", raising=False)
    with pytest.raises(MissingDependencyError, match=r"Pillow; install it with: pip install 'trimkv-export\[vision\]'"):
        process_image(picture(40, 40))


def test_the_limit_on_pixels(tmp_path: Path) -> None:
    """By the header: nothing is decoded, so what follows the header need not be a picture."""
    (tmp_path / "wide.png").write_bytes(png_of_size(13_300, 13_300))
    with pytest.raises(OptionError, match=r"wide\.png is too large: 13300 x 13300 pixels, and at most 67,108,864"):
        open_image(tmp_path / "wide.png")
    small = Image.new("RGB", (40, 30))
    for source in (small, encoded(small)):
        assert open_image(source, max_pixels=1200).size == (40, 30)
        with pytest.raises(OptionError, match="40 x 30 pixels, and at most 1,199 are taken"):
            open_image(source, max_pixels=1199)
    check_pixels(8192, 8192)
    with pytest.raises(OptionError, match="the image is too large: 8193 x 8192"):
        check_pixels(8193, 8192)
    with pytest.raises(OptionError, match="is empty"):
        check_pixels(0, 8192)


def test_jpeg_2000_is_not_read() -> None:
    """Its decoder takes 3 GB for 2 kB."""
    with pytest.raises(OptionError, match="is not an image of a known format"):
        open_image(encoded(Image.new("RGB", (8, 8)), "JPEG2000"))


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OptionError, match="cannot be read: it is not an ordinary file"):
        open_image(tmp_path / "pipe.png")
