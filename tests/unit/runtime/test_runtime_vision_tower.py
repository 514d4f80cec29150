"""Sessions with pictures: cut anywhere, in any turn, beside other sessions, saved and resumed."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capturing import capturing
from numpy.typing import NDArray
from support import (
    IMAGE,
    KERNELS,
    MAX_IMAGE_TOKENS,
    NATIVE_MODE,
    VIDEO,
    VISION_END,
    VISION_START,
    build,
    random_tokens,
)
from visual_prompts import by_hand, image, prompt, snapshot, step_by_hand, video

from trimkv_export.backends.native import find_library
from trimkv_export.errors import EngineError, OptionError
from trimkv_export.runtime import Engine, SamplingOptions, Session, VisualPrompt
from trimkv_export.runtime.vision_tower import VisionTower

ROWS = 4
ROUNDING = 2e-5  # steps of other lengths go through other matrix kernels
NO_STOP: frozenset[int] = frozenset()


@pytest.fixture(params=KERNELS)
def seeing(visual_package: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Four rows, budget 8, evict every 4, steps of up to 16 tokens."""
    with Engine.open(visual_package, native=NATIVE_MODE[request.param], max_sessions=ROWS, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def roomy(visual_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Engine]]:
    """By prefill chunk, engines that evict nothing in these tests."""
    folder, engines = tmp_path_factory.mktemp("roomy"), {}
    for chunk in (16, 256):
        path = build(visual_checkpoint, folder / str(chunk), budget=256, prefill_chunk=chunk, max_image_tokens=40).path
        engines[chunk] = Engine.open(path, max_sessions=ROWS, threads=1)
    yield engines
    for engine in engines.values():
        engine.close()


def several(engine: Engine) -> VisualPrompt:
    """94 tokens: text, an image of 6 tokens, text, one of 40, no text, one of 1, a video of 2 x 4, text."""
    return prompt(engine, 5, image(2, 3), 3, image(5, 8), image(1, 1, 1), 2, video(4, 2, 2), 4)


def test_prefill_is_steps_of_the_chunk(seeing: Engine) -> None:
    one, other, again = (seeing.session() for _ in range(3))
    read, progress = several(seeing), []
    logits = one.prefill(read, progress=lambda done, total: progress.append((done, total)))
    assert progress == [*((n, len(read.tokens)) for n in range(16, len(read.tokens), 16)), (len(read.tokens),) * 2]
    assert by_hand(other, read, [16])[-1].tobytes() == logits.tobytes()
    assert snapshot(one) == snapshot(other)
    assert one.evictions > 5
    place = [VISION_START, IMAGE, VISION_END]
    tokens = [*random_tokens(3), *place, 7, *place]
    images = [image(2, 3), image(1, 4)]
    expected = by_hand(again, seeing.pictures.read(tokens, images), [16])[-1]
    one.reset()
    assert one.prefill(tokens, images).tobytes() == expected.tobytes()
    assert snapshot(one) == snapshot(again)


def test_positions_are_less_than_tokens(seeing: Engine) -> None:
    session, read = seeing.session(), several(seeing)
    expected = session.position_after(read)
    session.prefill(read)
    # An image of h x w tokens moves the position on by max(h, w); each of the video's two frames by 2, not 4.
    saved = (6 - 3) + (40 - 8) + 0 + 2 * (4 - 2)
    assert session.tokens_seen == len(read.tokens)
    assert session.next_position == expected == len(read.tokens) - saved
    assert session.kept()[:, 2].max() < session.tokens_seen


def test_tokens_that_are_expanded_already(seeing: Engine) -> None:
    read, images, videos = several(seeing), [image(2, 3), image(5, 8), image(1, 1, 1)], [video(4, 2, 2)]
    short, long = seeing.session(), seeing.session()
    expected = short.prefill(read)
    assert np.array_equal(long.prefill(np.array(read.tokens, np.int32), images, videos), expected)  # type: ignore[arg-type]
    assert snapshot(long) == snapshot(short)


def test_borders_anywhere(roomy: dict[int, Engine]) -> None:
    """Nothing is evicted, so steps of any length give the same to rounding."""
    read = several(roomy[256])
    whole = roomy[256].session()
    expected = whole.prefill(read)
    assert whole.tokens_seen == len(whole.kept()) // 6 == len(read.tokens)
    rng = np.random.default_rng(0)
    for chunk, lengths in ((16, [16]), (16, [1]), (16, [7, 1, 1]), (256, rng.integers(1, 30, 9)), (256, [60, 1])):
        with roomy[chunk].session() as cut:
            logits = by_hand(cut, read, [int(length) for length in lengths])[-1]
            np.testing.assert_allclose(logits, expected, atol=ROUNDING)
            assert (cut.evictions, cut.next_position) == (0, whole.next_position)
            assert np.array_equal(cut.kept(), whole.kept())
    whole.close()


def test_every_place_of_one_cut(roomy: dict[int, Engine]) -> None:
    read = prompt(roomy[256], 2, image(2, 3), image(1, 2, 1), video(2, 1, 2), 1)
    with roomy[256].session() as session:
        expected = session.prefill(read)
        for cut in range(1, len(read.tokens)):
            session.reset()
            step_by_hand(session, read, 0, cut)
            logits = step_by_hand(session, read, cut, len(read.tokens))
            np.testing.assert_allclose(logits, expected, atol=ROUNDING, err_msg=str(cut))


def test_each_token_of_an_image_counts(roomy: dict[int, Engine]) -> None:
    """Else the comparisons here would prove little: another picture, order or size gives other logits."""
    engine, base = roomy[256], image(2, 4)
    pictures: list[list[NDArray[np.uint8]]] = [[base, image(1, 1)], [image(1, 1), base], [base[:, ::-1], image(1, 1)]]
    for row, column in np.ndindex(2, 4):
        changed = base.copy()
        changed[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] //= 2
        pictures.append([changed, image(1, 1)])
    pictures.append([image(4, 2), image(1, 1)])
    logits = []
    for first, second in pictures:
        with engine.session() as session:
            logits.append(session.prefill(prompt(engine, 2, first, 2, second, 2)))
    for number, one in enumerate(logits):
        assert all(np.abs(one - other).max() > 1e-3 for other in logits[:number])


def test_later_turns(seeing: Engine) -> None:
    session, flat = seeing.session(), seeing.session()
    first, second = prompt(seeing, 4, image(2, 2), 3), prompt(seeing, 1, image(3, 2, 5), image(1, 3), seed=7)
    new = list(session.generate(first, 6, stop_ids=NO_STOP))
    answer = [int(by_hand(flat, first, [16])[-1].argmax())]
    while len(answer) < 6:
        answer.append(int(flat.step(answer[-1:]).argmax()))
    assert new == answer
    assert snapshot(session) == snapshot(flat)
    after = [*new[-1:], *second.tokens]  # the last token was not fed
    logits = session.prefill(after, [image(3, 2, 5), image(1, 3)])
    read = seeing.pictures.read(after, [image(3, 2, 5), image(1, 3)])
    assert np.array_equal(by_hand(flat, read, [16])[-1], logits)
    assert snapshot(session) == snapshot(flat)
    third = list(session.generate([5, 6], 3, stop_ids=NO_STOP))
    assert third == list(flat.generate([5, 6], 3, stop_ids=NO_STOP))


def test_generate_takes_pictures(seeing: Engine) -> None:
    one, other = seeing.session(), seeing.session()
    tokens = [1, VISION_START, IMAGE, VISION_END, 2, VISION_START, VIDEO, VISION_END]
    new = list(one.generate(tokens, 5, images=[image(2, 2)], videos=[video(4, 1, 2)], stop_ids=NO_STOP))
    assert new == list(other.generate(prompt(seeing, [1], image(2, 2), [2], video(4, 1, 2)), 5, stop_ids=NO_STOP))
    assert snapshot(one) == snapshot(other)


@pytest.mark.parametrize("frames", [2, 3, 8])
def test_videos_in_groups_of_frames(seeing: Engine, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many frames go through the tower together, and however the steps cut them."""
    read = prompt(seeing, 3, video(frames, 2, 3), 2)
    picture = read.pictures[0]
    assert picture.grid == (-(-frames // 2), 4, 6)
    times = seeing.tokenizer.encode("<0.2 seconds>", add_special_tokens=False)
    assert list(read.tokens[3 : 3 + len(times)]) == times
    encode, calls = VisionTower.encode, []

    def counted(self: VisionTower, patches: NDArray[np.float32], grid: Any) -> Any:
        calls.append(grid)
        return encode(self, patches, grid)

    monkeypatch.setattr(VisionTower, "encode", counted)
    together, single = seeing.session(), seeing.session()
    expected = together.prefill(read)
    assert calls == [picture.grid]
    calls.clear()
    monkeypatch.setattr(VisionTower, "frames_at_once", lambda *_: 1)
    np.testing.assert_allclose(single.prefill(read), expected, atol=ROUNDING)
    assert calls == [(1, 4, 6)] * picture.grid[0]
    assert np.array_equal(single.kept(), together.kept())


def test_a_frame_as_large_as_the_limit_goes_alone(seeing: Engine) -> None:
    session, read = seeing.session(), prompt(seeing, video(6, 5, 8))
    assert session._visual is not None
    tower = seeing.vision
    assert tower is not None
    assert tower.frames_at_once(read.pictures[0].grid) == 1
    assert tower.frames_at_once((3, 2, 2)) == MAX_IMAGE_TOKENS
    session.prefill(read)
    assert session._visual.empty


def test_an_image_is_encoded_once_and_let_go(seeing: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session, read = seeing.session(), prompt(seeing, 2, image(5, 8), 2)
    encode, calls = VisionTower.encode, itertools.count()

    def counted(self: VisionTower, *given: Any) -> Any:
        next(calls)
        return encode(self, *given)

    monkeypatch.setattr(VisionTower, "encode", counted)
    by_hand(session, read, [1])
    feed = session._visual
    assert feed is not None
    assert next(calls) == 1
    assert (feed.empty, feed._features, len(feed._waiting), feed.count) == (True, None, 0, 0)


@pytest.mark.parametrize("how", ["generate", "prefill"])
def test_pixels_are_not_held_once_they_are_fed(seeing: Engine, how: str) -> None:
    session, read = seeing.session(), prompt(seeing, 2, image(5, 8), image(2, 2), 2)
    pixels = [weakref.ref(picture) for picture in read.pictures]
    if how == "prefill":
        session.prefill(read)
        del read
    else:
        answer = session.generate(read, 9, stop_ids=NO_STOP)
        del read
        next(answer)
    gc.collect()
    assert [found() for found in pixels] == [None, None]


def plan(engine: Engine, row: int) -> VisualPrompt:
    """What one row reads; some rows see nothing, or nothing for long."""
    parts: list[tuple[Any, ...]] = [
        (3, image(2, 3), 9, image(5, 8, 1), 8),
        (60,),
        (20, image(1, 1), 1, video(4, 2, 2), 20),
        (image(4, 4), 50),
    ]
    return prompt(engine, *parts[row], seed=10 * row)


def test_rows_with_and_without_pictures_equal_single_runs(seeing: Engine) -> None:
    """Rows out of phase: in the middle of an image, decoding, reading text, idle. Pictures begin with `step`."""
    rng = np.random.default_rng(0)
    reads = [plan(seeing, row) for row in range(ROWS)]
    sessions, at = [seeing.session() for _ in reads], [0] * ROWS
    steps: list[list[tuple[int, int, Any, Any]]] = [[] for _ in reads]
    mixed = 0
    while any(at[row] < len(read.tokens) for row, read in enumerate(reads)):
        work: list[tuple[int, int, int]] = []
        for row, read in enumerate(reads):
            length = int(rng.choice([0, 1, 1, 1, 1, int(rng.integers(2, 17))]))
            end = min(at[row] + length, len(read.tokens))
            if any(at[row] <= begun[0] < end for begun in read.starts):
                logits = step_by_hand(sessions[row], read, at[row], end)
                steps[row].append((at[row], end, logits, sessions[row].kept()))
                at[row] = end
            elif end > at[row]:
                work.append((row, at[row], end))
        mixed += len({reads[row].tokens[start] in (IMAGE, VIDEO) for row, start, _ in work}) > 1
        found = seeing.step_many([(sessions[row], reads[row].tokens[start:end]) for row, start, end in work])
        for (row, start, end), logits in zip(work, found, strict=True):
            steps[row].append((start, end, logits, sessions[row].kept()))
            at[row] = end
    assert mixed > 5
    for session in sessions:
        session.close()
    for read, taken in zip(reads, steps, strict=True):
        with seeing.session() as alone:
            for start, end, logits, kept in taken:
                np.testing.assert_allclose(step_by_hand(alone, read, start, end), logits, atol=ROUNDING)
                np.testing.assert_array_equal(alone.kept(), kept)
            assert alone.evictions > 3


def test_step_many_checks_all_rows_first(seeing: Engine) -> None:
    inside, text = seeing.session(), seeing.session()
    read = prompt(seeing, 2, image(2, 3), 2)
    step_by_hand(inside, read, 0, 5)  # two of six tokens
    before = snapshot(inside), snapshot(text)
    with pytest.raises(OptionError, match="is text, but the image before it has 4 more tokens"):
        seeing.step_many([(text, [1]), (inside, [1])])
    with pytest.raises(OptionError, match="stands for an image that was not given"):
        seeing.step_many([(inside, [IMAGE]), (text, [IMAGE])])
    assert (snapshot(inside), snapshot(text)) == before
    seeing.step_many([(text, [1]), (inside, [IMAGE])])
    assert inside.tokens_seen == 6


@pytest.mark.parametrize("budget", [8, 3])
def test_saved_and_restored(visual_package: Path, seeing: Engine, tmp_path: Path, budget: int) -> None:
    turns = [(3, image(2, 3), 4), (2,), (image(4, 2, 3), 5, image(1, 2)), (1, video(4, 2, 2), 2)]
    reads = [prompt(seeing, *parts, seed=number) for number, parts in enumerate(turns)]
    unbroken, session = seeing.session(budget), seeing.session(budget)
    native = "require" if seeing.native else "off"
    for number, read in enumerate(reads):
        expected = unbroken.prefill(read)
        if number == 1:  # where no picture is needed, no tower is
            with Engine.open(visual_package, native=native, threads=1, vision=False) as blind:
                session = blind.restore(tmp_path / "session")
                assert session.prefill(read).tobytes() == expected.tobytes()
                session.save(tmp_path / "session")
            session = seeing.restore(tmp_path / "session")
        else:
            assert session.prefill(read).tobytes() == expected.tobytes()
            session.save(tmp_path / "session")
            session.close()
            session = seeing.restore(tmp_path / "session")
        assert snapshot(session) == snapshot(unbroken)
        assert session.next_position < session.tokens_seen
        assert (session.budget, session.evictions) == (budget, unbroken.evictions)
    assert session.step([3]).tobytes() == unbroken.step([3]).tobytes()


def test_not_saved_in_the_middle_of_an_image(seeing: Engine, tmp_path: Path) -> None:
    session, read = seeing.session(), prompt(seeing, 2, image(2, 3), 2)
    for end in range(4, 9):  # after one to five of six tokens
        step_by_hand(session, read, 0 if end == 4 else end - 1, end)
        with pytest.raises(EngineError, match=f"{9 - end} tokens of an image still to come; feed them before"):
            session.save(tmp_path / "session")
    assert not list(tmp_path.iterdir())
    step_by_hand(session, read, 8, 9)
    session.save(tmp_path / "session")
    restored = seeing.restore(tmp_path / "session")
    assert step_by_hand(restored, read, 9, 12).tobytes() == step_by_hand(session, read, 9, 12).tobytes()


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_row_left_in_the_middle_of_an_image_knows_nothing(seeing: Engine, how: str) -> None:
    others = [seeing.session() for _ in range(ROWS - 1)]
    read, half = prompt(seeing, 2, image(2, 3, 1), 2), prompt(seeing, 2, image(2, 3), image(5, 8), 2)
    expected = others[0].prefill(read)
    session = seeing.session()
    step_by_hand(session, half, 0, 12)
    row = session.row
    if how == "close":
        session.close()
        session = seeing.session()
        assert session.row == row
    else:
        session.reset()
    assert (session.tokens_seen, session.next_position, len(session.kept())) == (0, 0, 0)
    with pytest.raises(OptionError, match="stands for an image that was not given"):
        session.step([IMAGE])
    session.step([1])
    session.reset()
    assert session.prefill(read).tobytes() == expected.tobytes()
    assert snapshot(session)["kept"] == snapshot(others[0])["kept"]


@pytest.mark.parametrize("budget", [1, 5])
def test_a_smaller_budget_is_one_built_smaller(
    seeing: Engine, visual_checkpoint: Path, tmp_path: Path, budget: int
) -> None:
    path = build(visual_checkpoint, tmp_path / "package", budget=budget, max_image_tokens=40).path
    with Engine.open(path, threads=1) as small, small.session() as other, seeing.session(budget) as session:
        for read in (several(seeing), prompt(seeing, image(4, 4), 3)):
            np.testing.assert_allclose(session.prefill(read), other.prefill(read), atol=1e-5)
            assert np.array_equal(session.kept(), other.kept())
            np.testing.assert_allclose(session.step([1]), other.step([1]), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_placeholders_are_never_chosen(seeing: Engine, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Session._step

    def biased(self: Session, tokens: Any) -> NDArray[np.float32]:
        logits = plain(self, tokens)
        logits[[IMAGE, VIDEO]] = 1e4
        return logits

    monkeypatch.setattr(Session, "_step", biased)
    session, options = seeing.session(), SamplingOptions(temperature, seed=0, repetition_penalty=1.2)
    assert int(session.prefill(several(seeing)).argmax()) in (IMAGE, VIDEO)
    new = list(session.generate(several(seeing), 30, options, stop_ids=NO_STOP))
    assert len(new) == 30
    assert not {IMAGE, VIDEO} & set(new)


def test_without_the_vision_tower(seeing: Engine, visual_package: Path) -> None:
    read, tokens = several(seeing), random_tokens(40)
    expected = seeing.session().prefill(tokens)
    with Engine.open(visual_package, native="require" if seeing.native else "off", threads=1, vision=False) as blind:
        assert blind.vision is None
        session = blind.session()
        assert session.prefill(tokens).tobytes() == expected.tobytes()
        before = snapshot(session)
        said = "opened without its vision tower; open it with vision=True"
        with pytest.raises(EngineError, match=said):
            session.prefill([VISION_START, IMAGE, VISION_END], [image(1, 1)])
        with pytest.raises(EngineError, match=said):
            session.prefill(read)
        with pytest.raises(EngineError, match=said):
            step_by_hand(session, read, 0, 10)
        with pytest.raises(OptionError, match="token 1 of this step stands for an image that was not given"):
            session.prefill([1, IMAGE])
        assert snapshot(session) == before
        assert list(session.generate([1], 5, stop_ids=NO_STOP))


@pytest.mark.skipif(find_library() is None, reason="not built: make plugins")
def test_decode_steps_as_cuda_graphs(visual_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"native": "require", "max_sessions": 3}
    with Engine.open(visual_package, **options) as plain:
        capturing(monkeypatch)
        with Engine.open(visual_package, "cuda", cuda_graph=True, **options) as graphed:
            pairs = [(graphed.session(), plain.session()) for _ in range(3)]
            for turn in range(3):
                for number, pair in enumerate(pairs):
                    read = prompt(plain, 2, image(2, 2 + number, turn), 1 + number, seed=turn)
                    texts = [list(session.generate(read, 4, stop_ids=NO_STOP)) for session in pair]
                    assert texts[0] == texts[1]
                for step in range(4):
                    work = [[(pair[side], [step + row]) for row, pair in enumerate(pairs)] for side in (0, 1)]
                    for one, other in zip(graphed.step_many(work[0]), plain.step_many(work[1]), strict=True):
                        np.testing.assert_allclose(one, other, atol=ROUNDING)
                for ours, theirs in pairs:
                    assert ours.next_position == theirs.next_position < ours.tokens_seen
                    np.testing.assert_array_equal(ours.kept(), theirs.kept())
            # One image token at a time is no decode step: no graph is captured for it.
            captured = len(graphed.backend.captured)
            by_hand(pairs[0][0], prompt(plain, image(2, 2)), [1])
            assert len(graphed.backend.captured) == captured == 4
            assert "-1" in graphed.backend.ids
