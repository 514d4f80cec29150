"""Images are refused by their headers, and the large ones do not hold up the small ones."""

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import Recorder, ask
from PIL import Image, ImageFile

from trimkv_export.errors import OptionError
from trimkv_export.runtime.prompts import encode_prompt
from trimkv_export.serving import GenerateRequest, Scheduler, ServingOptions
from trimkv_export.serving.intake import image_header


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("1" if kind == "PNG" else "RGB", (width, height)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def scheduler(visual_package: Path) -> Iterator[Scheduler]:
    options = ServingOptions(max_sequences=3, threads=1, max_image_pixels=4_000_000, max_total_pixels=5_000_000)
    scheduler = Scheduler(lambda: options.open_engine(visual_package), options)
    yield scheduler
    scheduler.close()


def test_the_limit_is_the_engines_too(visual_package: Path) -> None:
    options = ServingOptions(threads=1, max_sequences=1, max_image_pixels=100_000_000)
    with options.open_engine(visual_package) as engine:
        assert engine.max_image_pixels == 100_000_000
    with pytest.raises(OptionError, match="max_image_pixels must be a whole number from 1 to 178956970"):
        ServingOptions(max_image_pixels=200_000_000)


def test_the_header_is_enough() -> None:
    assert image_header(picture(9000, 9000)[:100]) == ("PNG", 9000, 9000)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((picture(8, 8), picture(9000, 9000)), "image 2 has 9000 x 9000 pixels.*4,000,000 of a PNG"),
        ((picture(2001, 2000),), "image 1 has 2001 x 2000 pixels.*max_image_pixels"),
        ((picture(1001, 1000, "WEBP"),), "image 1 has 1001 x 1000 pixels.*1,000,000 of a WEBP"),
        ((picture(1700, 1700),) * 2, "5,780,000 pixels together.*max_total_pixels"),
    ],
)
def test_too_many_pixels(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, images: tuple[bytes, ...], message: str
) -> None:
    def decoded(self: object) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    error = ask(scheduler, "look", images=images).error
    assert error is not None
    assert error.kind == "invalid"
    assert re.search(message, str(error))


def test_large_images_hold_up_neither_small_ones_nor_text(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, may_go = threading.Event(), threading.Event()
    read = encode_prompt

    def slow(engine: object, text: str, **fields: object) -> object:
        if text == "large":
            going.set()
            assert may_go.wait(60)
        return read(engine, text, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr("trimkv_export.serving.prompt.encode_prompt", slow)
    large = [ask(scheduler, "large", images=(picture(1800, 1800),)) for _ in range(2)]
    assert going.wait(60)
    assert ask(scheduler, "small", images=(picture(64, 64),)).error is None
    assert ask(scheduler, "text").error is None
    assert not any(client.ended.is_set() for client in large)
    may_go.set()
    assert [client.error for client in large] == [None, None]


def test_between_two_images_somebody_looks_whether_the_client_is_there(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    load = ImageFile.ImageFile.load

    def noted(self: ImageFile.ImageFile) -> object:
        decoded.append(self.width)
        client.cancel_after = 0
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    client = Recorder()
    scheduler.submit(GenerateRequest("look", images=tuple(picture(64 + 32 * i, 64) for i in range(5))), client)
    assert client.error is not None
    assert client.error.kind == "cancelled"
    assert set(decoded) == {64}
