"""Read the images and videos of a prompt, and make room for their tokens in it."""

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimkv_export.errors import OptionError, PackageError
from trimkv_export.package import VisionInfo
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.vision.image_files import MAX_IMAGE_PIXELS, ImageSource, enough_memory
from trimkv_export.vision.images import ProcessedImage, process_image
from trimkv_export.vision.patches import ResizedFrames
from trimkv_export.vision.processor_config import (
    PROCESSOR_CONFIG,
    CropProcessorConfig,
    FrameProcessorConfig,
    ImageProcessorConfig,
    PatchConfig,
    VideoProcessorConfig,
    read_json,
)
from trimkv_export.vision.prompt import PromptIds, VideoTokens, enclose_placeholders, expand_tokens, visual_runs
from trimkv_export.vision.video_files import VideoSource
from trimkv_export.vision.videos import ProcessedVideo, process_video
from trimkv_export.words import shorten

__all__ = ["PictureReader", "Video", "VisualPrompt", "image_config", "video_config"]


@dataclass(frozen=True)
class Video:
    """A video.

    Attributes:
        source: see `video_files.open_video`.
        fps: frames per second of the source, where it does not say (a folder, a list), or says it wrongly.
        video_fps: frames to take per second; None: as many as the model's processor takes.
        max_frames: the most frames to take, evenly; None: what the package was planned for (`VisionInfo.max_frames`).
        between: called before each frame that is decoded; what it raises ends the reading.
    """

    source: VideoSource
    fps: float | None = None
    video_fps: float | None = None
    max_frames: int | None = None
    between: Callable[[], None] | None = None


@dataclass(frozen=True)
class VisualPrompt:
    """A prompt whose pictures were read.

    Attributes:
        tokens: with as many tokens for each picture as it has.
        pictures: in the order of their tokens.
        starts: of each picture, where in `tokens` each of its temporal patches begins.
        notes: what was not as it seems in a picture, in sentences: frames of a video that are damaged, or that a limit
            left out.
    """

    tokens: Sequence[int]
    pictures: Sequence[ResizedFrames] = ()
    starts: Sequence[Sequence[int]] = ()
    notes: Sequence[str] = ()


class PictureReader:
    """Reads pictures as the model's own processor does, by the configuration that lies in the package."""

    def __init__(
        self,
        folder: Path,
        info: VisionInfo,
        tokenizer: Tokenizer,
        *,
        listed: Container[str] | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """Read the configuration.

        Args:
            folder: the package's.
            info: its vision tower.
            tokenizer: its tokenizer.
            listed: names of the files that may be read; None means all.
            max_pixels: the most pixels of an image, or of a video's frame, as it is in its file.
        """
        self._folder, self._info, self._tokenizer, self._max_pixels = folder, info, tokenizer, max_pixels
        self._listed = listed
        self._images = image_config(folder, info, listed)
        self._ids = PromptIds(
            info.image_token_id, info.video_token_id, info.vision_start_token_id, info.vision_end_token_id
        )

    @functools.cached_property
    def _videos(self) -> VideoProcessorConfig | None:
        """How videos are processed, read when there is one: what is wrong with it is no fault of an image."""
        return video_config(self._folder, self._info, self._listed)

    @functools.cached_property
    def placeholders(self) -> dict[str, str]:
        """By "image" and, where the model takes videos, "video": the text of the token that stands for one.

        Raises:
            PackageError: the tokenizer does not know it.
        """
        ids = {"image": self._ids.image, "video": self._ids.video}
        return {kind: self._text(token) for kind, token in ids.items() if token is not None}

    def _text(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        if not text:
            raise PackageError(f"{self._folder}: the tokenizer has no token {token}, which stands for a picture")
        return text

    def place(self, text: str, *, images: int = 0, videos: int = 0) -> str:
        """Placeholders for images, then for videos, each enclosed as the model has it, and `text` after them."""
        self._check_videos(videos)
        before, after = self._ends
        counts = {"image": images, "video": videos}
        return "".join((before + mark + after) * counts[kind] for kind, mark in self.placeholders.items()) + text

    @functools.cached_property
    def _ends(self) -> tuple[str, str]:
        """The texts of the tokens around a picture; "" where the model has none."""
        start, end = self._ids.vision_start, self._ids.vision_end
        return "" if start is None else self._text(start), "" if end is None else self._text(end)

    def enclose(self, text: str) -> str:
        """A text, as `place` would write the placeholders that it has (`enclose_placeholders`)."""
        return enclose_placeholders(text, self.placeholders.values(), *self._ends)

    def _check_videos(self, count: int) -> None:
        if count and self._ids.video is None:
            raise OptionError(f"{self._folder}: this model takes images, but no videos; got {count}")

    def read(
        self, tokens: Sequence[int], images: Sequence[ImageSource] = (), videos: Sequence[Video] = ()
    ) -> VisualPrompt:
        """Read the pictures and expand their places in the prompt: one token each, or as many as the picture has.

        Raises:
            OptionError: a picture cannot be read, or the prompt does not have one place for each.
            PackageError, UnsupportedModelError: what the package says of videos cannot be used.
        """
        self._check_videos(len(videos))
        for video in videos:
            if not isinstance(video, Video):
                raise OptionError(f"a video is given as Video(source, fps), got {type(video).__name__}")
        read_images = [self._read_image(image) for image in images]
        read_videos = [self._read_video(video) for video in videos]
        expanded = expand_tokens(
            tokens,
            self._ids,
            images=[self._frame_tokens(image) for image in read_images],
            videos=[self._video_tokens(video) for video in read_videos],
            encode=functools.partial(self._tokenizer.encode, add_special_tokens=False),
        )
        read = self._in_order(expanded, read_images, read_videos)
        return replace(read, notes=tuple(note for video in read_videos for note in video.notes))

    def _read_image(self, image: ImageSource) -> ProcessedImage:
        limit = self._info.max_image_tokens
        with enough_memory(image):
            return process_image(image, self._images, max_image_tokens=limit, max_pixels=self._max_pixels)

    def _read_video(self, video: Video) -> ProcessedVideo:
        info = self._info
        with enough_memory(video.source, "video"):
            return process_video(
                video.source, self._videos, fps=video.fps, video_fps=video.video_fps,
                max_frames=info.max_frames if video.max_frames is None else video.max_frames,
                max_image_tokens=info.max_image_tokens, max_pixels=self._max_pixels, between=video.between,
            )  # fmt: skip

    def _frame_tokens(self, picture: ResizedFrames) -> int:
        return self._info.frame_tokens(*picture.grid[1:])

    def _video_tokens(self, video: ProcessedVideo) -> VideoTokens:
        length = self._frame_tokens(video)
        if self._info.tokens_per_second is None:
            return VideoTokens(length, video.timestamps)
        return VideoTokens(video.grid[0] * length)

    def _in_order(
        self, tokens: list[int], images: Sequence[ProcessedImage], videos: Sequence[ProcessedVideo]
    ) -> VisualPrompt:
        """Pictures as their tokens follow each other; a run of tokens may hold several, or a temporal patch of one."""
        waiting: dict[str, Iterator[ResizedFrames]] = {"image": iter(images), "video": iter(videos)}
        pictures: list[ResizedFrames] = []
        starts: list[list[int]] = []
        for run in visual_runs(tokens, self._ids):
            at = run.start
            while at < run.start + run.length:
                if not pictures or len(starts[-1]) == pictures[-1].grid[0]:
                    pictures.append(next(waiting[run.kind]))
                    starts.append([])
                starts[-1].append(at + self._info.keeps_class_token)
                at += self._frame_tokens(pictures[-1])
        return VisualPrompt(tokens, pictures, starts)


def image_config(
    folder: Path, info: VisionInfo, listed: Container[str] | None
) -> ImageProcessorConfig | CropProcessorConfig:
    """How the model's images are processed.

    Args:
        folder: a package or a checkpoint.
        info: of the vision tower.
        listed: names of the files that may be read; None means all.

    Raises:
        PackageError: there is no file for it, it is corrupt, or it is of another model than the tower.
        UnsupportedModelError: it asks for a processor or a step that this version does not know.
    """
    if info.image_size is None:
        config = ImageProcessorConfig.open(folder, listed)
        _check_sizes(folder, config, info)
        return config
    cropped = replace(CropProcessorConfig.open(folder, listed), patch_size=info.patch_size)
    said = read_json(folder / PROCESSOR_CONFIG, listed)
    strategy = "full" if info.keeps_class_token else "default"
    for name, found, wanted in (
        ("crop_size", cropped.crop_size, info.image_size),
        ("patch_size", said.get("patch_size", info.patch_size), info.patch_size),
        ("vision_feature_select_strategy", said.get("vision_feature_select_strategy", strategy), strategy),
    ):
        if found != wanted:
            raise PackageError(
                f"{folder}: the preprocessor's {name} is {shorten(found)}, the vision tower's {wanted!r}; they are of "
                "different models"
            )
    return cropped


def video_config(folder: Path, info: VisionInfo, listed: Container[str] | None) -> VideoProcessorConfig | None:
    """How the model's videos are processed; None if it takes none. Arguments and errors as `image_config`."""
    if info.video_token_id is None:
        return None
    config = (VideoProcessorConfig if info.tokens_per_second is None else FrameProcessorConfig).open(folder, listed)
    _check_sizes(folder, config, info)
    return config


def _check_sizes(folder: Path, config: PatchConfig, info: VisionInfo) -> None:
    found = config.patch_size, config.temporal_patch_size, config.merge_size
    wanted = info.patch_size, info.temporal_patch_size, info.spatial_merge_size
    if found != wanted:
        raise PackageError(
            f"{folder}: the preprocessor's patch, temporal patch and merge sizes are {shorten(found)}, the vision "
            f"tower's {wanted}; they are of different models"
        )
