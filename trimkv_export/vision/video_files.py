"""Where the frames of a video come from: a folder, an animated image, images in memory, or a video file (PyAV).

Frames are read one at a time, so a video of any length takes the memory of one frame here.
"""

import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trimkv_export.errors import OptionError, missing
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

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Frames", "VideoSource", "open_video"]

VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | Sequence[ImageSource] | npt.NDArray[np.uint8]"

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Containers that hold their own frames: FFmpeg also reads playlists, which would make it open other files.
DEMUXERS = "asf,avi,flv,matroska,mov,mp4,mpeg,mpegts,mpegvideo,ogg,webm"
MIN_SHARE = 0.9  # of the frames that a header counts; a video with fewer was cut off
MAX_ANIMATION_PIXELS = 1 << 30  # of all frames: 500 of 1,920 x 1,080
DEFAULT_FRAME_MS = 100  # of a frame that an animation gives no time, as browsers do


class Frames(ABC):
    """A video.

    Attributes:
        name: for messages.
        count: how many frames it has.
        fps: frames per second; None where nothing says it.
    """

    name: str
    count: int
    fps: float | None

    @abstractmethod
    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        """The RGB frames with these numbers, which never go down.

        Raises:
            OptionError: a frame is broken.
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
        name = f"the video in {len(source)} bytes"
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


class _Listed(Frames):
    """Images one by one."""

    def __init__(self, images: list[ImageSource], name: str, max_pixels: int) -> None:
        self.name, self.count, self.fps = name, len(images), None
        self._images, self._max_pixels = images, max_pixels

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        for index in indices:
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
    """A file of several frames that Pillow reads. The rate is the average, as the reference's decoders say it."""

    def __init__(self, source: Any, name: str, image: Any, max_pixels: int) -> None:
        self._source, self._max_pixels = source, max_pixels
        self.name = name
        # The first image of an APNG may be a stand-in for programs that show no animation.
        self._first = 1 if image.info.get("default_image") else 0
        with explained(name):
            self.count = getattr(image, "n_frames", 1) - self._first
            if self.count * image.width * image.height > MAX_ANIMATION_PIXELS:
                raise OptionError(
                    f"{name} has {self.count:,} frames of {image.width} x {image.height} pixels, and at most "
                    f"{MAX_ANIMATION_PIXELS:,} pixels in all are taken; shorten it or scale it down"
                )

    @functools.cached_property
    def fps(self) -> float | None:  # type: ignore[override] # read when it is asked for, since it takes time
        """Frames per second; for it every frame is decoded, one at a time."""
        total = 0.0
        known = False
        with open_file(self._source, self._max_pixels) as image, explained(self.name):
            for index in range(self.count):
                image.seek(self._first + index)
                image.load()  # WebP and AVIF know a frame's time once it is decoded
                duration = image.info.get("duration")
                known = known or duration is not None
                total += duration or DEFAULT_FRAME_MS
        return self.count / (total / 1000) if known else None

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        with open_file(self._source, self._max_pixels) as image:
            for index in indices:
                with explained(self.name):
                    image.seek(self._first + index)
                    # A copy, since the next frame is drawn into the same image.
                    frame = to_rgb(image, self.name).copy()
                yield frame


class _Encoded(Frames):
    """A video file. The rate is the average, and frames are counted, not timed, as the reference does."""

    def __init__(self, source: Any, name: str, max_pixels: int) -> None:
        self._source = source
        self.name = name
        if not isinstance(source, bytes):
            check_file(source)
        with self._stream() as (container, stream):
            check_pixels(stream.width, stream.height, name, max_pixels)
            rate = stream.average_rate
            self.fps = float(rate) if rate else None
            # Not every format says how many frames there are.
            self.count = stream.frames or sum(1 for _ in container.decode(stream))

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        wanted = list(reversed(indices))
        decoded, frame = 0, None
        with self._stream() as (container, stream):
            for frame in container.decode(stream):
                while wanted and wanted[-1] <= decoded:
                    wanted.pop()
                    yield _to_image(frame)
                if not wanted:
                    return
                decoded += 1
        # A header may count frames that an edit list hides; the last one is given in their place.
        if frame is None or decoded < MIN_SHARE * self.count:
            raise OptionError(
                f"{self.name} is incomplete: its header says {self.count} frames, and {decoded} could be read"
            )
        for _ in wanted:
            yield _to_image(frame)

    @contextmanager
    def _stream(self) -> Iterator[tuple[Any, Any]]:
        try:
            import av
        except ImportError as error:
            what = f"{self.name} is not an image that Pillow reads, and reading it as a video"
            raise missing(what, "av (PyAV)", "video") from error
        try:
            # FFmpeg gets the open file and not its name, which it would take for a URL where it looks like one.
            with (
                BytesIO(self._source) if isinstance(self._source, bytes) else Path(self._source).open("rb") as opened,
                # Tags are written in any encoding; nothing here reads them.
                av.open(opened, options={"format_whitelist": DEMUXERS}, metadata_errors="replace") as container,
            ):
                if not container.streams.video:
                    raise OptionError(f"{self.name} has no video stream")
                yield container, container.streams.video[0]
        except av.error.FFmpegError as error:
            raise OptionError(
                f"{self.name} cannot be read as a video or image: {error.strerror or error}; it may be damaged, "
                "incomplete, or of an unknown format"
            ) from error


def _to_image(frame: Any) -> "Image":
    """An upright RGB image of a decoded frame; phones write videos turned, with a note of the angle."""
    image: Image = import_pillow().fromarray(frame.to_ndarray(format="rgb24"))
    turns = round(frame.rotation / 90) % 4
    return image.rotate(90 * turns, expand=True) if turns else image
