"""Read the images and videos of a prompt, and make room for their tokens in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_export.engine.package import VisionInfo
from trimkv_export.runtime.images import ImageProcessorConfig, ImageSource, process_image
from trimkv_export.runtime.video import VideoProcessorConfig, VideoSource, process_video
from trimkv_export.runtime.visual import Picture
from trimkv_export.runtime.visual_prompt import VisualTokens, expand_tokens, visual_runs

__all__ = ["ImageSource", "PictureReader", "Video"]


@dataclass(frozen=True)
class Video:
    """A video: its source, and its frames per second where the source does not say (a folder, a list)."""

    source: VideoSource
    fps: float | None = None


class PictureReader:
    """Reads pictures as the model's own processor does, by the configuration that lies in the package."""

    def __init__(self, folder: Path, info: VisionInfo, encode: Callable[[str], Sequence[int]]) -> None:
        self._info, self._encode = info, encode
        self._images = ImageProcessorConfig.open(folder)
        self._videos = VideoProcessorConfig.open(folder)
        self._tokens = VisualTokens(*info.placeholder_ids, info.vision_start_token_id, info.vision_end_token_id)

    def read(
        self, tokens: Sequence[int], images: Sequence[ImageSource], videos: Sequence[Video]
    ) -> tuple[list[int], list[Picture]]:
        """The prompt with as many tokens for each picture as it has, and the pictures in the order of their tokens.

        Raises OptionError when a picture cannot be read, or the prompt has not one place for each.
        """
        limit = self._info.max_image_tokens
        read_images = [process_image(image, self._images, max_image_tokens=limit) for image in images]
        read_videos = [
            process_video(video.source, self._videos, fps=video.fps, max_image_tokens=limit) for video in videos
        ]
        expanded = expand_tokens(
            tokens,
            self._tokens,
            image_grids=[image.grid for image in read_images],
            video_grids=[video.grid for video in read_videos],
            video_timestamps=[video.timestamps for video in read_videos],
            encode=self._encode,
        )
        return expanded, self._in_order(expanded, read_images, read_videos)
