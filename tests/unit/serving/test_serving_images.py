"""Pictures in served requests: read on arrival, in any turn of a conversation, beside text."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import Recorder, alone, ask
from pictures import picture
from PIL import Image

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine, Video
from trimkv_export.runtime.prompts import encode_prompt
from trimkv_export.serving import GenerateRequest, RequestError, Scheduler, ServingOptions
from trimkv_export.serving.requests import media_file, parse_request


def png(rows: int, columns: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(32 * rows, 32 * columns, seed=seed)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def scheduler(visual_package: Path) -> Iterator[Scheduler]:
    options = ServingOptions(max_sequences=3, threads=1)
    scheduler = Scheduler(lambda: options.open_engine(visual_package), options)
    yield scheduler
    scheduler.close()


def test_images_beside_text_equal_single_runs(scheduler: Scheduler, visual_package: Path) -> None:
    images = [png(3, 4), png(5, 2, seed=1)]
    requests = {"none": (), "one": (images[0],), "two": tuple(images), "more": (images[1],)}
    clients = {text: ask(scheduler, text, images=found) for text, found in requests.items()}
    with Engine.open(visual_package, threads=1) as engine:
        for text, found in requests.items():
            if not found:
                assert clients[text].text == alone(engine, text)
                continue
            tokens = engine.tokenizer.encode(engine.pictures.place(text, images=len(found)))
            with engine.session() as session:
                expected = engine.tokenizer.decode(list(session.generate(tokens, 12, images=found)))
            assert clients[text].text == expected


def test_an_image_in_a_later_turn(scheduler: Scheduler, visual_package: Path) -> None:
    image = png(4, 4)
    ask(scheduler, "look", session_id="a", session_start=True, end_id=-1, max_tokens=5).wait()
    found = ask(scheduler, "at this", session_id="a", images=(image,), end_id=-1, max_tokens=5).text
    with Engine.open(visual_package, threads=1) as engine, engine.session() as session:
        first = list(session.generate(engine.tokenizer.encode("look"), 5, stop_ids=frozenset()))
        tokens = [*first[-1:], *engine.tokenizer.encode(engine.pictures.place("at this", images=1))]
        second = list(session.generate(tokens, 5, images=[image], stop_ids=frozenset()))
        assert found == engine.tokenizer.decode(second)


@pytest.mark.parametrize("image", [b"no image", png(2, 2)[:60], b"\x89PNG\r\n\x1a\n"])
def test_images_that_cannot_be_read(scheduler: Scheduler, image: bytes) -> None:
    error = ask(scheduler, "what is this?", images=(image,)).error
    assert error is not None
    assert error.kind == "invalid"
    assert ask(scheduler, "text").error is None


def animation(frames: int = 8, size: tuple[int, int] = (64, 32)) -> bytes:
    file = io.BytesIO()
    images = [Image.fromarray(picture(size[1], size[0], seed=seed)) for seed in range(frames)]
    images[0].save(file, "PNG", save_all=True, append_images=images[1:], duration=500)
    return file.getvalue()


@pytest.mark.parametrize("fields", [{}, {"video_fps": 1.0}, {"max_frames": 6}, {"images": (png(2, 2),)}])
def test_videos_equal_single_runs(scheduler: Scheduler, visual_package: Path, fields: dict[str, Any]) -> None:
    client = ask(scheduler, "What happens?", videos=(animation(),), **fields)
    video = Video(animation(), None, fields.get("video_fps"), fields.get("max_frames"))
    with Engine.open(visual_package, threads=1) as engine, engine.session() as session:
        prompt = encode_prompt(engine, "What happens?", images=fields.get("images", ()), videos=[video])
        assert client.text == engine.tokenizer.decode(list(session.generate(prompt, 12)))


def test_videos_in_messages(scheduler: Scheduler) -> None:
    content = [{"type": "video"}, {"type": "text", "text": "look"}]
    message = {"role": "user", "content": content}
    client = ask(scheduler, "", chat=True, messages=(message,), videos=(animation(4),))
    assert client.error is None
    both = ask(scheduler, "and this?", chat=True, messages=(message,), videos=(animation(4), animation(6)))
    assert both.error is None


@pytest.mark.parametrize(
    ("video", "fields", "said"),
    [
        (b"no video", {}, "cannot be read as a video or image|neither a video file nor base64"),
        (animation(4)[:300], {}, "cannot be read|damaged"),
        (b"\xff" * 300, {}, "cannot be read as a video or image"),
        (animation(1), {}, "1 frame, and a video needs at least 2"),
        (animation(4), {"max_frames": 769}, "max_frames must be at most 768 for this model, got 769"),
        (animation(4), {"video_fps": -1.0}, "video_fps must be a positive number, got -1.0"),
    ],
)
def test_videos_that_cannot_be_read(scheduler: Scheduler, video: bytes, fields: dict[str, Any], said: str) -> None:
    error = ask(scheduler, "look", videos=(video,), **fields).error
    assert error is not None
    assert error.kind == "invalid"
    assert re.search(said, str(error))
    assert ask(scheduler, "text").error is None


def test_videos_of_too_many_pixels(visual_package: Path) -> None:
    options = ServingOptions(max_sequences=1, threads=1, max_video_pixels=8 * 64 * 32, max_videos=2)
    scheduler = Scheduler(lambda: options.open_engine(visual_package), options)
    try:
        assert ask(scheduler, "look", videos=(animation(),)).error is None
        error = ask(scheduler, "look", videos=(animation(), animation(2))).error
        assert "20,480 pixels together, and this model takes at most 16,384 (max_video_pixels)" in str(error)
    finally:
        scheduler.close()


def test_a_cancelled_request_decodes_no_further(scheduler: Scheduler) -> None:
    client = Recorder(cancel_after=0)
    scheduler.submit(GenerateRequest("look", videos=(animation(30),)), client)
    assert client.error is not None
    assert client.error.kind == "cancelled"


def test_the_fields_of_videos() -> None:
    options = ServingOptions(max_videos=1, max_video_bytes=5000)
    values: dict[str, Any] = {"text_input": "x", "video": [animation(2)], "video_fps": 1.5, "max_frames": 4}
    request = parse_request(values, options)
    assert (request.videos, request.video_fps, request.max_frames) == ((animation(2),), 1.5, 4)
    for changes, said in (
        ({"video": [b"a", b"b"]}, r"video takes at most 1 videos, got 2 \(max_videos\)"),
        ({"max_frames": 1}, "max_frames must be a whole number from 2 to 65536, got 1"),
        ({"video": []}, "video_fps goes with video, got 1.5"),
        ({"video": [7]}, "video 1 must be bytes or base64, got 7"),
    ):
        with pytest.raises(RequestError, match=said):
            parse_request(values | changes, options)
    for raw, said in (
        (b"https://example.org/a.mp4", "video 1 is a URL.*data:video/mp4;base64"),
        (bytes([200]) * 5001, r"video 1 must have 1 to 5,000 bytes \(max_video_bytes\), got 5,001"),
        (b"?!", "video 1 is neither a video file nor base64 of one"),
    ):
        with pytest.raises(OptionError, match=said):
            media_file("video", 1, raw, 5000)
