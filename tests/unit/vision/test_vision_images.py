"""Images against the Pillow-backed processors of transformers, and against the resize that torchvision calls.

torchvision itself is not needed for that: its `resize` passes an 8-bit tensor on the CPU to torch's `interpolate`.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import KINDS, picture
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize

from trimkv_export.errors import OptionError
from trimkv_export.vision.images import (
    ProcessedImage,
    fit_tokens,
    process_image,
    resize_image,
    smart_resize,
)
from trimkv_export.vision.processor_config import CropProcessorConfig, ImageProcessorConfig

SMALL = ImageProcessorConfig(min_pixels=4 * 32**2, max_pixels=60 * 32**2)
SIZES = [  # height, width
    (1, 1),
    (7, 9),
    (31, 33),
    (32, 32),
    (48, 16),
    (64, 65),
    (100, 37),
    (3, 600),
    (600, 3),
    (37, 999),
    (201, 333),
    (256, 256),
    (333, 277),
    (480, 640),
    (641, 640),
    (900, 1100),
]
GROWS_AND_SHRINKS = [(205, 305), (900, 50), (330, 112)]  # width grows and height shrinks, with SMALL


def reference(config: ImageProcessorConfig, image: Any) -> tuple[npt.NDArray[np.float32], tuple[int, ...]]:
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.merge_size,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        rescale_factor=config.rescale_factor,
        do_resize=config.do_resize,
        do_rescale=config.do_rescale,
        do_normalize=config.do_normalize,
    )
    output = processor(images=[image], return_tensors="np")
    return output["pixel_values"], tuple(output["image_grid_thw"][0].tolist())


def check(got: ProcessedImage, want: tuple[npt.NDArray[np.float32], tuple[int, ...]]) -> None:
    values, grid = want
    assert got.grid == grid
    assert got.pixel_values.dtype == np.float32
    assert got.pixel_values.flags.c_contiguous
    np.testing.assert_array_equal(got.pixel_values, values)


def torch_resize(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    resized = torch.nn.functional.interpolate(planes, size=size, mode="bicubic", antialias=True)
    return np.asarray(resized[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_pillow_backed_reference(size: tuple[int, int], kind: str) -> None:
    image = Image.fromarray(picture(*size, kind))
    got = process_image(image, SMALL)
    check(got, reference(SMALL, image))
    assert got.source_size == size
    assert got.size == (16 * got.grid[1], 16 * got.grid[2])
    assert got.tokens == got.grid[1] * got.grid[2] // 4
    assert got.pixel_values.shape == (4 * got.tokens, 3 * 2 * 16 * 16)


@pytest.mark.parametrize("size", [(1, 1), (300, 200), (777, 1360)])
def test_equals_the_reference_with_the_official_limits(size: tuple[int, int]) -> None:
    image = Image.fromarray(picture(*size))
    check(process_image(image), reference(ImageProcessorConfig(), image))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [*SIZES, *GROWS_AND_SHRINKS])
def test_pixels_differ_little_from_torchvision(size: tuple[int, int], kind: str) -> None:
    pixels = picture(*size, kind)
    new = smart_resize(*size, min_pixels=SMALL.min_pixels, max_pixels=SMALL.max_pixels)
    got = resize_image(Image.fromarray(pixels), new).astype(int)
    difference = np.abs(got - torch_resize(pixels, new))
    assert difference.max() <= 2
    assert (difference > 0).mean() < (0.07 if kind == "gradient" else 0.012)  # a smooth picture of 7 x 9: 0.063
    assert (difference > 1).mean() < 0.0002


@pytest.mark.parametrize("size", GROWS_AND_SHRINKS)
def test_the_order_of_the_passes_does_not_depend_on_pillow(size: tuple[int, int]) -> None:
    image = Image.fromarray(picture(*size, "edges"))
    new = smart_resize(*size, min_pixels=SMALL.min_pixels, max_pixels=SMALL.max_pixels)
    assert new[0] < size[0]
    assert new[1] > size[1]
    got = resize_image(image, new).astype(int)
    in_one = np.asarray(image.resize((new[1], new[0]), Image.Resampling.BICUBIC))
    assert (np.abs(got - in_one).max() > 2) == (int(PIL.__version__.split(".")[0]) >= 13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [size for size in SIZES if 0.02 < size[0] / size[1] < 50])
@pytest.mark.parametrize(
    ("shortest_edge", "crop_size", "do_resize"),
    [(56, 56, True), (70, 56, True), (40, 56, True), (56, 28, False), (56, 84, False)],
)
def test_crops_equal_the_reference(
    size: tuple[int, int], kind: str, shortest_edge: int, crop_size: int, do_resize: bool
) -> None:
    """Black where the image is smaller; patches as a convolution of CLIP's kernel reads them."""
    config = CropProcessorConfig(shortest_edge=shortest_edge, crop_size=crop_size, do_resize=do_resize)
    image = Image.fromarray(picture(*size, kind))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": shortest_edge}, crop_size={"height": crop_size, "width": crop_size}, do_resize=do_resize
    )
    pixels = processor(images=[image], return_tensors="np")["pixel_values"]
    side = crop_size // 14
    # [3, side, 14, side, 14] to [side, side, 3, 14, 14]
    patches = pixels.reshape(3, side, 14, side, 14).transpose(1, 3, 0, 2, 4).reshape(side**2, -1)
    check(process_image(image, config, max_image_tokens=1), (patches, (1, side, side)))


def test_crops_need_whole_patches() -> None:
    with pytest.raises(OptionError, match=r"60 x 60 pixels; .* multiples of 14"):
        process_image(picture(80, 90), CropProcessorConfig(crop_size=60, shortest_edge=60))


@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_other_configurations(do_rescale: bool, do_normalize: bool) -> None:
    config = ImageProcessorConfig(
        patch_size=14,
        temporal_patch_size=3,
        merge_size=3,
        min_pixels=1,
        max_pixels=40_000,
        image_mean=(0.48, 0.45, 0.4),
        image_std=(0.26, 0.27, 0.28),
        rescale_factor=1 / 200,
        do_rescale=do_rescale,
        do_normalize=do_normalize,
    )
    image = Image.fromarray(picture(150, 222))
    check(process_image(image, config), reference(config, image))


def test_without_resizing() -> None:
    config = ImageProcessorConfig(do_resize=False)
    image = Image.fromarray(picture(96, 64))
    check(process_image(image, config), reference(config, image))
    with pytest.raises(OptionError, match=r"64 x 95 pixels; .* multiples of 32"):
        process_image(picture(95, 64), config)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    factor=st.sampled_from([14, 16, 28, 32]),
    limits=st.tuples(st.integers(1, 4_000_000), st.integers(1, 4_000_000)).map(sorted),
)
@settings(max_examples=300)
def test_smart_resize(height: int, width: int, factor: int, limits: list[int]) -> None:
    low, high = limits
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(OptionError, match="factor of 200"):
            smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
        return
    new_height, new_width = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
    assert (new_height, new_width) == reference_smart_resize(height, width, factor, low, high)
    assert new_height % factor == new_width % factor == 0
    assert min(new_height, new_width) >= factor
    assert new_height * new_width <= high or min(new_height, new_width) == factor or new_height * new_width >= low
    # The ratio changes by less than one step of a side.
    if min(new_height, new_width) > factor:
        assert (
            (new_height - factor) / (new_width + factor) < height / width < (new_height + factor) / (new_width - factor)
        )


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), most=st.integers(1, 300))
@settings(max_examples=300)
def test_fit_tokens(height: int, width: int, most: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    chosen = smart_resize(height, width)
    new_height, new_width = fit_tokens(chosen, (height, width), 32, most)
    tokens = new_height * new_width // 32**2
    assert new_height % 32 == new_width % 32 == 0
    assert 1 <= tokens <= most
    if chosen[0] * chosen[1] <= most * 32**2:
        assert (new_height, new_width) == chosen
    elif most >= 200 and min(height, width) * 4 > max(height, width):
        assert tokens > most / 2
        assert 0.7 < (new_height / new_width) / (height / width) < 1.5


@pytest.mark.parametrize("most", [1, 2, 9, 50, 64, 65, 100_000])
@pytest.mark.parametrize("size", [(30, 40), (300, 400), (400, 3), (5, 900)])
def test_a_package_limit_is_never_passed_and_never_refuses(size: tuple[int, int], most: int) -> None:
    got = process_image(picture(*size), max_image_tokens=most)
    assert got.tokens <= most
    assert len(got.pixel_values) == 4 * got.tokens
    if most == 100_000:
        assert got.size == smart_resize(*size)


@pytest.mark.parametrize("most", [0, -1, 2.5, True, "9"])
def test_bad_limits(most: Any) -> None:
    with pytest.raises(OptionError, match=f"max_image_tokens .* at least 1, got {most!r}"):
        process_image(picture(40, 40), max_image_tokens=most)


@pytest.mark.parametrize("size", [(601, 3), (3, 601)])
def test_thin_images_are_refused(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    Image.fromarray(picture(*size)).save(path)
    with pytest.raises(OptionError, match=rf"thin\.png is {size[1]} x {size[0]} pixels: .* factor of 200"):
        process_image(path)


MEASURE = """
import resource, sys
from trimkv_export.vision.images import process_image
import numpy as np, PIL.Image
PIL.Image.init()
process_image(np.zeros((64, 64, 3), np.uint8))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
image = process_image(sys.argv[1], max_image_tokens=int(sys.argv[2]))
print(peak() - before, *image.size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize(("mode", "bytes_per_pixel"), [("RGB", 4), ("CMYK", 8)])
def test_memory_of_a_large_image(mode: str, bytes_per_pixel: int, tmp_path: Path) -> None:
    height, width = 4000, 5000
    pixels = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "large.jpg")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "large.jpg"), "1024"], capture_output=True, text=True, check=True
    )
    peak, new_height, new_width = map(int, done.stdout.split())
    bound = bytes_per_pixel * height * width + 4 * height * new_width + 31 * new_height * new_width
    assert peak < bound + 16e6


def test_reading_images_and_videos_is_light(tmp_path: Path) -> None:
    Image.fromarray(picture(40, 40)).save(tmp_path / "a.png")
    code = f"""
import sys
from trimkv_export.vision import images, prompt, videos
assert "PIL" not in sys.modules
images.process_image({str(tmp_path / "a.png")!r})
videos.process_video([{str(tmp_path / "a.png")!r}] * 2, fps=1)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "torchvision", "transformers", "onnx", "ml_dtypes", "av"} & set(done.stdout.split())
