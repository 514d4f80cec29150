"""Read the images and videos of a prompt, and make room for their tokens in it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_export.engine.package import VisionInfo
from trimkv_export.errors import OptionError, PackageError
from trimkv_export.runtime.images import ImageProcessorConfig, ImageSource, ProcessedImage, process_image
from trimkv_export.runtime.patches import ResizedFrames
from trimkv_export.runtime.video import ProcessedVideo, VideoProcessorConfig, VideoSource, process_video
from trimkv_export.runtime.visual_prompt import PromptIds, expand_tokens, visual_runs

__all__ = ["ImageSource", "PictureReader", "Video", "VisualPrompt"]


@dataclass(frozen=True)
class Video:
    """A video: its source, and its frames per second where the source does not say (a folder, a list)."""

    source: VideoSource
    fps: float | None = None


@dataclass(frozen=True)
class VisualPrompt:
    """A prompt whose pictures were read.

    tokens: with as many tokens for each picture as it has.
    pictures: in the order of their tokens. starts: of each, where in `tokens` each of its temporal patches begins.
    """

    tokens: Sequence[int]
    pictures: Sequence[ResizedFrames] = ()
    starts: Sequence[Sequence[int]] = ()

    @property
    def positions(self) -> int:
        """Positions (M-RoPE) that it takes: a frame as many as its longer side has tokens, all else one a token."""
        saved = 0
        for picture, starts in zip(self.pictures, self.starts, strict=True):
            rows, columns = (side // picture.config.merge_size for side in picture.grid[1:])
            saved += len(starts) * (rows * columns - max(rows, columns))
        return len(self.tokens) - saved


class PictureReader:
    """Reads pictures as the model's own processor does, by the configuration that lies in the package."""

    def __init__(self, folder: Path, info: VisionInfo, encode: Callable[[str], Sequence[int]]) -> None:
        self._info, self._encode = info, encode
        self._images = ImageProcessorConfig.open(folder)
        self._videos = VideoProcessorConfig.open(folder)
        for config in (self._images, self._videos):
            found = config.patch_size, config.temporal_patch_size, config.merge_size
            wanted = info.patch_size, info.temporal_patch_size, info.spatial_merge_size
            if found != wanted:
                raise PackageError(
                    f"{folder}: the preprocessor's patch, temporal patch and merge sizes are {found}, the vision "
                    f"tower's {wanted}; they are of different models"
                )
        self._tokens = PromptIds(
            *info.placeholder_ids, info.vision_start_token_id, info.vision_end_token_id, info.spatial_merge_size
        )

    def read(
        self, tokens: Sequence[int], images: Sequence[ImageSource] = (), videos: Sequence[Video] = ()
    ) -> VisualPrompt:
        """Read the pictures and expand their places in the prompt: one token each, or as many as the picture has.

        Raises OptionError when a picture cannot be read, or the prompt has not one place for each.
        """
        for video in videos:
            if not isinstance(video, Video):
                raise OptionError(f"a video is given as Video(source, fps), got {type(video).__name__}")
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
        return self._in_order(expanded, read_images, read_videos)

    def _in_order(
        self, tokens: list[int], images: Sequence[ProcessedImage], videos: Sequence[ProcessedVideo]
    ) -> VisualPrompt:
        """Pictures as their tokens follow each other; a video has a run of tokens for each temporal patch."""
        waiting: dict[str, Iterator[ResizedFrames]] = {"image": iter(images), "video": iter(videos)}
        pictures: list[ResizedFrames] = []
        starts: list[list[int]] = []
        for run in visual_runs(tokens, self._tokens):
            if not pictures or len(starts[-1]) == pictures[-1].grid[0]:
                pictures.append(next(waiting[run.kind]))
                starts.append([])
            starts[-1].append(run.start)
        return VisualPrompt(tokens, pictures, starts)
