"""Where the frames of a video come from: a folder, an animated image, images in memory, or a video file (PyAV).

Frames are read one at a time, so a video of any length takes the memory of one frame here, and 8 bytes for each frame
that it has: when it is shown. Times are read from the file without decoding; then what is decoded is decoded once, and
no further than the last frame that is wanted.
"""

import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from trimkv_export.errors import OptionError, missing
from trimkv_export.files import open_regular
from trimkv_export.vision.animations import frame_times
from trimkv_export.vision.image_files import (
    MAX_IMAGE_PIXELS,
    ImageSource,
    check_file,
    check_pixels,
    describe,
    explained,
    import_pillow,
    open_file,
    open_image,
    to_rgb,
)
from trimkv_export.vision.video_index import read_index

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Frames", "VideoSource", "open_video"]

VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | Sequence[ImageSource] | npt.NDArray[np.uint8]"

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Containers that hold their own frames: FFmpeg also reads playlists, which would make it open other files.
DEMUXERS = "asf,avi,flv,matroska,mov,mp4,mpeg,mpegts,mpegvideo,ogg,webm"
MOST_LOST = 0.1  # of the frames, which damage may take; a video that lost more is refused
# A frame of a video file may have this part of an image's pixels: its decoder holds several. Measured (PyAV 18.1, 4K
# video of H.264, HEVC, VP9 and AV1): 34 to 44 bytes a pixel.
FRAME_SHARE = 4
DECODER_THREADS = 4  # some decoders hold a frame for each
MAX_ANIMATION_PIXELS = 1 << 30  # of all frames: 500 of 1,920 x 1,080
ROUNDED_PIXELS = 1 << 20
DEFAULT_FRAME_MS = 100  # of a frame that an animation gives no time, as browsers do


class Frames(ABC):
    """A video.

    Attributes:
        name: for messages.
        count: how many frames it has.
        fps: frames per second, on average; None where nothing says it.
        seconds: [count], when each is shown, from the first on, where they do not come evenly; else None.
        pixels: of all its frames, which may have to be decoded; 0 where they lie in memory or in files of their own.
        between: called before each frame that is decoded; what it raises ends the reading.
        lost: frames that were wanted, or stood before them, and could not be decoded; known once they were read.
    """

    name: str
    count: int
    fps: float | None
    seconds: npt.NDArray[np.float64] | None = None
    pixels: int = 0
    between: Callable[[], None] = staticmethod(lambda: None)
    lost: int = 0

    @abstractmethod
    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        """The RGB frames with these numbers, which never go down. Of a lost frame, the one before it.

        Raises:
            OptionError: a frame is broken, and of a video file, more than a tenth of them.
        """


def open_video(source: VideoSource, max_pixels: int = MAX_IMAGE_PIXELS) -> Frames:
    """Find out what a video is; no frame is kept.

    Args:
        source: a folder of image files, in the order of their names with numbers by value (frame2 before frame10); the
            path or bytes of an animated GIF, WebP, AVIF or APNG file, of a TIFF file of several pages, or of a video
            file (mp4, mkv, webm, avi, …: needs the extra `video`); a list of images; an array uint8 [t, h, w, c] or
            [t, c, h, w].
        max_pixels: the most pixels of a frame.

    Raises:
        OptionError: it is not a video, or its frames are too large.
        MissingDependencyError: Pillow is not installed, or PyAV, which video files need.
    """
    if isinstance(source, np.ndarray) or (isinstance(source, Sequence) and not isinstance(source, str | bytes)):
        name = describe(source) if isinstance(source, np.ndarray) else "the list of images"
        return _Listed(list(source), name, max_pixels)
    if isinstance(source, bytes):
        name = describe(source, "video")
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if Path(source).is_dir():
            return _Listed(_files(Path(source)), name, max_pixels)
    else:
        raise OptionError(f"a video must be a path, bytes, a list of images or an array, got {type(source).__name__}")
    pil = import_pillow()
    try:
        with open_file(source, max_pixels) as image:
            return _Animated(source, name, image, max_pixels)
    except OptionError as error:
        if not isinstance(error.__cause__, pil.UnidentifiedImageError):
            raise
    return _Encoded(source, name, max_pixels)


def _open(source: "str | os.PathLike[str] | bytes") -> AbstractContextManager[BinaryIO]:
    return BytesIO(source) if isinstance(source, bytes) else open_regular(Path(source))


class _Listed(Frames):
    """Images one by one."""

    def __init__(self, images: list[ImageSource], name: str, max_pixels: int) -> None:
        self.name, self.count, self.fps = name, len(images), None
        self._images, self._max_pixels = images, max_pixels

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        for index in indices:
            self.between()
            yield open_image(self._images[index], max_pixels=self._max_pixels)


def _files(folder: Path) -> list[ImageSource]:
    try:
        found = list(folder.iterdir())
    except OSError as error:
        raise OptionError(f"{folder} cannot be read: {error.strerror or error}") from error
    paths = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not paths:
        raise OptionError(f"{folder} has no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def by_number(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]

    return [*sorted(paths, key=lambda path: (by_number(path), path.name))]


class _Animated(Frames):
    """A file of several frames that Pillow reads."""

    def __init__(self, source: Any, name: str, image: Any, max_pixels: int) -> None:
        self._source, self._max_pixels = source, max_pixels
        self.name, self.fps = name, None
        # The first image of an APNG may be a stand-in for programs that show no animation.
        self._first = 1 if image.info.get("default_image") else 0
        with explained(name):
            self.count = getattr(image, "n_frames", 1) - self._first
            self.pixels = self.count * image.width * image.height
            if self.pixels > MAX_ANIMATION_PIXELS:
                raise OptionError(
                    f"{name} has {self.count:,} frames of {image.width} x {image.height} pixels, and at most "
                    f"{MAX_ANIMATION_PIXELS:,} pixels in all are taken; shorten it or scale it down"
                )
        self._find_times()

    def _find_times(self) -> None:
        with _open(self._source) as file:
            found = frame_times(file, self.count)
        if all(each is None for each in found):
            return
        shown = np.full(self.count, DEFAULT_FRAME_MS, np.float64)
        for place, each in enumerate(found):
            shown[place] = each or DEFAULT_FRAME_MS
        self.fps = self.count / (float(shown.sum()) / 1000)
        if (shown != shown[0]).any():
            self.seconds = np.concatenate([[0.0], np.cumsum(shown[:-1]) / 1000])

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        with open_file(self._source, self._max_pixels) as image:
            at = -1
            for index in indices:
                for at in range(at + 1, index + 1):  # each is drawn over the one before it  # noqa: B020
                    self.between()
                    with explained(self.name):
                        image.seek(self._first + at)
                with explained(self.name):
                    # A copy, since the next frame is drawn into the same image.
                    frame = to_rgb(image, self.name).copy()
                yield frame


class _Encoded(Frames):
    """A video file."""

    def __init__(self, source: Any, name: str, max_pixels: int) -> None:
        self._source, self.name = source, name
        self._max_pixels = max(1, max_pixels // FRAME_SHARE)
        if not isinstance(source, bytes):
            check_file(source)
        with self._stream() as (container, stream, broken):
            check_pixels(stream.width, stream.height, f"a frame of {name}", self._max_pixels)
            pixels = stream.width * stream.height
            index = read_index(container.demux(stream), stream, name, broken)
        self._index, self.lost = index, index.missing
        self._refuse(index.missing, index.count + index.missing, "the file is cut off")
        self.count, self.fps = index.count, index.fps
        self.pixels = index.count * pixels
        self.seconds = None if index.even else index.seconds

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        wanted, end = deque(indices), max(indices, default=-1) + 1
        shown, at, found, failed = None, -1, 0, 0
        with self._stream() as (container, stream, broken):
            decoder = _Decoder(container, stream, broken)
            for frame in decoder:
                self.between()
                # Where frames can only be counted, one that fails still counts.
                place = self._place(frame, at + 1 + decoder.failures - failed)
                failed = decoder.failures
                if place <= at:  # it is none of those that the packets announced
                    continue
                at, found = place, found + 1
                while wanted and wanted[0] < at:  # lost: as in a player, the frame before it stays
                    wanted.popleft()
                    yield _to_image(frame if shown is None else shown)
                shown = frame
                while wanted and wanted[0] == at:
                    wanted.popleft()
                    yield _to_image(frame)
                if not wanted:
                    break
            # A field of a frame may have a packet of its own; so without damage only those at the end are missing.
            lost = end - found if decoder.failures else end - 1 - at
            self._refuse(lost, end, decoder.reason)
            self.lost = self._index.missing + max(0, lost)
            for _ in wanted:
                yield _to_image(shown)

    def _place(self, frame: Any, counted: int) -> int:
        """The number of a frame, by its time, or else as counted."""
        stamps = self._index.stamps
        if stamps is None or frame.pts is None:
            return counted
        return int(np.searchsorted(stamps, frame.pts, "right")) - 1

    def _refuse(self, lost: int, count: int, reason: str) -> None:
        if lost > MOST_LOST * count:
            raise OptionError(
                f"{self.name} is damaged or incomplete: {lost:,} of {count:,} frames cannot be decoded ({reason}), and "
                f"at most {MOST_LOST:.0%} may be missing; copy it again"
            )

    @contextmanager
    def _stream(self) -> Iterator[tuple[Any, Any, type[Exception]]]:
        """The opened container, its first video stream, and what PyAV raises where something is damaged."""
        try:
            import av
        except ImportError as error:
            what = f"{self.name} is not an image that Pillow reads, and reading it as a video"
            raise missing(what, "av (PyAV)", "video") from error
        try:
            # FFmpeg gets the open file and not its name, which it would take for a URL where it looks like one.
            with ExitStack() as stack:
                opened = stack.enter_context(_open(self._source))
                # Tags are written in any encoding; nothing here reads them.
                options = {"format_whitelist": DEMUXERS}
                container = stack.enter_context(av.open(opened, options=options, metadata_errors="replace"))
                if not container.streams.video:
                    raise OptionError(f"{self.name} has no video stream")
                # Not the first: that may be the picture of a cover.
                stream = container.streams.best("video") or container.streams.video[0]
                if stream.codec_context is None:
                    raise OptionError(
                        f"{self.name} is encoded in a way that this FFmpeg does not know, or its header is incomplete; "
                        "convert it, or copy it again"
                    )
                # Frames may become larger than the header says; the sides are rounded up to blocks.
                stream.codec_context.options = {"max_pixels": str(self._max_pixels + ROUNDED_PIXELS)}
                stream.codec_context.thread_count = DECODER_THREADS
                yield container, stream, av.error.FFmpegError
        except MemoryError as error:  # av.error.MemoryError too
            raise OptionError(f"{self.name} is too large for the memory of this machine") from error
        except av.error.ArgumentError as error:  # of the whitelist
            raise OptionError(
                f"{self.name} is of a format that is not read; those that are: {DEMUXERS.replace(',', ', ')}; convert "
                "it, to mp4 for example"
            ) from error
        except av.error.FFmpegError as error:
            raise OptionError(
                f"{self.name} cannot be read as a video or image: {error.strerror or error}; it may be damaged, "
                "incomplete, or of an unknown format"
            ) from error


class _Decoder:
    """The frames of a stream, in the order in which they are shown, without those that cannot be decoded.

    Attributes:
        failures: packets that it could not decode so far.
        reason: what it said of the first of them.
    """

    def __init__(self, container: Any, stream: Any, broken: type[Exception]) -> None:
        self._container, self._stream, self._broken = container, stream, broken
        self.failures, self.reason = 0, "the file is damaged"

    def __iter__(self) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except MemoryError:
                raise
            except self._broken:  # where the index ended too
                packet = None
            yield from self._decode(packet)
            if packet is None:
                return

    def _decode(self, packet: Any) -> list[Any]:
        try:
            found: list[Any] = self._stream.codec_context.decode(packet)
        except EOFError:  # it was told of the end already
            return []
        except MemoryError:
            raise
        except self._broken as error:
            if not self.failures:
                self.reason = str(getattr(error, "strerror", None) or error)
            self.failures += 1
            return []
        return found


def _to_image(frame: Any) -> "Image":
    """An upright RGB image of a decoded frame; phones write videos turned or mirrored, with a note of how."""
    rgb = frame.reformat(format="rgb24")
    plane = rgb.planes[0]
    size = frame.width, frame.height
    pil = import_pillow()
    image: Image = pil.frombytes("RGB", size, memoryview(plane), "raw", "RGB", plane.line_size, 1)
    del rgb, plane
    for transpose in _turns(frame):
        image = image.transpose(pil.Transpose[transpose])
    return image


def _turns(frame: Any) -> list[str]:
    """How an image is made upright: Pillow's names of what is done to it, one after the other.

    A display matrix takes a pixel at (x, y) to (a·x + c·y, b·x + d·y), but for what moves it; angles between quarter
    turns, which no camera writes, count as the nearest of them.
    """
    for each in frame.side_data:
        if each.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(each), np.int32)[:5].tolist()
            if abs(b) + abs(c) > abs(a) + abs(d):
                turns, across, down = ["TRANSPOSE"], c, b
            else:
                turns, across, down = [], a, d
            return turns + ["FLIP_LEFT_RIGHT"] * (across < 0) + ["FLIP_TOP_BOTTOM"] * (down < 0)
    return []
