"""What a checkpoint's preprocessor files say about images and videos.

Fields that a file leaves out have the values that the processor's class has in transformers (`ABSENT`); the defaults of
the classes here are those of the official Qwen3-VL files. As in transformers, the section of a processor_config.json
comes first (transformers 5 saves that one), then the processor's own file; a video processor without a file of its own
takes the image processor's.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trimkv_export.checks import require_whole
from trimkv_export.compat import Self
from trimkv_export.errors import OptionError, PackageError, UnsupportedModelError
from trimkv_export.files import read_json_object
from trimkv_export.words import shorten

__all__ = [
    "CropProcessorConfig",
    "FrameProcessorConfig",
    "ImageProcessorConfig",
    "PatchConfig",
    "ProcessorConfig",
    "VideoProcessorConfig",
    "read_json",
]

PROCESSOR_CONFIG = "processor_config.json"

# What numbers of pixels, frames and tokens stay below; those of real files are a thousand times smaller.
MOST = 1 << 40
# A resized picture may be so many times as high or wide as what is cut out of it.
MOST_CROPPED = 2
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, the one filter of these processors
# Of the pictures that CLIP was trained on.
CLIP_MEAN = 0.48145466, 0.4578275, 0.40821073
CLIP_STD = 0.26862954, 0.26130258, 0.27577711


@dataclass(frozen=True)
class PatchConfig(ABC):
    """What all processors share: how pixels become patches.

    Attributes:
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames of a patch.
        merge_size: side in patches of the square that becomes one token.
        image_mean: of R, G, B, in units of the rescaled pixels.
        image_std: the same for the deviation.
        rescale_factor: what pixels, 0…255, are multiplied by.
        do_resize: without it a picture must have a size that can be cut into patches already.
        do_rescale: multiply pixels by rescale_factor.
        do_normalize: then subtract the mean and divide by the deviation.

    Raises:
        OptionError: a value cannot be used.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    FILES: ClassVar[tuple[str, ...]] = ("preprocessor_config.json",)
    SECTION: ClassVar[str] = "image_processor"
    TYPES: ClassVar[tuple[str, ...]] = ()
    ABSENT: ClassVar[Mapping[str, Any]] = {}
    REFUSED: ClassVar[tuple[str, ...]] = ("do_center_crop", "do_pad")

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            require_whole(name, getattr(self, name), 1, MOST)
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3 or not all(map(_is_number, values)):
                raise OptionError(f"{name} must be three numbers, got {shorten(values)}")
        if not all(deviation > 0 for deviation in self.image_std):
            raise OptionError(f"image_std must be positive, got {shorten(self.image_std)}")
        _check_positive("rescale_factor", self.rescale_factor)
        for name in ("do_resize", "do_rescale", "do_normalize"):
            _check_flag(name, getattr(self, name))

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one token; resized sides are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def open(cls, folder: Path, listed: Container[str] | None = None) -> Self:
        """Read the configuration in `folder`, a package or a checkpoint.

        Args:
            folder: where the files are.
            listed: names of the files that may be read, those that a package's config.json lists; None means all.

        Raises:
            PackageError: there is no file, or a file is corrupt or has a value that cannot be used.
            UnsupportedModelError: a file asks for a processor or a step that this version does not know.
        """
        nested = read_json(folder / PROCESSOR_CONFIG, listed)
        if nested.get(cls.SECTION) is not None:
            return cls.from_dict(nested[cls.SECTION], f"{folder / PROCESSOR_CONFIG}: {cls.SECTION}")
        for file in (folder / name for name in cls.FILES if listed is None or name in listed):
            if os.path.lexists(file):
                return cls.from_dict(read_json(file), str(file))
        raise PackageError(f"{folder} has no {cls.FILES[0]}, so it cannot take {cls.SECTION.split('_')[0]}s")

    @classmethod
    def is_in(cls, folder: Path, listed: Container[str] | None = None) -> bool:
        """Whether a folder has such a configuration. Arguments as `open`; raises PackageError for a corrupt file."""
        files = [folder / name for name in cls.FILES if listed is None or name in listed]
        nested = read_json(folder / PROCESSOR_CONFIG, listed)
        return nested.get(cls.SECTION) is not None or any(map(os.path.lexists, files))

    @classmethod
    def from_dict(cls, content: Any, where: str) -> Self:
        """Make it from the object of a JSON file; `where` names the file in errors. See `open`."""
        if not isinstance(content, Mapping):
            raise PackageError(f"{where} must hold a JSON object, got {type(content).__name__}")
        cls._refuse_unknown(content, where)
        fields = dict(cls.ABSENT)
        fields |= {name: value for name in cls.__dataclass_fields__ if (value := content.get(name)) is not None}
        fields |= cls._sizes(content, where)
        for name in ("image_mean", "image_std"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        try:
            return cls(**fields)
        except OptionError as error:
            raise PackageError(f"{where}: {error}") from error

    @classmethod
    @abstractmethod
    def _sizes(cls, content: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields that a file has under other names."""

    @classmethod
    def _refuse_unknown(cls, content: Mapping[str, Any], where: str) -> None:
        kind = content.get(f"{cls.SECTION}_type")
        known = [base + suffix for base in cls.TYPES for suffix in ("", "Fast", "Pil")]
        if kind is not None and kind not in known:
            raise UnsupportedModelError(f"{where}: {shorten(kind)} is not supported; supported: {', '.join(cls.TYPES)}")
        for name in cls.REFUSED:
            if content.get(name):
                raise UnsupportedModelError(f"{where}: {name} is not supported")
        if (resample := content.get("resample", BICUBIC)) != BICUBIC:
            raise UnsupportedModelError(f"{where}: resample must be {BICUBIC} (bicubic), got {shorten(resample)}")


@dataclass(frozen=True)
class CropProcessorConfig(PatchConfig):
    """How images become the square that the tower takes: preprocessor_config.json (`CLIPImageProcessor`).

    `LlavaImageProcessor` is the same but where it pads, which is refused.

    The file does not say how large patches are: that is the tower's.

    Attributes:
        shortest_edge: pixels that the short side is resized to.
        crop_size: height and width of the middle that is then cut out.
    """

    patch_size: int = 14
    temporal_patch_size: int = 1
    merge_size: int = 1
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    shortest_edge: int = 224
    crop_size: int = 224

    TYPES: ClassVar[tuple[str, ...]] = ("CLIPImageProcessor", "LlavaImageProcessor")
    REFUSED: ClassVar[tuple[str, ...]] = ("do_pad",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shortest_edge", "crop_size"):
            require_whole(name, getattr(self, name), 1, MOST)
        if self.shortest_edge > MOST_CROPPED * self.crop_size:
            raise OptionError(
                f"shortest_edge must be at most {MOST_CROPPED} times crop_size, {self.crop_size}; got "
                f"{shorten(self.shortest_edge)}"
            )

    @classmethod
    def _sizes(cls, content: Mapping[str, Any], where: str) -> dict[str, Any]:
        size, crop = content.get("size"), content.get("crop_size")
        if isinstance(size, Mapping):
            if size.keys() != {"shortest_edge"}:
                raise UnsupportedModelError(f"{where}: size must have shortest_edge alone, got {shorten(size)}")
            size = size["shortest_edge"]
        if isinstance(crop, Mapping):
            if crop.get("height") != crop.get("width"):
                raise UnsupportedModelError(f"{where}: crop_size must be a square, got {shorten(crop)}")
            crop = crop.get("height")
        found = {"shortest_edge": size, "crop_size": crop}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def _refuse_unknown(cls, content: Mapping[str, Any], where: str) -> None:
        super()._refuse_unknown(content, where)
        if content.get("do_center_crop") is False:
            raise UnsupportedModelError(f"{where}: do_center_crop must be true, since all images have one size")


@dataclass(frozen=True)
class ProcessorConfig(PatchConfig):
    """Pictures that keep their aspect ratio.

    Attributes:
        min_pixels: the fewest resized pixels (height x width) of an image, or of all frames of a video.
        max_pixels: the most of them.
    """

    min_pixels: int = 65_536
    max_pixels: int = 16_777_216

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_pixels", "max_pixels"):
            require_whole(name, getattr(self, name), 1, MOST)
        if self.min_pixels > self.max_pixels:
            raise OptionError(f"min_pixels must not be above max_pixels, got {self.min_pixels} and {self.max_pixels}")

    @classmethod
    def _sizes(cls, content: Mapping[str, Any], where: str) -> dict[str, Any]:
        size = content.get("size")
        if size is None:
            return {}
        # Despite their names the edges are numbers of pixels, as older versions of transformers named them. The fields
        # min_pixels and max_pixels, where they stand with size, go first.
        names = ("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels")
        least, most = next((pair for pair in names if isinstance(size, Mapping) and {*pair} <= size.keys()), ("", ""))
        if not least:
            raise PackageError(f"{where}: size must have shortest_edge and longest_edge, got {shorten(size)}")
        found = {"min_pixels": size[least], "max_pixels": size[most]}
        return {name: value for name, value in found.items() if content.get(name) is None}


@dataclass(frozen=True)
class ImageProcessorConfig(ProcessorConfig):
    """How images become patches: preprocessor_config.json (`Qwen2VLImageProcessor`)."""

    # The second is what the first was called while Qwen2.5-VL was new.
    TYPES: ClassVar[tuple[str, ...]] = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor", "Qwen3VLImageProcessor")
    ABSENT: ClassVar[Mapping[str, Any]] = {
        "patch_size": 14, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "min_pixels": 3_136, "max_pixels": 1_003_520,
    }  # fmt: skip


@dataclass(frozen=True)
class VideoProcessorConfig(ProcessorConfig):
    """How videos become patches: video_preprocessor_config.json (`Qwen3VLVideoProcessor`).

    Attributes:
        fps: frames to take per second, where do_sample_frames.
        min_frames: the fewest frames that are taken.
        max_frames: the most.
        do_sample_frames: take `fps` frames per second, not all.
        cap_pixels_per_frame: also limit each frame to max_video_tokens tokens, as Qwen's own qwen-vl-utils does;
            transformers 5.23 does not unless asked.
        max_video_tokens: see cap_pixels_per_frame.
    """

    min_pixels: int = 4_096
    max_pixels: int = 25_165_824
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    do_sample_frames: bool = True
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768

    FILES: ClassVar[tuple[str, ...]] = ("video_preprocessor_config.json", "preprocessor_config.json")
    SECTION: ClassVar[str] = "video_processor"
    TYPES: ClassVar[tuple[str, ...]] = ("Qwen3VLVideoProcessor",)
    ABSENT: ClassVar[Mapping[str, Any]] = {"min_pixels": 131_072, "max_pixels": 786_432}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("fps", self.fps)
        for name in ("min_frames", "max_frames", "max_video_tokens"):
            require_whole(name, getattr(self, name), 1, MOST)
        if self.min_frames > self.max_frames:
            raise OptionError(f"min_frames must not be above max_frames, got {self.min_frames} and {self.max_frames}")
        for name in ("do_sample_frames", "cap_pixels_per_frame"):
            _check_flag(name, getattr(self, name))

    @classmethod
    def _refuse_unknown(cls, content: Mapping[str, Any], where: str) -> None:
        super()._refuse_unknown(content, where)
        if (frames := content.get("num_frames")) is not None:
            raise UnsupportedModelError(f"{where}: num_frames is not supported, got {shorten(frames)}; use fps")


@dataclass(frozen=True)
class FrameProcessorConfig(VideoProcessorConfig):
    """The same for `Qwen2VLVideoProcessor`: min_pixels and max_pixels limit each frame.

    Two frames are taken per second, as by Qwen's own qwen-vl-utils, unless the file says otherwise: transformers takes
    all frames then. With cap_pixels_per_frame all frames together take at most 90 % of max_video_tokens tokens.
    """

    patch_size: int = 14
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    min_pixels: int = 100_352
    max_pixels: int = 602_112
    max_video_tokens: int = 128_000

    TYPES: ClassVar[tuple[str, ...]] = ("Qwen2VLVideoProcessor",)
    ABSENT: ClassVar[Mapping[str, Any]] = {}


def read_json(path: Path, listed: Container[str] | None = None) -> dict[str, Any]:
    """Content of a processor's JSON file; {} if there is no such file, or none that is listed.

    Raises:
        PackageError: it is corrupt.
    """
    if listed is not None and path.name not in listed:
        return {}
    return read_json_object(path, PackageError, "copy it from the checkpoint again", optional=True)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # JSON has whole numbers of any length
        return False


def _check_positive(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise OptionError(f"{name} must be a positive number, got {shorten(value)}")


def _check_flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise OptionError(f"{name} must be true or false, got {shorten(value)}")
