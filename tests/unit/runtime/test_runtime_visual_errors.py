"""A picture that cannot be used is one clear error, and the conversation goes on as if it had not been given."""

import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import picture
from PIL import Image
from support import IMAGE, VIDEO, VISION_END, VISION_START
from visual_prompts import Conversation, by_hand, image, step_by_hand, video

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine, Video, VisualPrompt

PLACE = [VISION_START, IMAGE, VISION_END]


@pytest.fixture
def talk(visual_package: Path) -> Iterator[Conversation]:
    with Engine.open(visual_package, max_sessions=3, threads=1) as engine:
        yield Conversation(engine)


def png(pixels: NDArray[Any]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def huge() -> bytes:
    """A file whose header says 20,000 x 20,000 pixels."""
    whole = bytearray(png(picture(8, 8)))
    whole[16:24] = (20_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


GOOD = png(picture(64, 96))
BAD: dict[str, tuple[bytes | None, str]] = {
    "empty.png": (b"", "is empty"),
    "truncated.png": (GOOD[: len(GOOD) // 2], "damaged or incomplete"),
    "header only.png": (GOOD[:33], "cannot be read as an image|not an image of a known format"),
    "broken.png": (GOOD[:200] + b"\0" * 400 + GOOD[600:], "cannot be read as an image"),
    "text.png": (b"This is no picture.", "not an image of a known format"),
    "huge.png": (huge(), "too large"),
    "thin.png": (png(picture(1, 201)), "sides differ by more than a factor of 200"),
    "svg.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
    "missing.png": (None, "does not exist"),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_files(talk: Conversation, tmp_path: Path, name: str, second: bool) -> None:
    content, said = BAD[name]
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    tokens, images = [*PLACE, 5], [file]
    if second:
        (tmp_path / "good.png").write_bytes(GOOD)
        tokens, images = [*PLACE, *tokens], [tmp_path / "good.png", file]
    with talk.unchanged():
        with pytest.raises(OptionError, match=said) as error:
            talk.session.prefill(tokens, images)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
        with pytest.raises(OptionError, match=said):
            list(talk.session.generate(tokens, 3, images=images))
        if content:
            with pytest.raises(OptionError, match=said):
                talk.session.prefill([*PLACE, 5], [content])


def test_other_things_that_are_no_images(talk: Conversation, tmp_path: Path) -> None:
    things: list[tuple[Any, str]] = [
        (tmp_path, "Is a directory"),
        ("https://example.org/cat.png", "is a URL"),
        (None, "an image must be a path"),
        (7, "an image must be a path"),
        (np.zeros((4, 4, 3), np.float32), "must hold uint8"),
        (np.zeros((5, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros(4, np.uint8), "must be"),
        (Video(tmp_path), "an image must be a path"),
    ]
    with talk.unchanged():
        for thing, said in things:
            with pytest.raises(OptionError, match=said):
                talk.session.prefill(PLACE, [thing])


@pytest.mark.parametrize("pixels", [(1, 1), (1, 200), (7, 5), (31, 33)])
def test_tiny_images_are_images(talk: Conversation, pixels: tuple[int, int]) -> None:
    before = talk.session.tokens_seen
    assert np.isfinite(talk.session.prefill(PLACE, [picture(*pixels)])).all()
    assert talk.session.tokens_seen >= before + 3


def test_large_images_are_scaled_down(talk: Conversation) -> None:
    for height, width in ((700, 900), (64, 6400), (2000, 1000)):
        before = talk.session.tokens_seen
        talk.session.prefill(PLACE, [picture(height, width)])
        assert before + 2 < talk.session.tokens_seen <= before + 2 + 40


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_other_modes(talk: Conversation, tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(picture(64, 96))
    if mode in ("LA", "RGBA"):
        source.putalpha(Image.fromarray(picture(64, 96, seed=1)[..., 0]))
    if mode == "I;16":
        made = Image.fromarray(picture(64, 96)[..., 0].astype(np.uint16) * 257)  # what 8 bits become
        plain = picture(64, 96)[..., 0]
    else:
        made = source.convert(mode)
        white = Image.new("RGBA", made.size, "white")
        flat = Image.alpha_composite(white, made.convert("RGBA")) if mode in ("LA", "RGBA") else made
        plain = np.asarray(flat.convert("RGB"))
    file = tmp_path / ("picture.tiff" if mode in ("CMYK", "I;16") else "picture.png")
    made.save(file)
    logits = []
    for given in (file, str(file), file.read_bytes(), made, plain):
        with talk.engine.session() as session:
            logits.append(session.prefill([1, *PLACE, 2], [given]).tobytes())
    assert len(set(logits)) == 1


@pytest.mark.parametrize(
    ("tokens", "images", "videos", "said"),
    [
        ([1, *PLACE], 2, 0, "has 1 image placeholder and 2 images were given"),
        ([*PLACE, 1, *PLACE], 1, 0, "has 2 image placeholders and 1 image was given"),
        ([1, 2], 1, 0, "has 0 image placeholders and 1 image was given"),
        ([VIDEO], 1, 0, "has 0 image placeholders and 1 image was given"),
        (PLACE, 0, 1, "has 1 image placeholder and 0 images were given"),
        ([1], 0, 1, "has 0 video placeholders and 1 video was given"),
        ([VIDEO, 1, VIDEO], 0, 1, "has 2 video placeholders and 1 video was given"),
        ([*PLACE, VIDEO], 1, 0, "has 1 video placeholder and 0 videos were given"),
        ([1, IMAGE], 0, 0, "token 1 of this step stands for an image that was not given"),
        ([VIDEO], 0, 0, "token 0 of this step stands for an image that was not given"),
        ([1] * 30 + [IMAGE], 0, 0, "token 30 of this step stands for"),
        ([IMAGE, IMAGE], 1, 0, "image 1 has 6 tokens, and its place in the prompt 2"),
        ([IMAGE] * 7, 1, 0, "image 1 has 6 tokens, and its place in the prompt 7"),
        ([IMAGE, IMAGE], 3, 0, "has 1 image placeholder and 3 images were given"),  # one run is one place
        ([*PLACE, 263], 1, 0, "from 0 to 262, got 263"),
        ([*PLACE, -1], 1, 0, "from 0 to 262, got -1"),
        ([*PLACE, 1.0], 1, 0, "token ids are whole numbers"),
        ([*PLACE, "1"], 1, 0, "token ids are whole numbers"),
        ([], 1, 0, "0 image placeholders"),
    ],
)
def test_prompts_and_pictures_that_do_not_fit(
    talk: Conversation, tokens: Any, images: int, videos: int, said: str
) -> None:
    pictures, clips = [image(2, 3)] * images, [video(2, 1, 2)] * videos
    with talk.unchanged():
        with pytest.raises(OptionError, match=said):
            talk.session.prefill(tokens, pictures, clips)
        with pytest.raises(OptionError, match=said):
            next(iter(talk.session.generate(tokens, 2, images=pictures, videos=clips)))


@pytest.mark.parametrize(
    ("images", "videos", "said"),
    [
        (image(1, 1), None, "images must be a list, got ndarray; put a single one into a list"),
        ("photo.jpg", None, "images must be a list, got str"),
        (b"photo", None, "images must be a list, got bytes"),
        (Path("photo.jpg"), None, "images must be a list, got PosixPath"),
        (Image.new("RGB", (4, 4)), None, "images must be a list, got Image"),
        (None, Video("folder"), "videos must be a list, got Video"),
        (None, ["folder"], "a video is given as Video.source, fps., got str"),
        (None, [Video("/no/such/folder")], "/no/such/folder does not exist"),
        (None, [Video([image(1, 1)], 1.0)], "has 1 frame, and a video needs at least 2"),
        (None, [Video([image(1, 1)] * 2)], "has no times: say with fps"),
        (None, [Video([image(1, 1)] * 2, -1.0)], "fps must be a positive number, got -1.0"),
        (None, [Video([image(1, 1), image(1, 2)], 1.0)], "all frames of a video must have one size"),
        (None, [Video([image(1, 1), b"bad"], 1.0)], "not an image of a known format"),
    ],
)
def test_bad_lists_of_pictures(talk: Conversation, images: Any, videos: Any, said: str) -> None:
    with talk.unchanged(), pytest.raises(OptionError, match=said):
        talk.session.prefill([VISION_START, VIDEO if images is None else IMAGE, VISION_END], images, videos)


def test_a_prompt_that_was_read_takes_no_more_pictures(talk: Conversation) -> None:
    with talk.unchanged():
        with pytest.raises(OptionError, match="the prompt comes with its pictures"):
            talk.session.prefill(talk.turns, [image(1, 1)])
        with pytest.raises(OptionError, match="the prompt comes with its pictures"):
            talk.session.generate(talk.turns, 1, videos=[video(2, 1, 1)])


def test_prompts_that_end_inside_a_picture(talk: Conversation) -> None:
    """Of such a prompt something would be left for the next one."""
    with talk.unchanged():
        for end, left in ((4, 6), (5, 5), (9, 1)):
            cut = VisualPrompt(talk.turns.tokens[:end], talk.turns.pictures, talk.turns.starts)
            said = "no token here" if left == 6 else f"ends with {left} tokens of a picture still to come"
            with pytest.raises(OptionError, match=said):
                talk.session.prefill(cut)
            with pytest.raises(OptionError, match=said):
                next(iter(talk.session.generate(cut, 1)))


def test_generation_starts_behind_pictures(talk: Conversation) -> None:
    session, whole = talk.engine.session(), talk.engine.session()
    step_by_hand(session, talk.turns, 0, 6)
    with pytest.raises(OptionError, match="ends with 2 tokens of a picture still to come; feed them too"):
        next(iter(session.generate([IMAGE, IMAGE], 2)))
    by_hand(whole, talk.turns, [6])
    session.prefill([IMAGE] * 2)  # part of what is left may come in any step
    session.prefill([IMAGE] * 2)
    session.prefill(talk.turns.tokens[10:])
    assert session.next_position == whole.next_position
    assert session.tokens_seen == len(talk.turns.tokens)
