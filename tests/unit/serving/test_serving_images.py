"""Images in served requests: read on arrival, in any turn of a conversation, beside text."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import alone, ask
from pictures import picture
from PIL import Image

from trimkv_export.runtime import Engine
from trimkv_export.serving import Scheduler, ServingOptions


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
