"""Videos against Qwen3VLVideoProcessor, Qwen3VLProcessor and Qwen2VLVideoProcessor of transformers 5, as they are.

They call four functions of torchvision, which is not installed; stand-ins take their place. The one that matters,
`resize`, calls torch's `interpolate`, as torchvision's own does for 8-bit tensors on the CPU.
"""

import importlib
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers.image_processing_backends
import transformers.video_processing_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from PIL import GifImagePlugin, Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as smart_resize_image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as reference_smart_resize

from trimkv_export.errors import MissingDependencyError, OptionError
from trimkv_export.vision import video_files
from trimkv_export.vision.processor_config import FrameProcessorConfig, VideoProcessorConfig
from trimkv_export.vision.video_files import open_video
from trimkv_export.vision.videos import (
    process_video,
    sample_frames,
    smart_resize_video,
    timestamps,
)


def qwen2_vl_processor() -> Any:
    """Its file imports torchvision, for annotations alone."""
    stubs = {name: ModuleType(name) for name in ("torchvision", *map("torchvision.{}".format, PARTS))}
    for name, stub in stubs.items():
        if "." in name:
            parent, _, last = name.rpartition(".")
            setattr(stubs[parent], last, stub)
    sys.modules.update(stubs)
    try:
        return importlib.import_module("transformers.models.qwen2_vl.video_processing_qwen2_vl").Qwen2VLVideoProcessor
    finally:
        for name in stubs:
            del sys.modules[name]


PARTS = ("transforms", "transforms.v2", "transforms.v2.functional")
Qwen2VLVideoProcessor = qwen2_vl_processor()
SMALL = VideoProcessorConfig(min_pixels=4096, max_pixels=60 * 32**2)


def clip(frames: int, height: int, width: int, kind: str = "noise") -> npt.NDArray[np.uint8]:
    return np.stack([picture(height, width, kind, seed) for seed in range(frames)])


def resize(video: torch.Tensor, size: tuple[int, int], interpolation: str, antialias: bool) -> torch.Tensor:
    assert (video.dtype, interpolation, antialias) == (torch.uint8, "bicubic", True)
    if video.shape[-2:] == size:
        return video
    frames = video.reshape(-1, *video.shape[-3:])
    resized = torch.nn.functional.interpolate(frames, size=size, mode="bicubic", antialias=True)
    return resized.reshape(*video.shape[:-2], *size)


def normalize(video: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, inplace: bool) -> torch.Tensor:
    return (video - mean[:, None, None]) / std[:, None, None]


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = SimpleNamespace(
        resize=resize,
        normalize=normalize,
        grayscale_to_rgb=lambda video: video,
        InterpolationMode=SimpleNamespace(LANCZOS="lanczos", BILINEAR="bilinear"),
    )
    backends = transformers.image_processing_backends
    monkeypatch.setattr(backends, "tvF", functions, raising=False)
    monkeypatch.setattr(backends, "pil_torch_interpolation_mapping", {3: "bicubic"})
    monkeypatch.setattr(transformers.video_processing_utils, "tvF", functions, raising=False)


def processed(
    kind: Any,
    config: VideoProcessorConfig,
    video: npt.NDArray[np.uint8],
    fps: float,
) -> tuple[Any, Any]:
    """A processor, and its output."""
    processor = kind(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        fps=config.fps,
        min_frames=config.min_frames,
        max_frames=config.max_frames,
        cap_pixels_per_frame=config.cap_pixels_per_frame,
        max_video_tokens=config.max_video_tokens,
        do_sample_frames=config.do_sample_frames,
    )
    metadata = {"total_num_frames": len(video), "fps": fps, "frames_indices": list(range(len(video)))}
    return processor, processor(videos=[video], video_metadata=[metadata], return_metadata=True, return_tensors="pt")


def reference(config: VideoProcessorConfig, video: npt.NDArray[np.uint8], fps: float) -> tuple[Any, str]:
    """The output of Qwen3-VL's processor, and the text of the video."""
    processor, output = processed(Qwen3VLVideoProcessor, config, video, fps)
    text_part = SimpleNamespace(
        video_processor=processor,
        vision_start_token="S",  # noqa: S106
        vision_end_token="E",  # noqa: S106
        video_token="V",  # noqa: S106
        _calculate_timestamps=lambda *args: Qwen3VLProcessor._calculate_timestamps(None, *args),
    )
    return output, Qwen3VLProcessor.replace_video_token(text_part, output, 0)


def check_pixels(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32], scale: float) -> None:
    """But for the resize (test_runtime_images.py) the same; scale: 8-bit levels in 1."""
    levels = np.abs(got - want) * scale
    assert got.dtype == np.float32
    assert levels.max() < 2.01
    assert (levels > 0.01).mean() < 0.07


# frames, height, width, fps
CLIPS = [
    (2, 64, 64, 2.0),
    (3, 100, 37, 30.0),
    (4, 33, 190, 4.0),
    (5, 7, 9, 2.0),
    (9, 64, 96, 2.0),
    (11, 90, 70, 5.0),
    (40, 48, 40, 10.0),
    (31, 120, 250, 3.7),
    (60, 200, 150, 24.0),
    (13, 2, 300, 6.0),
    (14, 320, 10, 6.0),
]


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("kind", ["noise", "gradient"])
@pytest.mark.parametrize(("frames", "height", "width", "fps"), CLIPS)
@pytest.mark.parametrize("cap", [False, True])
def test_equals_the_reference(frames: int, height: int, width: int, fps: float, kind: str, cap: bool) -> None:
    config = VideoProcessorConfig(max_pixels=60 * 32**2, cap_pixels_per_frame=cap, max_video_tokens=5)
    video = clip(frames, height, width, kind)
    want, text = reference(config, video, fps)
    got = process_video(video, config, fps=fps)
    assert got.grid == tuple(want["video_grid_thw"][0].tolist())
    assert list(got.frames) == want["video_metadata"][0].frames_indices.tolist()
    check_pixels(got.pixel_values, want["pixel_values_videos"].numpy(), 127.5)
    tokens = got.grid[1] * got.grid[2] // 4
    assert got.tokens == got.grid[0] * tokens
    assert text == "".join(f"<{seconds:.1f} seconds>S{'V' * tokens}E" for seconds in got.timestamps)
    assert len(got.timestamps) == got.grid[0]


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(("frames", "height", "width", "fps"), [sizes for sizes in CLIPS if sizes[0] > 2])
@pytest.mark.parametrize(("cap", "sample"), [(False, True), (True, True), (False, False)])
def test_limits_for_each_frame(frames: int, height: int, width: int, fps: float, cap: bool, sample: bool) -> None:
    config = FrameProcessorConfig(
        min_pixels=4 * 28**2,
        max_pixels=30 * 28**2,
        cap_pixels_per_frame=cap,
        max_video_tokens=100,
        do_sample_frames=sample,
    )
    video = clip(frames, height, width, "gradient")
    _, want = processed(Qwen2VLVideoProcessor, config, video, fps)
    got = process_video(video, config, fps=fps)
    metadata = want["video_metadata"][0]
    assert got.grid == tuple(want["video_grid_thw"][0].tolist())
    assert list(got.frames) == [int(index) for index in metadata.frames_indices]
    check_pixels(got.pixel_values, want["pixel_values_videos"].numpy(), 255 * 0.27)
    assert got.second_per_grid == 2 / metadata.sampled_fps


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("frames", [2, 5, 8])
def test_frames_that_fit_are_equal_and_the_last_is_repeated(frames: int) -> None:
    config = VideoProcessorConfig(do_sample_frames=False)
    video = clip(frames, 64, 96)
    want, _ = reference(config, video, 2.0)
    got = process_video(video, config, fps=2.0)
    assert got.frames == tuple(range(frames))
    np.testing.assert_allclose(got.pixel_values, want["pixel_values_videos"].numpy(), atol=1e-6)
    patches = got.pixel_values.reshape(*got.grid[:1], -1, 3, 2, 256)
    assert (frames % 2 == 1) == np.array_equal(patches[-1, :, :, 0], patches[-1, :, :, 1])


@given(
    frames=st.integers(2, 1000),
    height=st.integers(1, 1500),
    width=st.integers(1, 1500),
    max_pixels=st.integers(200_000, 30_000_000),
)
@settings(max_examples=300)
def test_smart_resize(frames: int, height: int, width: int, max_pixels: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    config = VideoProcessorConfig(max_pixels=max_pixels)
    got = smart_resize_video(frames, height, width, config)
    assert got == reference_smart_resize(frames, height, width, 2, 32, 4096, max_pixels)
    assert got[0] % 32 == got[1] % 32 == 0
    if min(got) > 32 and frames % 2 == 0:
        assert frames * got[0] * got[1] <= max_pixels


@given(
    total=st.integers(1, 5000), fps=st.floats(0.5, 240), config=st.builds(VideoProcessorConfig, fps=st.floats(0.1, 30))
)
@settings(max_examples=200)
def test_sample_frames(total: int, fps: float, config: VideoProcessorConfig) -> None:
    got = sample_frames(total, fps, config)
    processor = SimpleNamespace(fps=config.fps, min_frames=4, max_frames=768)
    metadata = SimpleNamespace(total_num_frames=total, fps=fps)
    assert got == Qwen3VLVideoProcessor.sample_frames(processor, metadata, fps=config.fps).tolist()
    assert got == sorted(set(got))
    assert min(4, total) <= len(got) <= min(768, total)
    want = Qwen3VLProcessor._calculate_timestamps(None, list(got), fps)
    assert timestamps(got, fps) == tuple(want)


@given(
    total=st.integers(2, 5000),
    fps=st.floats(0.5, 240),
    config=st.builds(
        FrameProcessorConfig, fps=st.floats(0.1, 30), min_frames=st.integers(2, 9), max_frames=st.integers(9, 800)
    ),
)
@settings(max_examples=300)
def test_sample_frames_for_limits_of_each(total: int, fps: float, config: FrameProcessorConfig) -> None:
    names = ("fps", "min_frames", "max_frames", "temporal_patch_size")
    processor: Any = SimpleNamespace(num_frames=None, **{name: getattr(config, name) for name in names})
    metadata: Any = SimpleNamespace(total_num_frames=total, fps=fps)
    assert sample_frames(total, fps, config) == Qwen2VLVideoProcessor.sample_frames(processor, metadata).tolist()


@given(height=st.integers(1, 1500), width=st.integers(1, 1500), max_pixels=st.integers(4000, 2_000_000))
@settings(max_examples=100)
def test_smart_resize_of_each_frame(height: int, width: int, max_pixels: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    config = FrameProcessorConfig(min_pixels=3136, max_pixels=max_pixels)
    assert smart_resize_video(99, height, width, config) == smart_resize_image(height, width, 28, 3136, max_pixels)


def test_a_rate_of_almost_nothing() -> None:
    """Its seconds are more than a float holds."""
    assert sample_frames(9, 1e-308, VideoProcessorConfig()) == list(range(9))
    assert sample_frames(9, 1e-308, FrameProcessorConfig())[:2] == [0, 1]


def test_a_package_limit_holds_for_each_frame() -> None:
    video = clip(4, 300, 400)
    for most in (1, 7, 50, 1000):
        got = process_video(video, fps=2.0, max_image_tokens=most)
        assert got.grid[1] * got.grid[2] // 4 <= most
    assert got.grid == process_video(video, fps=2.0).grid


# The same clip in every form.

FRAMES = clip(6, 40, 60, "gradient") // 2 + clip(6, 5, 6, "edges").repeat(8, 1).repeat(10, 2) // 2


def images() -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in FRAMES]


def animated(kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    first, *rest = images()
    first.save(buffer, kind, save_all=True, append_images=rest, **options)
    return buffer.getvalue()


def test_lists_arrays_and_folders_are_the_same(tmp_path: Path) -> None:
    want = process_video(FRAMES, fps=3.0)
    names = [f"frame {number}.png" for number in (1, 2, 3, 10, 20, 100)]
    for name, image in zip(names, images(), strict=True):
        image.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("not a frame")
    sources: list[Any] = [
        images(),
        list(FRAMES),
        np.moveaxis(FRAMES, -1, 1),
        tmp_path,
        str(tmp_path),
        [tmp_path / n for n in names],
    ]
    for source in sources:
        got = process_video(source, fps=3.0)
        np.testing.assert_array_equal(got.pixel_values, want.pixel_values)
        assert (got.grid, got.timestamps, got.frames) == (want.grid, want.timestamps, want.frames)


@pytest.mark.parametrize(
    ("kind", "options", "fps"),
    [
        ("GIF", {"duration": 200}, 5.0),
        ("PNG", {"duration": 250}, 4.0),
        ("PNG", {"duration": 250, "default_image": True}, 4.0),
        ("WEBP", {"duration": 125, "lossless": True}, 8.0),
        ("TIFF", {}, None),
    ],
)
def test_animations(kind: str, options: dict[str, Any], fps: float | None, tmp_path: Path) -> None:
    content = animated(kind, **options)
    path = tmp_path / "clip"
    path.write_bytes(content)
    skipped = 1 if "default_image" in options else 0
    if fps is None:
        with pytest.raises(OptionError, match=r"clip has no times: say with fps how many"):
            process_video(path)
    frames = []
    with Image.open(path) as image:
        for index in range(skipped, 6):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    sources: list[Any] = [path, content]
    for source in sources:
        got = process_video(source, fps=None if fps else 4.0)
        want = process_video(np.stack(frames), fps=fps or 4.0)
        np.testing.assert_array_equal(got.pixel_values, want.pixel_values)
        assert got.fps == pytest.approx(want.fps)
        assert got.timestamps == pytest.approx(want.timestamps)
    assert process_video(content, fps=1.0).fps == 1.0


def test_frames_with_alpha_lie_on_white() -> None:
    frames = np.concatenate([FRAMES, np.full_like(FRAMES[..., :1], 0)], -1)
    got = process_video([Image.fromarray(frame) for frame in frames], fps=2.0)
    assert (got.pixel_values == 1).all()


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no frames": ([], {}, "the list of images has 0 frames, and a video needs at least 2"),
    "one frame": (FRAMES[:1], {}, r"shape \(1, 40, 60, 3\) has 1 frame, .* pass a single one as an image"),
    "two sizes": ([*images(), Image.fromarray(picture(8, 9))], {}, "frame 6 is 9 x 8 pixels, and the first 60 x 40"),
    "no rate": (FRAMES, {"fps": None}, "has no times: say with fps"),
    "denormal rate": (FRAMES, {"fps": 5e-324}, "fps must be a positive number, got 5e-324"),
    "bad rate": (FRAMES, {"fps": 0}, "fps must be a positive number, got 0"),
    "endless rate": (FRAMES, {"fps": float("nan")}, "fps must be a positive number, got nan"),
    "word": (FRAMES, {"fps": "3"}, "fps must be a positive number, got '3'"),
    "number": (7, {}, "a video must be a path, .* got int"),
    "thin": (clip(4, 5, 1100), {}, "1100 x 5 pixels: .* factor of 200"),
    "limit": (FRAMES, {"max_image_tokens": 0}, "max_image_tokens must be"),
    "empty": (b"", {}, "is empty"),
    "missing": ("/nowhere/clip.mp4", {}, "does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_videos(name: str) -> None:
    source, options, message = BAD[name]
    with pytest.raises(OptionError, match=message):
        process_video(source, **{"fps": 3.0, **options})


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"{tmp_path} has no image files"):
        process_video(tmp_path, fps=1.0)
    for number, image in enumerate(images()):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:100])
    with pytest.raises(OptionError, match=r"3\.png cannot be read"):
        process_video(tmp_path, fps=2.0)
    (tmp_path / "cut.gif").write_bytes(animated("GIF", duration=100)[:-900])
    with pytest.raises(OptionError, match=r"cut\.gif cannot be read"):
        process_video(tmp_path / "cut.gif")
    with pytest.raises(OptionError, match=r"0\.png has 1 frame"):
        process_video(tmp_path / "0.png")


def test_without_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))
    with pytest.raises(MissingDependencyError, match=r"clip\.mp4 .*PyAV.*: pip install 'trimkv-export\[video\]'"):
        process_video(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image", raising=False)
    with pytest.raises(MissingDependencyError, match="Pillow"):
        process_video(FRAMES, fps=1.0)


# Video files, written by PyAV; skipped without it.


@pytest.fixture(scope="module")
def av() -> Any:
    return pytest.importorskip("av")


def encode(av: Any, path: Path, codec: str = "mpeg4", frames: int = 24, fps: int = 8, **options: str) -> None:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for number in range(frames):
            frame = np.full((48, 64, 3), 40, np.uint8)
            frame[:24, :32] = 10 * number  # bright at the top left
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.mkv", "mpeg4"), ("a.ts", "mpeg2video")]
)
def test_video_files(av: Any, name: str, codec: str, tmp_path: Path) -> None:
    fps = 25 if codec == "mpeg2video" else 8
    encode(av, tmp_path / name, codec, fps=fps)
    with av.open(str(tmp_path / name)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(frames) == 24
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        for sample in (True, False):
            config = VideoProcessorConfig(do_sample_frames=sample)
            got = process_video(source, config)
            want = process_video(frames, config, fps=float(fps))
            np.testing.assert_array_equal(got.pixel_values, want.pixel_values)
            assert (got.grid, got.fps, got.frames) == (want.grid, want.fps, want.frames)
            assert got.timestamps == want.timestamps


def test_a_turned_video(av: Any, tmp_path: Path) -> None:
    encode(av, tmp_path / "flat.mp4")
    content = (tmp_path / "flat.mp4").read_bytes()
    upright = b"".join(value.to_bytes(4, "big", signed=True) for value in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    track = content.index(b"tkhd")
    matrix = content.index(upright, track)
    config = VideoProcessorConfig(do_sample_frames=False)
    flat = process_video(content, config, max_image_tokens=4)
    got = process_video(content[:matrix] + turned + content[matrix + 36 :], config, max_image_tokens=4)
    assert flat.size == (64, 64) == got.size
    for video, brightest in ((flat, 0), (got, 1)):  # of the four squares; a quarter turn clockwise
        squares = video.pixel_values.reshape(*video.grid[:1], 4, -1).mean(2)
        assert squares[-1].argmax() == brightest


def test_damaged_video_files(av: Any, tmp_path: Path) -> None:
    encode(av, tmp_path / "a.mp4", movflags="faststart")
    content = (tmp_path / "a.mp4").read_bytes()
    for damaged in (content[: len(content) // 2], content[:300], bytes(1000), b"#EXTM3U\n#EXTINF:1,\nother.mp4\n"):
        (tmp_path / "bad.mp4").write_bytes(damaged)
        with pytest.raises(
            OptionError, match=r"bad\.mp4 (is damaged or incomplete|has no video|cannot be read as a video or image)"
        ):
            process_video(tmp_path / "bad.mp4")


def test_a_sound_file(av: Any, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(OptionError, match="has no video stream"):
        process_video(tmp_path / "a.mkv")


def test_a_header_that_counts_too_many(av: Any, tmp_path: Path) -> None:
    encode(av, tmp_path / "a.mp4")
    video = open_video(tmp_path / "a.mp4")
    video.count = 25
    read = [np.asarray(image) for image in video.read([0, 22, 23, 24])]
    np.testing.assert_array_equal(read[2], read[3])
    assert not np.array_equal(read[1], read[2])
    video.count = 40
    with pytest.raises(OptionError, match="incomplete: 16 of 40 frames cannot be decoded"):
        list(video.read([0, 39]))


def test_tags_in_another_encoding(av: Any, tmp_path: Path) -> None:
    """Cameras and converters write titles in Latin-1; nothing here reads them."""
    file = tmp_path / "video.mkv"
    with av.open(str(file), "w") as container:
        container.metadata["title"] = "TITLE-OF-IT"
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = file.read_bytes()
    assert content.count(b"TITLE-OF-IT") == 1
    file.write_bytes(content.replace(b"TITLE-OF-IT", b"TITLE-OF-\xff\xfe"))
    assert open_video(file).count == 4
    with pytest.raises(OptionError, match=r"a frame of .* is too large: 64 x 64 pixels, and at most 4,095"):
        open_video(file, 4 * 4096 - 1)
    assert open_video(file, 4 * 4096).pixels == 4 * 4096


def test_an_animation_is_not_decoded_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 90, 180)]
    content = BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=50)
    seeks: list[int] = []
    seek = GifImagePlugin.GifImageFile.seek

    def counted(self: Any, frame: int) -> None:
        seeks.append(frame)
        seek(self, frame)

    monkeypatch.setattr(GifImagePlugin.GifImageFile, "seek", counted)
    video = open_video(content.getvalue())
    assert video.fps == pytest.approx(20)
    assert (video.count, seeks) == (3, [0])  # what is read of the first frame to know the size
    monkeypatch.setattr(video_files, "MAX_ANIMATION_PIXELS", 3 * 16 * 16 - 1)
    with pytest.raises(OptionError, match="has 3 frames of 16 x 16 pixels, and at most 767 pixels in all"):
        open_video(content.getvalue())
