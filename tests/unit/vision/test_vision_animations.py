"""Times of animations, read without decoding, against those that Pillow gives once it has decoded every frame."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from pictures import picture
from PIL import Image, ImageFile

from trimkv_export.vision.animations import frame_times
from trimkv_export.vision.image_files import open_image
from trimkv_export.vision.video_files import open_video
from trimkv_export.vision.videos import process_video

TIMES = [100, 200, 300, 400, 500, 40]


def animated(kind: str, frames: int = 6, **options: Any) -> bytes:
    first, *rest = [Image.fromarray(picture(40, 60, seed=seed)) for seed in range(frames)]
    buffer = BytesIO()
    first.save(buffer, kind, save_all=True, append_images=rest, **options)
    return buffer.getvalue()


KINDS = {
    "GIF": {}, "PNG": {}, "PNG with a stand-in": {"default_image": True}, "WEBP": {"lossless": True}, "AVIF": {},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_times_are_those_that_pillow_decodes(name: str) -> None:
    options = KINDS[name]
    shown = TIMES[1:] if "default_image" in options else TIMES
    content = animated(name.split()[0], duration=shown, **options)
    decoded = []
    with Image.open(BytesIO(content)) as image:
        for place in range(len(TIMES) - len(shown), len(TIMES)):
            image.seek(place)
            image.load()
            decoded.append(image.info["duration"])
    assert decoded == shown
    assert frame_times(BytesIO(content), 100) == shown
    assert frame_times(BytesIO(content), 2) == shown[:2]


@pytest.mark.parametrize("name", KINDS)
def test_frames_that_do_not_come_evenly_keep_their_times(name: str) -> None:
    options = KINDS[name]
    shown = TIMES[1:] if "default_image" in options else TIMES
    content = animated(name.split()[0], duration=shown, **options)
    got = process_video(content, video_fps=1000.0)
    starts = np.cumsum([0, *shown[:-1]]) / 1000
    starts = np.append(starts, starts[-1:]) if len(starts) % 2 else starts
    assert got.frames == tuple(range(len(shown)))
    assert got.timestamps == pytest.approx(starts.reshape(-1, 2).mean(1))
    assert got.fps == pytest.approx(len(shown) / sum(shown) * 1000)
    assert got.second_per_grid == pytest.approx([seconds - got.timestamps[0] for seconds in got.timestamps])
    assert process_video(content, fps=2.0, video_fps=1000.0).timestamps[:2] == (0.25, 1.25)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_no_frame_is_decoded_to_know_the_times(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = animated(kind, duration=50)
    decoded: list[int] = []
    load = ImageFile.ImageFile.load

    def noted(self: Any) -> Any:
        decoded.append(self.tell())
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    video = open_video(content)
    assert video.fps == pytest.approx(20)
    assert (video.count, video.seconds, decoded) == (6, None, [])
    list(video.read([0, 2]))
    assert max(decoded) <= 2
    decoded.clear()
    open_image(content)
    assert set(decoded) == {0}


def test_a_time_of_zero_or_none_is_a_tenth_of_a_second() -> None:
    got = open_video(animated("GIF", duration=[0, 200, 200, 200, 200, 200]))
    assert got.seconds is not None
    assert got.seconds.tolist() == pytest.approx([0, 0.1, 0.3, 0.5, 0.7, 0.9])
    still = animated("GIF")
    assert set(frame_times(BytesIO(still), 9)) <= {None, 0.0}


@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_cut_off_or_changed(name: str) -> None:
    content = animated(name.split()[0], duration=TIMES[1:] if "default_image" in KINDS[name] else TIMES, **KINDS[name])
    whole = frame_times(BytesIO(content), 100)
    for end in range(0, len(content), 97):
        found = frame_times(BytesIO(content[:end]), 100)
        assert found == whole[: len(found)]
    rng = np.random.default_rng(1)
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 20):
            changed[place] = rng.integers(256)
        assert len(frame_times(BytesIO(bytes(changed)), 100)) <= 100


def test_other_files_have_no_times() -> None:
    for content in (b"", b"RIFF", b"no animation at all", animated("TIFF")):
        assert frame_times(BytesIO(content), 9) == []
