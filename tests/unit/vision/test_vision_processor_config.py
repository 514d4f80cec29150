"""The preprocessor files of checkpoints and packages."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trimkv_export.errors import OptionError, PackageError, UnsupportedModelError
from trimkv_export.vision.processor_config import (
    CLIP_MEAN,
    CLIP_STD,
    CropProcessorConfig,
    FrameProcessorConfig,
    ImageProcessorConfig,
    VideoProcessorConfig,
)

OFFICIAL_IMAGE = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
OFFICIAL_VIDEO = OFFICIAL_IMAGE | {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "video_processor_type": "Qwen3VLVideoProcessor",
}
QWEN2 = {  # every field that transformers writes, all of them not Qwen3-VL's
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 4,
    "merge_size": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": False,
    "do_resize": False,
    "rescale_factor": 0.5,
    "resample": 3,
    "image_processor_type": "Qwen2VLImageProcessor",
}


# The official files of Qwen2.5-VL (the only one) and of LLaVA 1.5.
QWEN2_5 = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
LLAVA = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_official_files_are_the_defaults(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", OFFICIAL_IMAGE)
    write(tmp_path, "video_preprocessor_config.json", OFFICIAL_VIDEO)
    assert ImageProcessorConfig.open(tmp_path) == ImageProcessorConfig()
    assert VideoProcessorConfig.open(tmp_path) == VideoProcessorConfig()
    assert ImageProcessorConfig().factor == 32


def test_one_file_for_images_and_videos(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", QWEN2_5)
    shared: dict[str, Any] = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12_845_056}
    shared |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    assert ImageProcessorConfig.open(tmp_path) == ImageProcessorConfig(**shared)
    videos = FrameProcessorConfig.open(tmp_path)
    assert videos == FrameProcessorConfig(**shared)
    assert (videos.fps, videos.do_sample_frames, videos.max_video_tokens) == (2.0, True, 128_000)
    with pytest.raises(UnsupportedModelError, match="'Qwen3VLVideoProcessor' is not supported; supported: Qwen2VL"):
        FrameProcessorConfig.from_dict(OFFICIAL_VIDEO, "file")


def test_cropped_images(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", LLAVA)
    write(tmp_path, "processor_config.json", {"patch_size": 14, "processor_class": "LlavaProcessor"})
    config = CropProcessorConfig.open(tmp_path)
    assert config == CropProcessorConfig(shortest_edge=336, crop_size=336, rescale_factor=0.00392156862745098)
    assert (config.image_mean, config.image_std, config.temporal_patch_size, config.factor) == (
        CLIP_MEAN,
        CLIP_STD,
        1,
        14,
    )
    older = LLAVA | {"crop_size": 336, "size": 448}
    assert CropProcessorConfig.from_dict(older, "file") == CropProcessorConfig(
        shortest_edge=448, crop_size=336, rescale_factor=0.00392156862745098
    )
    assert CropProcessorConfig.from_dict({}, "file") == CropProcessorConfig()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"image_processor_type": "SiglipImageProcessor"},
            UnsupportedModelError,
            "'SiglipImageProcessor' is not supported; supported: CLIP",
        ),
        (
            {"image_processor_type": "LlavaNextImageProcessor"},
            UnsupportedModelError,
            "'LlavaNextImageProcessor' is not",
        ),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, UnsupportedModelError, "do_pad is not"),
        ({"do_center_crop": False}, UnsupportedModelError, "do_center_crop must be true"),
        ({"do_pad": True}, UnsupportedModelError, "do_pad is not supported"),
        ({"resample": 2}, UnsupportedModelError, "resample must be 3"),
        ({"size": {"height": 336, "width": 336}}, UnsupportedModelError, "size must have shortest_edge alone, got"),
        ({"crop_size": {"height": 336, "width": 224}}, UnsupportedModelError, "crop_size must be a square, got"),
        ({"size": 0}, PackageError, "shortest_edge must be a whole number from 1 to [0-9]+, got 0"),
        ({"crop_size": [336]}, PackageError, r"crop_size must be a whole number from 1 to [0-9]+, got \[336\]"),
    ],
)
def test_bad_files_for_cropped_images(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"file: {message}"):
        CropProcessorConfig.from_dict(LLAVA | change, "file")


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_the_llava_processor_is_that_of_clip_where_it_does_not_pad(suffix: str) -> None:
    kind = {"image_processor_type": f"LlavaImageProcessor{suffix}", "do_pad": False}
    assert CropProcessorConfig.from_dict(LLAVA | kind, "file") == CropProcessorConfig.from_dict(LLAVA, "file")
    found, theirs = CropProcessorConfig.from_dict({}, "file"), LlavaImageProcessorPil
    assert (found.image_mean, found.image_std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert (found.shortest_edge, found.crop_size) == (theirs.size["shortest_edge"], theirs.crop_size["height"])


@pytest.mark.parametrize("kind", [None, "Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"])
@pytest.mark.parametrize("said", [{}, {"max_pixels": 50_176}, {"min_pixels": 100_352}, {"patch_size": None}])
def test_absent_fields_of_images_are_those_of_the_class(said: dict[str, Any], kind: str | None) -> None:
    """And not those of the official files of another model, whose pixels are normalised otherwise."""
    found = ImageProcessorConfig.from_dict(said | {"image_processor_type": kind}, "file")
    theirs = Qwen2VLImageProcessorPil(**{name: value for name, value in said.items() if value is not None})
    for name in ("patch_size", "temporal_patch_size", "merge_size", "do_resize", "do_rescale", "do_normalize"):
        assert getattr(found, name) == getattr(theirs, name)
    assert (found.image_mean, found.image_std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert (found.min_pixels, found.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])


def test_absent_fields_of_videos_are_those_of_the_class(tmp_path: Path) -> None:
    write(tmp_path, "video_preprocessor_config.json", {"fps": 1})
    found = VideoProcessorConfig.open(tmp_path)
    assert found == VideoProcessorConfig(fps=1, min_pixels=128 * 32 * 32, max_pixels=768 * 32 * 32)
    frames = FrameProcessorConfig.open(tmp_path)
    assert frames == FrameProcessorConfig(fps=1, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)


def test_a_section_of_null_is_none(tmp_path: Path) -> None:
    write(tmp_path, "processor_config.json", {"image_processor": None, "video_processor": None})
    assert not ImageProcessorConfig.is_in(tmp_path)
    write(tmp_path, "preprocessor_config.json", QWEN2)
    assert ImageProcessorConfig.is_in(tmp_path)
    assert ImageProcessorConfig.open(tmp_path) == ImageProcessorConfig.from_dict(QWEN2, "file")


def test_every_field_is_read(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", QWEN2)
    config = ImageProcessorConfig.open(tmp_path)
    for name in QWEN2.keys() - {"do_convert_rgb", "resample", "image_processor_type"}:
        value = QWEN2[name]
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)
    video = {"fps": 3.5, "min_frames": 2, "max_frames": 9, "do_sample_frames": False, "cap_pixels_per_frame": True}
    write(tmp_path, "video_preprocessor_config.json", QWEN2 | video | {"max_video_tokens": 5})
    read = VideoProcessorConfig.open(tmp_path)
    assert {name: getattr(read, name) for name in video} == video
    assert (read.patch_size, read.max_video_tokens) == (14, 5)


def test_older_pixel_limits_go_first() -> None:
    config = ImageProcessorConfig.from_dict(OFFICIAL_IMAGE | {"max_pixels": 70_000}, "file")
    assert (config.min_pixels, config.max_pixels) == (65_536, 70_000)


def test_which_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"has no preprocessor_config\.json, so it cannot take images"):
        ImageProcessorConfig.open(tmp_path)
    with pytest.raises(PackageError, match=r"has no video_preprocessor_config\.json, so it cannot take videos"):
        VideoProcessorConfig.open(tmp_path)
    write(tmp_path, "preprocessor_config.json", OFFICIAL_IMAGE | {"patch_size": 8})
    assert VideoProcessorConfig.open(tmp_path).patch_size == 8
    assert VideoProcessorConfig.open(tmp_path).max_pixels == 16_777_216
    write(tmp_path, "processor_config.json", {"image_processor": {"patch_size": 10}, "processor_class": "x"})
    assert ImageProcessorConfig.open(tmp_path).patch_size == 10
    assert VideoProcessorConfig.open(tmp_path).patch_size == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size must be a whole number from 1 to [0-9]+, got 0"),
        ({"patch_size": 16.0}, "patch_size .* got 16.0"),
        ({"merge_size": True}, "merge_size .* got True"),
        ({"size": {"height": 3, "width": 4}}, "size must have shortest_edge and longest_edge"),
        ({"size": 512}, "size must have"),
        ({"size": {"shortest_edge": 9, "longest_edge": 8}}, "min_pixels must not be above max_pixels, got 9 and 8"),
        ({"size": {"shortest_edge": None, "longest_edge": 8}}, "min_pixels .* got None"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ({"image_mean": 0.5}, "image_mean must be three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be positive"),
        ({"image_std": [0.5, float("inf"), 0.5]}, "image_std must be three numbers"),
        ({"rescale_factor": -1}, "rescale_factor must be a positive number"),
        ({"do_resize": "yes"}, "do_resize must be true or false, got 'yes'"),
        ({"rescale_factor": 10**400}, "rescale_factor must be a positive number, got 1000*…$"),
        ({"image_mean": [0.5, 10**400, 0.5]}, "image_mean must be three numbers, got .{1,80}$"),
        ({"image_mean": "x" * 10_000}, "image_mean must be three numbers, got .{1,80}$"),
        ({"size": {"shortest_edge": 10**400, "longest_edge": 10**400}}, "min_pixels must be .{1,120}$"),
        ({"size": ["x"] * 10_000}, "size must have shortest_edge and longest_edge, got .{1,80}$"),
    ],
)
def test_bad_values(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", OFFICIAL_IMAGE | change)
    with pytest.raises(PackageError, match=rf"preprocessor_config\.json: {message}"):
        ImageProcessorConfig.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 0}, "fps must be a positive number, got 0"),
        ({"fps": "2"}, "fps must be a positive number, got '2'"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames must not be above max_frames, got 9 and 8"),
        ({"cap_pixels_per_frame": 1}, "cap_pixels_per_frame must be true or false"),
    ],
)
def test_bad_video_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=f"file: {message}"):
        VideoProcessorConfig.from_dict(OFFICIAL_VIDEO | change, "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not supported"),
        ({"do_center_crop": True}, "do_center_crop is not supported"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"resample": 2}, r"resample must be 3 \(bicubic\), got 2"),
    ],
)
def test_what_is_not_supported(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"file: {message}"):
        ImageProcessorConfig.from_dict(OFFICIAL_IMAGE | change, "file")
    with pytest.raises(UnsupportedModelError, match="num_frames is not supported"):
        VideoProcessorConfig.from_dict(OFFICIAL_VIDEO | {"num_frames": 8}, "file")


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_corrupt_files(content: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(PackageError, match=r"preprocessor_config\.json: is (not JSON|a JSON \w+, not an object)"):
        ImageProcessorConfig.open(tmp_path)
    write(tmp_path, "processor_config.json", {"image_processor": 3})
    with pytest.raises(PackageError, match="image_processor must hold a JSON object, got int"):
        ImageProcessorConfig.open(tmp_path)


def test_a_picture_is_not_made_large_to_be_cropped() -> None:
    """At 2 kB of file, a side of a million pixels would take terabytes."""
    with pytest.raises(OptionError, match="shortest_edge must be at most 2 times crop_size, 224; got 1000000"):
        CropProcessorConfig(shortest_edge=1_000_000)


def test_bad_values_in_code() -> None:
    with pytest.raises(OptionError, match="patch_size"):
        ImageProcessorConfig(patch_size=-1)


@pytest.mark.parametrize("kind", [ImageProcessorConfig, VideoProcessorConfig, FrameProcessorConfig])
def test_sizes_of_older_files(kind: Any) -> None:
    """Older versions of transformers saved numbers of pixels in size, and with it."""
    older = {"size": {"min_pixels": 3136, "max_pixels": 100_352}}
    assert (kind.from_dict(older, "x").min_pixels, kind.from_dict(older, "x").max_pixels) == (3136, 100_352)
    both = kind.from_dict(older | {"min_pixels": 784, "max_pixels": 200_704}, "x")
    assert (both.min_pixels, both.max_pixels) == (784, 200_704)
    assert kind.from_dict(older | {"max_pixels": 200_704}, "x").min_pixels == 3136
    with pytest.raises(PackageError, match="size must have shortest_edge and longest_edge, got"):
        kind.from_dict({"size": {"min_pixels": 3136}}, "x")
