"""Videos to patches and times, as `Qwen3VLVideoProcessor` and `Qwen2VLVideoProcessor` of transformers make them.

Frames are read and resized one at a time: a video takes 3 bytes per pixel of the resized frames (`held_pixels`: at most
75 MB with Qwen3-VL's limit of 25,165,824 pixels), and the memory of one frame as it is in the file.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trimkv_export.checks import require_whole
from trimkv_export.config import MAX_COUNT, MAX_FRAMES
from trimkv_export.errors import OptionError
from trimkv_export.vision.image_files import MAX_IMAGE_PIXELS
from trimkv_export.vision.images import check_aspect, fit_tokens, resize_image, smart_resize
from trimkv_export.vision.patches import ResizedFrames
from trimkv_export.vision.positions import Interval
from trimkv_export.vision.processor_config import FrameProcessorConfig, VideoProcessorConfig
from trimkv_export.vision.video_files import VideoSource, open_video
from trimkv_export.words import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ProcessedVideo",
    "held_pixels",
    "process_video",
    "sample_frames",
    "smart_resize_video",
    "timestamps",
]


@dataclass(frozen=True, eq=False)
class ProcessedVideo(ResizedFrames):
    """A video as the vision tower takes it.

    Attributes:
        timestamps: [t] in seconds, of the middle of each temporal patch.
        frames: numbers of the source's frames that were taken.
        count: frames of the source.
        fps: frames per second of the source, on average.
        even: whether they come evenly.
        lost: frames of the source that could not be decoded; the one before each was taken in its place.
        thinned: whether fewer frames were taken than the model's processor takes, because of a limit.
    """

    timestamps: tuple[float, ...]
    frames: tuple[int, ...]
    count: int
    fps: float
    even: bool = True
    lost: int = 0
    thinned: bool = False

    @property
    def second_per_grid(self) -> Interval:
        """Seconds from one temporal patch to the next, by the frames taken per second on average; or of each patch,
        from the first on, where frames do not come evenly.
        """
        if not self.even:
            return tuple(seconds - self.timestamps[0] for seconds in self.timestamps)
        return self.config.temporal_patch_size / (len(self.frames) / self.count * self.fps)

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever gave the video may want to know of how it was read, in sentences."""
        found = []
        if self.lost:
            found.append(f"{self.name}: {self.lost:,} of {self.count:,} frames are damaged and were left out")
        if self.thinned:
            found.append(
                f"{self.name}: {len(self.frames):,} of {self.count:,} frames are taken, evenly, which is the most that "
                "max-frames allows"
            )
        return tuple(found)


def process_video(
    source: VideoSource,
    config: VideoProcessorConfig | None = None,
    *,
    fps: float | None = None,
    video_fps: float | None = None,
    max_frames: int = MAX_FRAMES,
    max_image_tokens: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    between: Callable[[], None] | None = None,
) -> ProcessedVideo:
    """Choose frames of a video, resize and normalise them, and cut them into patches.

    Args:
        source: see `video_files.open_video`.
        config: by default that of Qwen3-VL.
        fps: frames per second of the source; needed where the source has no times of its own (a folder, a list, an
            array), and wins over what a file says: then they come evenly.
        video_fps: frames to take per second; None: as the configuration says, where it may also say all.
        max_frames: the most frames that are taken, whatever the configuration says. Of a video that has more, they are
            taken evenly, never cut off.
        max_image_tokens: the most tokens of one temporal patch (two frames), such as a package's limit on an image;
            larger frames are scaled down to fit.
        max_pixels: the most pixels of a frame as it is in the file; of a video file, a quarter of them.
        between: called before each frame that is decoded; what it raises ends the reading.

    Raises:
        OptionError: the video cannot be used: it is broken, or has a single frame, or frames of several sizes.
    """
    config = config or VideoProcessorConfig()
    if video_fps is not None:
        config = replace(config, fps=_rate("video_fps", video_fps), do_sample_frames=True)
    require_whole("max_frames", max_frames, config.temporal_patch_size, MAX_COUNT)
    video = open_video(source, max_pixels)
    video.between = between or video.between
    if video.count < config.temporal_patch_size:
        raise OptionError(
            f"{video.name} has {video.count} frame{'' if video.count == 1 else 's'}, and a video needs at least "
            f"{config.temporal_patch_size}; pass a single one as an image"
        )
    rate = video.fps if fps is None else _rate("fps", fps)
    if rate is None:
        raise OptionError(f"{video.name} has no times: say with fps how many frames it has per second")
    indices, thinned = _chosen(video.count, rate, config, max_frames)
    seconds = video.seconds if fps is None else None
    pixels = _resized(video.read(indices), video.name, indices, config, max_image_tokens)
    group = config.temporal_patch_size
    times = timestamps(indices, rate, group) if seconds is None else _midpoints(seconds[indices].tolist(), group)
    return ProcessedVideo(
        pixels, config, video.name, times, tuple(indices), video.count, rate,
        even=seconds is None, lost=video.lost, thinned=thinned,
    )  # fmt: skip


def _rate(name: str, value: float) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < sys.float_info.min:
        raise OptionError(f"{name} must be a positive number, got {shorten(value)}")
    return float(value)


def _chosen(total: int, fps: float, config: VideoProcessorConfig, max_frames: int) -> tuple[list[int], bool]:
    """Numbers of the frames to take, and whether there are fewer than without `max_frames`."""
    wanted = sample_frames(total, fps, config) if config.do_sample_frames else list(range(total))
    if len(wanted) <= max_frames:
        return wanted, False
    fewer = replace(config, max_frames=max_frames, min_frames=min(config.min_frames, max_frames))
    # As many as there can be: all, at a rate of one per second of a video with one per second.
    return sample_frames(total, 1.0, replace(fewer, fps=1.0)), True


def sample_frames(total: int, fps: float, config: VideoProcessorConfig) -> list[int]:
    """Numbers of the frames to take of `total` frames at `fps` per second, evenly spaced from the first on.

    The last one is taken too, but not by FrameProcessorConfig, which also rounds down to whole temporal patches.
    """
    if isinstance(config, FrameProcessorConfig):
        group = config.temporal_patch_size
        most = min(config.max_frames, total) // group * group
        count = int(min(max(total / fps * config.fps, config.min_frames), most)) // group * group
        # Float32 as in the reference, where a sum that is rounded up takes the next frame.
        return np.arange(0, total, total / max(group, count)).astype(np.float32).astype(int).tolist()
    wanted = int(min(total / fps * config.fps, total))
    wanted = min(max(wanted, config.min_frames), config.max_frames, total)
    return [int(index) for index in np.linspace(0, total - 1, wanted).round()]


def timestamps(indices: Sequence[int], fps: float, temporal_patch_size: int = 2) -> tuple[float, ...]:
    """Seconds of each temporal patch: halfway between its first and last frame, the last frame repeated to fill it."""
    return _midpoints([index / fps for index in indices], temporal_patch_size)


def _midpoints(times: Sequence[float], temporal_patch_size: int) -> tuple[float, ...]:
    times = [*times, *[times[-1]] * (-len(times) % temporal_patch_size)]
    return tuple(
        (times[first] + times[first + temporal_patch_size - 1]) / 2
        for first in range(0, len(times), temporal_patch_size)
    )


def smart_resize_video(frames: int, height: int, width: int, config: VideoProcessorConfig) -> tuple[int, int]:
    """(height, width) that the reference resizes the frames to; its limits are on the pixels of all frames.

    Raises:
        OptionError: the frames are empty, or their sides differ by a factor above 200.
    """
    check_aspect(height, width, "the video")
    if isinstance(config, FrameProcessorConfig):
        return _smart_resize_frame(frames, height, width, config)
    factor, group = config.factor, config.temporal_patch_size
    max_pixels = config.max_pixels
    if config.cap_pixels_per_frame:
        most = min(config.max_video_tokens * factor * factor, config.max_pixels // frames)
        max_pixels = frames * max(most, int(config.min_pixels * 1.05))
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    # Python's round, as in the reference: halves go to the even neighbour.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    filled = round(frames / group) * group
    if filled * new_height * new_width > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif filled * new_height * new_width < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def _smart_resize_frame(frames: int, height: int, width: int, config: FrameProcessorConfig) -> tuple[int, int]:
    max_pixels = config.max_pixels
    if config.cap_pixels_per_frame:
        total = int(config.max_video_tokens * config.factor**2 * 0.9)
        share = min(max_pixels, total * config.temporal_patch_size // frames)
        max_pixels = max(share, int(config.min_pixels * 1.05))
    return smart_resize(height, width, factor=config.factor, min_pixels=config.min_pixels, max_pixels=max_pixels)


def _resized(
    images: "Iterator[Image]",
    name: str,
    indices: list[int],
    config: VideoProcessorConfig,
    max_image_tokens: int | None,
) -> npt.NDArray[np.uint8]:
    """The frames [frames, height, width, 3] at the size that the model takes."""
    pixels: npt.NDArray[np.uint8] | None = None
    size = source_size = (0, 0)
    for number, image in enumerate(images):
        if pixels is None:
            size = source_size = (image.height, image.width)
            check_aspect(*source_size, name)
            if config.do_resize:
                size = smart_resize_video(len(indices), *source_size, config)
            size = fit_tokens(size, source_size, config.factor, max_image_tokens)
            pixels = np.empty((len(indices), *size, 3), np.uint8)
        if (image.height, image.width) != source_size:
            raise OptionError(
                f"{name}: frame {indices[number]} is {image.width} x {image.height} pixels, and the first "
                f"{source_size[1]} x {source_size[0]}; all frames of a video must have one size"
            )
        pixels[number] = resize_image(image, size)
    if pixels is None:
        raise OptionError(f"{name} has no frames")
    return pixels


def held_pixels(config: VideoProcessorConfig, frames: int, max_image_tokens: int) -> int:
    """The most pixels that `frames` resized frames of a video have together."""
    most = max_image_tokens * config.factor**2
    if isinstance(config, FrameProcessorConfig):
        return frames * (min(most, config.max_pixels) if config.do_resize else most)
    return min(frames * most, max(config.max_pixels, frames * config.factor**2) if config.do_resize else frames * most)
