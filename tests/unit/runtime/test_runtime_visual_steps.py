"""Pictures given to steps as patches: what is refused, and what is left when a step fails or is interrupted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import IMAGE, VISION_END, VISION_START
from visual_prompts import Conversation, image, prompt, snapshot, step_by_hand

from trimkv_export.errors import EngineError, OptionError
from trimkv_export.runtime import Engine
from trimkv_export.runtime.vision_tower import VisionTower

PATCH_DIM = 1536


@pytest.fixture
def talk(visual_package: Path) -> Iterator[Conversation]:
    with Engine.open(visual_package, max_sessions=3, threads=1) as engine:
        yield Conversation(engine)


def raw(rows: int = 4, columns: int = 6, frames: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """pixel_values and image_grid_thw of a random picture of rows x columns patches."""
    patches = frames * rows * columns
    values = np.random.default_rng(patches).standard_normal((patches, PATCH_DIM))
    return values.astype(np.float32), np.array([[frames, rows, columns]], np.int64)


def with_value(value: float) -> NDArray[np.float64]:
    values = raw()[0].astype(np.float64)
    values[3, 5] = value
    return values


STEPS: list[tuple[Any, Any, str]] = [
    (raw()[0], None, "go together; give both"),
    (None, raw()[1], "go together; give both"),
    (raw()[0][:-1], raw()[1], r"floats of shape \[24, 1536\] for these grids, got float32 of \[23, 1536\]"),
    (raw()[0][:, :-1], raw()[1], r"got float32 of \[24, 1535\]"),
    (raw()[0].reshape(-1), raw()[1], r"got float32 of \[36864\]"),
    (raw()[0][None], raw()[1], r"got float32 of \[1, 24, 1536\]"),
    (raw()[0].astype(np.int64), raw()[1], "floats of shape .* got int64"),
    (raw()[0].astype(np.uint8), raw()[1], "floats of shape .* got uint8"),
    (raw()[0].astype(np.complex64), raw()[1], "floats of shape .* got complex64"),
    ([[1.0], [1.0, 2.0]], raw()[1], "must be arrays, got lists of unequal length"),
    (raw()[0], [[1, 4], [6]], "must be arrays, got lists of unequal length"),
    (raw()[0], raw()[1][0], r"whole numbers above 0 of shape \[pictures, 3\]"),
    (raw()[0], raw()[1][:, :2], r"whole numbers above 0 of shape \[pictures, 3\]"),
    (raw()[0], raw()[1].astype(float), "whole numbers above 0"),
    (raw()[0], -raw()[1], "whole numbers above 0"),
    (raw()[0], raw()[1] * [1, 0, 1], "whole numbers above 0"),
    (raw()[0], "none", "whole numbers above 0"),
    (raw(3, 8)[0], raw(3, 8)[1], r"h and w multiples of 2; got \(1, 3, 8\)"),
    (raw(14, 12)[0], raw(14, 12)[1], "takes 42 tokens, and the package was built for at most 40"),
    # Products beyond 64 bits, which NumPy would take for 0.
    (raw()[0][:0], [[2, 1 << 32, 1 << 31]], r"of shape \[18446744073709551616, 1536\]"),
    (raw()[0][:0], [[1 << 61, 4, 2]], r"of shape \[18446744073709551616, 1536\]"),
    # The cache would keep them, and whatever is computed from them.
    (with_value(np.nan), raw()[1], "pixel_values must be finite"),
    (with_value(np.inf), raw()[1], "pixel_values must be finite"),
    (with_value(1e39), raw()[1], "pixel_values must be finite"),
]


@pytest.mark.parametrize("case", range(len(STEPS)))
def test_bad_pixel_values(talk: Conversation, case: int) -> None:
    values, grids, said = STEPS[case]
    with talk.unchanged(), pytest.raises(OptionError, match=said):
        talk.session.step([VISION_START, *[IMAGE] * 6, VISION_END], values, grids)


@pytest.mark.parametrize(
    ("tokens", "count", "said"),
    [
        ([1, 2], 1, "the last of the 1 pictures given has no token here"),
        ([IMAGE] * 6, 2, "the last of the 2 pictures given has no token here"),
        ([IMAGE] * 3 + [1], 1, "token 3 of this step is text, but the image before it has 3 more tokens"),
        ([IMAGE] * 7, 1, "token 6 of this step stands for an image that was not given"),
        ([IMAGE] * 6 + [999], 1, "from 0 to 262, got 999"),
        ([], 1, "1 to 16 tokens"),
        ([IMAGE] * 17, 1, "1 to 16 tokens"),
    ],
)
def test_steps_and_pictures_that_do_not_fit(talk: Conversation, tokens: list[int], count: int, said: str) -> None:
    values, grids = raw()
    with talk.unchanged(), pytest.raises(OptionError, match=said):
        talk.session.step(tokens, np.concatenate([values] * count), np.concatenate([grids] * count))


def test_what_a_step_takes(talk: Conversation) -> None:
    """Lists, other floats and no pictures at all are fine."""
    values, grids = raw()
    tokens = [VISION_START, *[IMAGE] * 6, VISION_END]
    with talk.engine.session() as session:
        expected = session.step(tokens, values, grids)
    forms: list[tuple[Any, Any]] = [
        (values.astype(np.float64), grids.astype(np.int32)),
        (values.tolist(), grids.tolist()),
        (np.asfortranarray(values), grids.astype(np.uint8)),
    ]
    for given in forms:
        with talk.engine.session() as session:
            assert session.step(tokens, *given).tobytes() == expected.tobytes()
            session.step([1], np.zeros((0, PATCH_DIM), np.float32), np.zeros((0, 3), np.int64))


def test_a_video_may_go_on_in_later_steps(talk: Conversation) -> None:
    session, (values, grids) = talk.engine.session(), raw(2, 4, frames=3)
    session.step([VISION_START, IMAGE], values, grids)
    session.step([IMAGE, 1])
    assert session.next_position == 1 + 2 + 1
    session.step([IMAGE, IMAGE, 2, IMAGE])
    with pytest.raises(OptionError, match="is text, but the image before it has 1 more tokens"):
        session.step([2])
    session.step([IMAGE, 2])
    assert session.next_position == 1 + 3 * 2 + 3
    assert session.tokens_seen == 10


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop, RuntimeError])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_interrupted_between_steps(talk: Conversation, kind: type[BaseException], steps: int) -> None:
    """What was fed stays; what was left of the pictures is dropped, and the next prompt gets its own."""
    read = prompt(talk.engine, 3, image(5, 8), 1, image(2, 3, 1), 1)
    seen, position = talk.session.tokens_seen, talk.session.next_position

    def stop(done: int, _: int) -> None:
        if done == 16 * steps:
            raise kind

    with pytest.raises(kind):
        talk.session.prefill(read, progress=stop)
    assert talk.session.tokens_seen == seen + 16 * steps
    # Behind the first image, of 8 positions; 48 tokens end behind the first token of the second one.
    position += 4 + 8 + (3 + 3 if steps == 3 else 0)
    assert talk.session.next_position == position
    feed = talk.session._visual
    assert feed is not None
    assert (feed.empty, feed._features, len(feed._waiting)) == (True, None, 0)
    state = {name: array.copy() for name, array in talk.session.state.items()}
    following = prompt(talk.engine, 1, image(3, 2, 9), 2)
    logits = talk.session.prefill(following)
    # The same as a session with this cache and position that never had these pictures.
    other = talk.engine.session()
    for name, array in other.state.items():
        array[...] = state[name]
    other.tokens_seen = seen + 16 * steps
    assert other._visual is not None
    other._visual.positions.next_position = position
    assert other.prefill(following).tobytes() == logits.tobytes()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("call", ["prefill", "generate", "step"])
def test_a_vision_tower_that_fails_or_is_interrupted(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], call: str
) -> None:
    read = prompt(talk.engine, 1, image(1, 2), image(2, 3))

    def fail(self: VisionTower, patches: NDArray[np.float32], grid: Any) -> Any:
        if grid == (1, 2, 4):
            return encode(self, patches, grid)
        raise kind("no memory")

    encode = VisionTower.encode
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: talk.session.prefill(read),
        "generate": lambda: next(iter(talk.session.generate(read, 1))),
        "step": lambda: step_by_hand(talk.session, read, 0, len(read.tokens)),
    }
    with talk.unchanged(), monkeypatch.context() as patch:
        patch.setattr(VisionTower, "encode", fail)
        if kind is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                calls[call]()
        else:
            with pytest.raises(EngineError, match="the vision tower failed on 1 frames of 4 x 6 patches: no memory"):
                calls[call]()


def test_a_vision_tower_that_fails_later(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first image is in the cache by then; the conversation goes on behind it."""
    read = prompt(talk.engine, 3, image(4, 6), image(2, 3))
    encode, seen, position = VisionTower.encode, talk.session.tokens_seen, talk.session.next_position

    def fail(self: VisionTower, patches: NDArray[np.float32], grid: Any) -> Any:
        if grid == (1, 8, 12):
            return encode(self, patches, grid)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(VisionTower, "encode", fail)
        with pytest.raises(EngineError, match="the vision tower failed"):
            talk.session.prefill(read)
    assert talk.session.tokens_seen == seen + 16  # its last tokens are of the step that failed
    assert talk.session.next_position == position + 4 + 6
    assert np.isfinite(talk.session.prefill(read)).all()


def test_a_step_in_the_middle_of_a_video_that_fails(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be tried again."""
    session, other, (values, grids) = talk.engine.session(), talk.engine.session(), raw(10, 16, frames=2)
    parts = [[VISION_START, *[IMAGE] * 15], [IMAGE] * 16, [*[IMAGE] * 9, 1, *[IMAGE] * 6]]
    for part in parts[:2]:
        given = (values, grids) if part is parts[0] else (None, None)
        session.step(part, *given)
        other.step(part, *given)
    before = snapshot(session)
    with monkeypatch.context() as patch:
        patch.setattr(VisionTower, "encode", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(EngineError, match="the vision tower failed on 1 frames of 10 x 16 patches: division"):
                session.step(parts[2])
            assert snapshot(session) == before
    assert session.step(parts[2]).tobytes() == other.step(parts[2]).tobytes()
    assert snapshot(session) == snapshot(other)


def test_an_engine_that_fails_in_an_image_needs_a_reset(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(talk.engine, "run", fail)
        with pytest.raises(EngineError, match="failed in a step of 15 tokens: out of memory"):
            talk.session.prefill(talk.turns)
    with pytest.raises(EngineError, match="call reset"):
        talk.session.prefill(talk.turns)
    talk.session.reset()
    with talk.engine.session() as other:
        assert talk.session.prefill(talk.turns).tobytes() == other.prefill(talk.turns).tobytes()


def test_closed_sessions_and_engines(visual_package: Path) -> None:
    with Engine.open(visual_package, threads=1) as engine:
        read = prompt(engine, 1, image(1, 2))
        session = engine.session()
        step_by_hand(session, read, 0, 3)
        session.close()
        with pytest.raises(EngineError, match="this session was closed"):
            session.prefill(read)
        with pytest.raises(EngineError, match="this session was closed"):
            session.prefill([IMAGE], [image(1, 1)])
        last = engine.session()
    with pytest.raises(EngineError, match="was closed"):
        last.prefill([IMAGE], [image(1, 1)])
    last.close()
