"""Videos to patches and times, as `Qwen3VLVideoProcessor` and `Qwen2VLVideoProcessor` of transformers make them.

Frames are read and resized one at a time: a video takes 3 bytes per pixel of the resized frames (at most 75 MB with the
official limit of 25,165,824 pixels), and the memory of one frame as it is in the file.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trimkv_export.errors import OptionError
from trimkv_export.vision.image_files import MAX_IMAGE_PIXELS
from trimkv_export.vision.images import check_aspect, fit_tokens, resize_image, smart_resize
from trimkv_export.vision.patches import ResizedFrames
from trimkv_export.vision.processor_config import FrameProcessorConfig, VideoProcessorConfig
from trimkv_export.vision.video_files import VideoSource, open_video

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ProcessedVideo",
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
        fps: frames per second of the source.
    """

    timestamps: tuple[float, ...]
    frames: tuple[int, ...]
    count: int
    fps: float

    @property
    def second_per_grid(self) -> float:
        """Seconds from one temporal patch to the next, by the frames taken per second on average."""
        return self.config.temporal_patch_size / (len(self.frames) / self.count * self.fps)


def process_video(
    source: VideoSource,
    config: VideoProcessorConfig | None = None,
    *,
    fps: float | None = None,
    max_image_tokens: int | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> ProcessedVideo:
    """Choose frames of a video, resize and normalise them, and cut them into patches.

    Args:
        source: see `video_files.open_video`.
        config: by default that of Qwen3-VL.
        fps: frames per second of the source; needed where the source has no times of its own (a folder, a list, an
            array), and wins over what a file says.
        max_image_tokens: the most tokens of one temporal patch (two frames), such as a package's limit on an image;
            larger frames are scaled down to fit.
        max_pixels: the most pixels of a frame as it is in the file.

    Raises:
        OptionError: the video cannot be used: it is broken, or has a single frame, or frames of several sizes.
    """
    config = config or VideoProcessorConfig()
    video = open_video(source, max_pixels)
    if video.count < config.temporal_patch_size:
        raise OptionError(
            f"{video.name} has {video.count} frame{'' if video.count == 1 else 's'}, and a video needs at least "
            f"{config.temporal_patch_size}; pass a single one as an image"
        )
    rate = fps if fps is not None else video.fps
    if rate is None:
        raise OptionError(f"{video.name} has no times: say with fps how many frames it has per second")
    if type(rate) not in (int, float) or not math.isfinite(rate) or rate < sys.float_info.min:
        raise OptionError(f"fps must be a positive number, got {rate!r}")
    indices = sample_frames(video.count, rate, config) if config.do_sample_frames else list(range(video.count))
    return _process(video.read(indices), video.name, indices, video.count, float(rate), config, max_image_tokens)


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
    filled = [*indices, *[indices[-1]] * (-len(indices) % temporal_patch_size)]
    times = [index / fps for index in filled]
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


def _process(
    images: "Iterator[Image]",
    name: str,
    indices: list[int],
    count: int,
    fps: float,
    config: VideoProcessorConfig,
    max_image_tokens: int | None,
) -> ProcessedVideo:
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
    times = timestamps(indices, fps, config.temporal_patch_size)
    return ProcessedVideo(pixels, config, name, times, tuple(indices), count, fps)
