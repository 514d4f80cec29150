"""Video files as they come from cameras, cutters and networks, made here by PyAV: what is in them, not in headers."""

import itertools
import struct
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from trimkv_export.errors import OptionError
from trimkv_export.vision import video_files, video_index
from trimkv_export.vision.processor_config import FrameProcessorConfig, VideoProcessorConfig
from trimkv_export.vision.video_files import open_video
from trimkv_export.vision.videos import held_pixels, process_video, smart_resize_video

av = pytest.importorskip("av")

HEIGHT, WIDTH = 48, 64
ALL = VideoProcessorConfig(do_sample_frames=False)
# Container, codec: with and without frames in another order than they are shown in.
KINDS = [
    ("mp4", "libx264"), ("mov", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("flv", "libx264"),
    ("avi", "libx264"), ("mp4", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx"), ("webm", "libvpx-vp9"),
    ("ts", "mpeg2video"), ("wmv", "wmv2"), ("flv", "flv"),
]  # fmt: skip


def shade(number: int) -> int:
    """How bright a frame is; its neighbours differ by more than coding loses."""
    return 20 + 8 * (number * 7 % 29)


def write(
    path: Path,
    codec: str = "libx264",
    frames: int = 100,
    fps: int = 25,
    times: Sequence[int] | None = None,
    picture: npt.NDArray[np.uint8] | None = None,
    **options: str,
) -> Path:
    """A video of grey frames; `times` in milliseconds."""
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate, stream.gop_size = (
            WIDTH,
            HEIGHT,
            "yuv420p",
            2_000_000,
            12,
        )
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), shade(number), np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(source: Path, target: Path, start: float, end: float) -> Path:
    """What `ffmpeg -ss START -to END -c copy` writes: from the key frame before START on, to be shown from START on."""
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        old: Any = given.streams.video[0]
        new = container.add_stream_from_template(old)
        offset = int(start / old.time_base)
        given.seek(offset, stream=old, backward=True)
        for packet in given.demux(old):
            if packet.dts is None or packet.pts * old.time_base >= end:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, new
            container.mux(packet)
    return target


def shades(video: Any, numbers: Sequence[int]) -> list[int]:
    return [round(float(np.asarray(image).mean())) for image in video.read(numbers)]


def decoded(path: Path) -> list[npt.NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(("suffix", "codec"), KINDS)
def test_frames_and_times_of_every_container(suffix: str, codec: str, tmp_path: Path) -> None:
    """What is decoded is what was counted, without decoding it; so nothing is decoded twice."""
    path = write(tmp_path / f"a.{suffix}", codec, 30)
    video = open_video(path)
    frames = decoded(path)
    assert (video.count, video.fps, video.seconds) == (len(frames), 25.0, None) == (30, 25.0, None)
    for image, frame in zip(video.read(range(30)), frames, strict=True):
        np.testing.assert_array_equal(np.asarray(image), frame)
    got = process_video(path, ALL)
    assert got.timestamps == process_video(np.stack(frames), ALL, fps=25.0).timestamps
    assert (got.lost, got.notes) == (0, ())


def test_nothing_is_decoded_to_open_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mkv")
    monkeypatch.setattr(video_files._Decoder, "_decode", lambda *_: pytest.fail("a frame was decoded"))
    assert open_video(path).count == 100


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_a_file_cut_without_encoding(suffix: str, tmp_path: Path) -> None:
    """Its header still counts the frames from the key frame on, which its edit list hides."""
    whole = write(tmp_path / "whole.mp4")
    path = cut(whole, tmp_path / f"cut.{suffix}", 0.8, 2.8)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > 50
    video = open_video(path)
    assert (video.count, video.fps) == (50, 25.0)
    # The last ones refer to frames that were cut off.
    assert shades(video, range(47)) == pytest.approx([shade(number) for number in range(20, 67)], abs=3)
    got = process_video(path, VideoProcessorConfig(fps=1.0, min_frames=3))
    assert got.frames == (0, 24, 49)


@pytest.mark.parametrize("suffix", ["mkv", "ts", "flv"])
def test_a_cut_in_containers_without_edit_lists(suffix: str, tmp_path: Path) -> None:
    path = cut(write(tmp_path / "whole.mp4"), tmp_path / f"cut.{suffix}", 1.0, 3.0)
    video = open_video(path)
    assert (video.count, video.fps) == (len(decoded(path)), 25.0)


@pytest.mark.parametrize(("suffix", "codec"), [("ts", "libx264"), ("mpg", "mpeg1video"), ("mpg", "mpeg2video")])
def test_recordings_that_were_joined_follow_each_other(suffix: str, codec: str, tmp_path: Path) -> None:
    """Their times start anew with each, and were sorted into one another: at twice the rate."""
    parts = [write(tmp_path / f"{name}.{suffix}", codec, count) for name, count in (("a", 40), ("b", 30))]
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    video, frames = open_video(path), decoded(path)
    assert video.count == len(frames) == 70
    assert video.fps == pytest.approx(25, rel=0.03)  # of a program stream, one time in some is known
    assert shades(video, range(70)) == [round(float(frame.mean())) for frame in frames]
    got = process_video(path, ALL)
    assert np.abs(np.array(got.timestamps) - (np.arange(0, 70, 2) + 0.5) / 25).max() < 0.13


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("first", [True, False])
def test_the_picture_of_a_cover_is_no_video(suffix: str, first: bool, tmp_path: Path) -> None:
    cover = BytesIO()
    Image.new("RGB", (300, 200), (255, 0, 0)).save(cover, "JPEG")
    path = tmp_path / f"a.{suffix}"
    with av.open(str(write(tmp_path / "source.mp4", frames=30))) as given, av.open(str(path), "w") as container:
        old: Any = given.streams.video[0]
        moving = None if first else container.add_stream_from_template(old)
        still: Any = container.add_stream("mjpeg", rate=1)
        still.width, still.height, still.pix_fmt, still.disposition = 300, 200, "yuvj420p", 1024
        moving = moving or container.add_stream_from_template(old)
        container.start_encoding()
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = still, 0, 0, Fraction(1, 1000)
        container.mux(packet)
        for packet in given.demux(old):
            if packet.dts is not None:
                packet.stream = moving
                container.mux(packet)
    video = open_video(path)
    assert (video.count, video.fps) == (30, 25.0)
    assert next(iter(video.read([0]))).size == (WIDTH, HEIGHT)


def test_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.nut", frames=3)
    with pytest.raises(OptionError, match=r"a\.nut is of a format that is not read; those that are: asf, avi, .*mp4"):
        open_video(tmp_path / "a.nut")


TIMES = np.cumsum([0, *np.random.default_rng(0).integers(20, 120, 59)]).tolist()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "mov"])
def test_a_variable_frame_rate_keeps_its_times(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{suffix}", frames=60, times=TIMES)
    video = open_video(path)
    assert video.seconds is not None
    assert video.seconds == pytest.approx(np.array(TIMES) / 1000, abs=1e-3)
    assert video.fps == pytest.approx(60 / (TIMES[-1] + 70) * 1000, rel=0.02)
    got = process_video(path, VideoProcessorConfig(fps=4.0))
    taken = np.array(TIMES)[list(got.frames)] / 1000
    taken = np.append(taken, taken[-1:]) if len(taken) % 2 else taken
    assert got.timestamps == pytest.approx(taken.reshape(-1, 2).mean(1), abs=1e-3)
    gaps = np.array(got.second_per_grid)
    assert gaps == pytest.approx(np.array(got.timestamps) - got.timestamps[0])
    # A rate that is given wins: then all frames come evenly.
    assert process_video(path, ALL, fps=10.0).timestamps[:2] == (0.05, 0.25)


def test_times_of_milliseconds_are_no_other_rate(tmp_path: Path) -> None:
    """30 frames per second in MKV and FLV are 0, 33, 67, 100 ms."""
    for suffix in ("mkv", "flv"):
        video = open_video(write(tmp_path / f"a.{suffix}", frames=90, fps=30))
        assert (video.fps, video.seconds) == (30.0, None)


@pytest.mark.parametrize(
    ("rate", "said", "want"),
    [
        (30.0, None, 30.0), (30000 / 1001, None, 30000 / 1001), (24000 / 1001, 1000.0, 24000 / 1001),
        (12.5, 12.5, 12.5), (25.0, 24.0, 25.0), (1.0, None, 1.0), (240.0, None, 240.0),
    ],
)  # fmt: skip
def test_the_rate_that_puts_frames_where_they_are(rate: float, said: float | None, want: float) -> None:
    seconds = np.round(np.arange(500) / rate, 3)
    assert video_index.even_rate(seconds, 1e-3, said) == pytest.approx(want)
    seconds[250:] += 0.02
    assert video_index.even_rate(seconds, 1e-3, said) is None


def test_few_frames_have_the_rate_of_the_header() -> None:
    assert video_index.even_rate([0.0], 1e-3, 25.0) == 25.0
    assert video_index.even_rate([0.0, 0.0], 1e-3, None) is None


# The eight ways to turn and mirror a picture: a, b, c, d of the display matrix.
MATRICES = [
    (1, 0, 0, 1),
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_turned_and_mirrored_videos(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    picture = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    picture[: HEIGHT // 2, : WIDTH // 2], picture[: HEIGHT // 2, WIDTH // 2 :] = 230, 130
    content = write(tmp_path / "a.mp4", "mpeg4", 4, picture=picture).read_bytes()
    a, b, c, d = matrix
    plain, turned = (
        struct.pack(">9i", p << 16, q << 16, 0, r << 16, s << 16, 0, 0, 0, 1 << 30)
        for p, q, r, s in ((1, 0, 0, 1), (a, b, c, d))
    )
    at = content.index(plain, content.index(b"tkhd"))
    (image,) = open_video(content[:at] + turned + content[at + 36 :]).read([0])
    got = np.asarray(image)[..., 0].astype(int)
    # Each pixel goes to (a·x + c·y, b·x + d·y), moved so that the smallest is 0.
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    across, down = a * x + c * y, b * x + d * y
    want = np.zeros(got.shape, int)
    want[down - down.min(), across - across.min()] = picture[..., 0]
    assert got.shape == ((WIDTH, HEIGHT) if a == 0 else (HEIGHT, WIDTH))
    assert np.abs(got - want).mean() < 3


def damage(path: Path, numbers: Sequence[int]) -> Path:
    """Overwrite the packets with these numbers."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        for number in numbers:
            packet = packets[number]
            at = bytes(content).index(bytes(packet))
            content[at : at + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mjpeg"), ("mp4", "mpeg4")]
)
def test_a_bad_packet_is_skipped(suffix: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if codec == "mjpeg":
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("mjpeg", rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            for number in range(100):
                pixels = np.full((HEIGHT, WIDTH, 3), shade(number), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    else:
        write(path, codec)
    whole = shades(open_video(path), range(100))
    video = open_video(damage(path, [13, 50]))
    found = shades(video, range(100))
    assert video.count == len(found) == 100
    assert 1 <= video.lost <= 10
    same = np.abs(np.array(found) - whole) <= 3
    assert same.mean() > 0.7  # what refers to a lost frame is not as it was
    assert same[:10].all()
    got = process_video(path, ALL)
    assert got.lost == video.lost
    assert f"{got.lost} of 100 frames are damaged and were left out" in got.notes[0]
    damage(path, range(20, 60))
    with pytest.raises(OptionError, match=r"damaged or incomplete: \d+ of 100 frames cannot be decoded .*at most 10%"):
        process_video(path, ALL)


def test_the_frame_before_stands_for_a_lost_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    write(path, "libx264", 40)
    whole = shades(open_video(path), range(40))
    video = open_video(path)
    index = video._index  # type: ignore[attr-defined]
    assert index.stamps is not None
    original = video_files._Decoder._decode

    def lossy(self: Any, packet: Any) -> list[Any]:
        frames = original(self, packet)
        kept = [frame for frame in frames if frame.pts not in (index.stamps[0], index.stamps[7], index.stamps[39])]
        self.failures += len(frames) - len(kept)
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_files._Decoder, "_decode", lossy)
        found = shades(video, range(40))
    assert found == [whole[1], *whole[1:7], whole[6], *whole[8:39], whole[38]]
    assert video.lost == 3


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    content = write(tmp_path / "a.mp4", movflags="faststart").read_bytes()
    with pytest.raises(OptionError, match=r"\d+ of 100 frames cannot be decoded \(the file is cut off\)"):
        open_video(content[: len(content) // 2])
    video = open_video(content[: len(content) - 40])
    assert 90 <= video.count <= 100
    list(video.read(range(video.count)))


def test_frames_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4")
    assert open_video(path, 4 * HEIGHT * WIDTH).pixels == 100 * HEIGHT * WIDTH
    with pytest.raises(OptionError, match=r"a frame of .* is too large: 64 x 48 pixels, and at most 3,071 are taken"):
        open_video(path, 4 * HEIGHT * WIDTH - 1)
    monkeypatch.setattr(video_index, "MOST_FRAMES", 99)
    with pytest.raises(OptionError, match="has more than 99 frames; cut it into shorter ones"):
        open_video(path)


def test_somebody_is_asked_before_each_frame(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    gif = BytesIO()
    images = [Image.new("L", (40, 40), 9 * number) for number in range(20)]
    images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=100)
    for source in (write(tmp_path / "a.mp4"), gif.getvalue(), images):
        calls = itertools.count(1)

        def ask(calls: Any = calls) -> None:
            if next(calls) == 7:
                raise StoppedError

        with pytest.raises(StoppedError):
            process_video(source, ALL, fps=10.0, between=ask)


# How many frames are taken.


@pytest.mark.parametrize("kind", [VideoProcessorConfig, FrameProcessorConfig])
def test_all_frames_have_a_limit(kind: Any) -> None:
    frames = [np.full((32, 32, 3), number % 256, np.uint8) for number in range(1323)]
    small = {"min_pixels": 784, "max_pixels": 784 * 1400}
    got = process_video(frames, kind(do_sample_frames=False, **small), fps=30.0, max_image_tokens=1)
    assert (len(got.frames), got.frames[0], got.thinned) == (768, 0, True)
    assert got.frames[-1] == (1322 if kind is VideoProcessorConfig else max(got.frames))
    assert np.diff(got.frames).min() >= 1
    assert np.diff(got.frames).max() <= 2
    assert "768 of 1,323 frames are taken, evenly, which is the most that max-frames allows" in got.notes[0]
    fewer = process_video(frames, kind(do_sample_frames=False, **small), fps=30.0, max_frames=16, max_image_tokens=1)
    assert (len(fewer.frames), fewer.thinned) == (16, True)
    whole = process_video(frames[:700], kind(do_sample_frames=False, **small), fps=30.0, max_image_tokens=1)
    assert (whole.frames, whole.thinned, whole.notes) == (tuple(range(700)), False, ())


@pytest.mark.parametrize("kind", [VideoProcessorConfig, FrameProcessorConfig])
@pytest.mark.parametrize("sample", [True, False])
def test_options_of_a_run_win_over_the_file(kind: Any, sample: bool) -> None:
    frames = [np.full((32, 32, 3), number, np.uint8) for number in range(100)]
    config = kind(do_sample_frames=sample, min_pixels=784)
    got = process_video(frames, config, fps=10.0, video_fps=1.0)
    assert len(got.frames) == 10
    got = process_video(frames, config, fps=10.0, video_fps=1.0, max_frames=4)
    assert (len(got.frames), got.thinned) == (4, True)
    assert len(process_video(frames, config, fps=10.0, max_frames=6).frames) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video_fps": 0.0}, "video_fps must be a positive number, got 0.0"),
        ({"video_fps": float("inf")}, "video_fps must be a positive number, got inf"),
        ({"video_fps": "2"}, "video_fps must be a positive number, got '2'"),
        ({"max_frames": 1}, "max_frames must be a whole number from 2 to 65536, got 1"),
        ({"max_frames": 2.5}, "max_frames must be a whole number from 2 to 65536, got 2.5"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        process_video(np.zeros((4, 40, 40, 3), np.uint8), fps=2.0, **options)


@pytest.mark.parametrize("kind", [VideoProcessorConfig, FrameProcessorConfig])
def test_the_plan_of_held_frames_is_no_less_than_any_video_takes(kind: Any) -> None:
    config, rng = kind(), np.random.default_rng(0)
    for _ in range(500):
        frames, tokens = int(rng.integers(2, 800)), int(rng.integers(1, 1500))
        height, width = (int(side) for side in rng.integers(200, 5000, 2))
        size = smart_resize_video(frames, height, width, config)
        held = min(size[0] * size[1], tokens * config.factor**2) * frames
        assert held <= held_pixels(config, frames, tokens)
