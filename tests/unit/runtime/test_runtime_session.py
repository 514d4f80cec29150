"""Sessions: in-place state, chunking, bad tokens, several at a time, generation."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import build, random_tokens

from trimkv_export.errors import EngineError, OptionError
from trimkv_export.policy import CacheSpec
from trimkv_export.runtime import Engine, SamplingOptions, Session, Video, VisualPrompt
from trimkv_export.verify.reference import ReferenceDecoder

CHUNK = 16
PROMPT = random_tokens(75)


def snapshot(session: Session) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.state.items()}


def test_state_is_updated_where_it_lies(engine: Engine, session: Session) -> None:
    before = {name: (array.ctypes.data, array.shape, array.dtype) for name, array in session.state.items()}
    bound = engine.cache_bytes
    for length in (1, 16, 1, 3, 16, 1, 1, 1, 1, 16):
        state, seen = snapshot(session), session.tokens_seen
        session.step(PROMPT[:length])
        assert session.tokens_seen == seen + length
        assert snapshot(session) != state
    assert {name: (array.ctypes.data, array.shape, array.dtype) for name, array in session.state.items()} == before
    assert session.evictions > 3
    assert engine.cache_bytes == bound
    assert all(address % 256 == 0 for address, _, _ in before.values())  # the first row


def test_rows_do_not_overlap(engine: Engine) -> None:
    sessions = [engine.session() for _ in range(4)]
    ranges = sorted(
        (array.ctypes.data, array.nbytes) for session in sessions for array in session.state.values() if array.nbytes
    )
    assert all(start + size <= after for (start, size), (after, _) in pairwise(ranges))
    assert sum(size for _, size in ranges) == engine.config.cache.nbytes(4)


def test_prefill_is_steps_of_the_chunk(engine: Engine) -> None:
    one, other = engine.session(), engine.session()
    seen: list[tuple[int, int]] = []
    logits = one.prefill(PROMPT, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 75), (32, 75), (48, 75), (64, 75), (75, 75)]
    for start in range(0, len(PROMPT), CHUNK):
        expected = other.step(PROMPT[start : start + CHUNK])
    assert np.array_equal(logits, expected)
    assert snapshot(one) == snapshot(other)


def test_chunking_changes_only_rounding_while_nothing_is_evicted(engine: Engine) -> None:
    one, other = engine.session(), engine.session()
    for token in PROMPT[:11]:
        single = one.step([token])
    np.testing.assert_allclose(other.step(PROMPT[:11]), single, atol=1e-5)
    assert one.evictions == other.evictions == 0
    assert np.array_equal(one.kept(), other.kept())


def test_the_same_tokens_give_the_same_bits(engine: Engine) -> None:
    logits = [engine.session().prefill(PROMPT) for _ in range(3)]
    assert logits[0].tobytes() == logits[1].tobytes() == logits[2].tobytes()


def test_logits_are_a_copy(session: Session) -> None:
    first = session.step([1])
    kept = first.copy()
    assert first.dtype == np.float32
    assert first.shape == (259,)
    session.step([2])
    assert np.array_equal(first, kept)
    first[:] = 0
    session.reset()
    assert np.array_equal(session.step([1]), kept)


@pytest.mark.parametrize("numpy", [True, False])
def test_tokens_may_be_an_array(engine: Engine, numpy: bool) -> None:
    tokens: Any = np.array(PROMPT[:5], np.int32) if numpy else tuple(PROMPT[:5])
    assert np.array_equal(engine.session().step(tokens), engine.session().step(PROMPT[:5]))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "1 to 16 tokens .* got 0"),
        ([1] * 17, "1 to 16 tokens .* got 17; use prefill"),
        ([1, -1], "from 0 to 258, got -1"),
        ([259], "from 0 to 258, got 259"),
        ([2**40], f"got {2**40}"),
    ],
)
def test_bad_tokens_leave_the_state_untouched(session: Session, tokens: list[int], said: str) -> None:
    session.step(PROMPT[:7])
    before = snapshot(session)
    with pytest.raises(OptionError, match=said):
        session.step(tokens)
    assert snapshot(session) == before
    session.step([1])


@pytest.mark.parametrize("tokens", [[1.5], ["a"], "a", [None], b"ab", bytearray(2), {1, 2}, {1: 2}, None, iter([1])])
def test_tokens_that_are_no_whole_numbers(session: Session, tokens: Any) -> None:
    for feed in (session.step, session.prefill, lambda given: list(session.generate(given, 1))):
        with pytest.raises(OptionError, match="token ids"):
            feed(tokens)
    assert session.tokens_seen == 0
    session.step([1])


@pytest.mark.parametrize("stop", ["x", [""], [1], None, 5])
def test_bad_stop_words(session: Session, stop: Any) -> None:
    with pytest.raises(OptionError, match="stop must be a list of texts"):
        session.generate([1], 2, stop=stop)


@pytest.mark.parametrize("bad", [-1, 259])
def test_a_bad_token_late_in_a_prompt_leaves_the_state_untouched(session: Session, bad: int) -> None:
    session.step(PROMPT[:7])
    before = snapshot(session)
    with pytest.raises(OptionError, match=f"got {bad}"):
        session.prefill([*PROMPT, bad])
    assert snapshot(session) == before
    with pytest.raises(OptionError, match=f"got {bad}"):
        next(iter(session.generate([*PROMPT, bad], 3)))
    assert snapshot(session) == before


def test_an_empty_prompt(session: Session) -> None:
    with pytest.raises(OptionError, match="empty"):
        session.prefill([])
    with pytest.raises(OptionError, match="empty"):
        next(iter(session.generate([], 3)))


def test_positions_end_where_int32_ends(package: Path) -> None:
    session = Engine.open(package, threads=1, context=np.iinfo(np.int32).max).session()
    session.tokens_seen = np.iinfo(np.int32).max - 2
    session.step([1, 2])
    with pytest.raises(EngineError, match="at most 2,147,483,647 tokens"):
        session.step([1])


def test_images_need_a_vision_tower(session: Session) -> None:
    with pytest.raises(EngineError, match="no vision tower"):
        session.step([1], pixel_values=np.zeros((1, 3), np.float32))
    with pytest.raises(EngineError, match="no vision tower"):
        session.step([1], image_grid_thw=np.ones((1, 3), np.int64))
    with pytest.raises(EngineError, match="no vision tower"):
        session.prefill([1], ["picture.png"])
    with pytest.raises(EngineError, match="no vision tower"):
        session.prefill([1], videos=[Video("folder")])
    assert session.tokens_seen == 0
    session.prefill([1], [], [])
    assert session.tokens_seen == 1


def test_sessions_do_not_see_each_other(engine: Engine, package: Path) -> None:
    lengths = [[5, 1, 16, 1, 1, 9], [1, 1, 1, 16, 16, 1], [16, 1, 2, 1, 16, 3]]
    sessions = [engine.session() for _ in lengths]
    together: list[list[Any]] = [[] for _ in lengths]
    for step in range(6):
        for index, session in enumerate(sessions):
            tokens = random_tokens(lengths[index][step], seed=10 * index + step)
            together[index].append(session.step(tokens))
    for index, own in enumerate(lengths):
        with (
            Engine.open(package, native="require" if engine.native else "off", threads=1) as alone,
            alone.session() as session,
        ):
            for step, length in enumerate(own):
                tokens = random_tokens(length, seed=10 * index + step)
                assert np.array_equal(session.step(tokens), together[index][step])
            assert snapshot(session).keys() == snapshot(sessions[index]).keys()
            assert np.array_equal(session.kept(), sessions[index].kept())


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_row_used_again_knows_nothing(package: Path, how: str) -> None:
    with Engine.open(package, threads=1) as engine:
        session = engine.session()
        expected = session.prefill(PROMPT[:30])
        kept = session.kept()
        for array in session.state.values():
            array[...] = np.nan if array.dtype == np.float32 else -5
        if how == "close":
            session.close()
            session = engine.session()
        else:
            session.reset()
        assert (session.tokens_seen, session.evictions, len(session.kept())) == (0, 0, 0)
        assert np.array_equal(session.prefill(PROMPT[:30]), expected)
        assert np.array_equal(session.kept(), kept)


def test_step_many(engine: Engine) -> None:
    one, two, alone = engine.session(), engine.session(budget=3), engine.session()
    first = engine.step_many([(one, PROMPT[:16]), (two, [7])])
    second = engine.step_many([(two, PROMPT[:3]), (one, [9])])
    assert np.array_equal(first[0], alone.step(PROMPT[:16]))
    assert np.array_equal(second[1], alone.step([9]))
    assert engine.step_many([]) == []
    before = snapshot(one), snapshot(two)
    with pytest.raises(OptionError, match="from 0 to 258"):
        engine.step_many([(one, [1]), (two, [999])])
    with pytest.raises(OptionError, match="one session twice"):
        engine.step_many([(one, [1]), (one, [1])])
    assert (snapshot(one), snapshot(two)) == before


def test_kept_is_what_the_reference_keeps(session: Session, engine: Engine) -> None:
    reference = ReferenceDecoder(engine.package)
    for start, length in enumerate((5, 1, 16, 1, 1, 1, 1, 16, 2, 1)):
        tokens = random_tokens(length, seed=start)
        expected, _ = reference.step(tokens, session.budget)
        np.testing.assert_allclose(session.step(tokens), expected, atol=1e-4)
        kept = session.kept()
        assert kept.dtype == np.int32
        np.testing.assert_array_equal(kept, reference.cache.kept())
    assert session.evictions > 2


@pytest.mark.parametrize("budget", [1, 5, 8])
def test_a_smaller_budget_is_one_built_smaller(engine: Engine, checkpoint: Path, tmp_path: Path, budget: int) -> None:
    session = engine.session(budget)
    assert session.budget == budget
    path = build(checkpoint, tmp_path / "package", budget=budget).path
    with Engine.open(path, threads=1) as small, small.session() as other:
        for length in (5, 1, 1, 16, 1, 1, 1, 7, 1):
            tokens = random_tokens(length, seed=length)
            np.testing.assert_allclose(session.step(tokens), other.step(tokens), atol=1e-5)
            assert np.array_equal(session.kept(), other.kept())
    cache: CacheSpec = engine.config.cache
    assert len(session.kept()) < cache.num_streams * (budget + cache.evict_every)


def test_greedy_generation_is_step_by_step(engine: Engine) -> None:
    session, other = engine.session(), engine.session()
    new = list(session.generate(PROMPT, 20, stop_ids=frozenset()))
    token = int(other.prefill(PROMPT).argmax())
    for found in new:
        assert found == token
        token = int(other.step([token]).argmax())
    assert len(new) == 20
    assert session.tokens_seen == len(PROMPT) + 19  # the last one is not fed


def test_generation_feeds_a_token_when_the_next_is_asked_for(session: Session) -> None:
    tokens = session.generate(PROMPT, 20, stop_ids=frozenset())
    assert session.tokens_seen == 0
    for count in range(5):
        next(tokens)
        assert session.tokens_seen == len(PROMPT) + count


def test_stop_tokens_end_the_text(engine: Engine) -> None:
    new = list(engine.session().generate(PROMPT, 20, stop_ids=frozenset()))
    stop = new[6]
    session = engine.session()
    assert list(session.generate(PROMPT, 20, stop_ids=frozenset({stop, 1000}))) == new[: new.index(stop)]
    assert session.tokens_seen == len(PROMPT) + new.index(stop)
    assert engine.tokenizer.eos_ids == {256, 258}  # the default


def test_draws_repeat_with_a_seed(engine: Engine) -> None:
    def draw(seed: int) -> list[int]:
        return list(engine.session().generate(PROMPT, 9, SamplingOptions(1.0, seed=seed), stop_ids=frozenset()))

    first = draw(1)
    with Engine.open(engine.package.path, max_sessions=2, threads=1) as other:
        again = other.session().generate(PROMPT, 9, SamplingOptions(1.0, seed=1), stop_ids=frozenset())
        assert list(again) == first
    assert draw(2) != first


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3"])
def test_bad_max_new_tokens(session: Session, count: Any) -> None:
    with pytest.raises(OptionError, match=f"max_new_tokens must be a whole number of at least 1, got {count!r}"):
        session.generate(PROMPT, count)


def test_a_step_that_fails_midway(session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.session().step([1])

    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "run_with_iobinding", fail)
        with pytest.raises(EngineError, match="failed in a step of 2 tokens: out of memory"):
            session.step([1, 2])
    with pytest.raises(EngineError, match=r"failed midway.*call reset"):
        session.step([1])
    session.reset()
    assert np.array_equal(session.step([1]), expected)


def test_closed_sessions_and_engines(package: Path) -> None:
    with Engine.open(package, threads=1) as engine:
        with engine.session() as session:
            session.step([1])
            with pytest.raises(EngineError, match="all 1 cache rows are in use"):
                engine.session()
        session.close()  # twice is once
        with pytest.raises(EngineError, match="this session was closed"):
            session.step([1])
        engine.session().close()
        last = engine.session()
    with pytest.raises(EngineError, match="was closed"):
        last.step([1])
    with pytest.raises(EngineError, match="was closed"):
        last.prefill([1])


def test_a_closed_session_cannot_touch_the_one_after_it(package: Path, tmp_path: Path) -> None:
    with Engine.open(package, threads=1) as engine:
        old = engine.session()
        old.close()
        new = engine.session()
        new.step(PROMPT[:16])
        before = snapshot(new)
        uses: list[Callable[[], object]] = [old.reset, old.kept, lambda: old.save(tmp_path / "session")]
        for use in uses:
            with pytest.raises(EngineError, match="was closed"):
                use()
        assert snapshot(new) == before
        assert not list(tmp_path.iterdir())


def test_a_closed_engine_has_no_sessions(package: Path, tmp_path: Path) -> None:
    engine = Engine.open(package, threads=1, max_sessions=2)
    engine.session().save(tmp_path / "session")
    engine.close()
    engine.close()
    uses: list[Callable[[], object]] = [engine.session, lambda: engine.restore(tmp_path / "session")]
    for use in uses:
        with pytest.raises(EngineError, match="closed"):
            use()


def test_an_invalid_cache_is_not_saved(
    session: Session, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "run_with_iobinding", fail)
        with pytest.raises(EngineError):
            session.step([1, 2])
    with pytest.raises(EngineError, match="failed midway"):
        session.save(tmp_path / "session")


def test_float16_packages_run(checkpoint: Path, package: Path, tmp_path: Path) -> None:
    path = build(checkpoint, tmp_path / "package", precision="fp16").path
    with Engine.open(path, threads=1) as half, Engine.open(package, threads=1) as whole:
        assert half.cache_bytes < whole.cache_bytes
        one, other = half.session(), whole.session()
        assert one.state["pool_key"].dtype == np.float16
        for length in (1, 8, 1):
            logits = one.step(PROMPT[:length])
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, other.step(PROMPT[:length]), atol=0.05)


PENALTIES = SamplingOptions(repetition_penalty=1.05, presence_penalty=0.02, frequency_penalty=0.01)


def penalized(logits: Any, seen: set[int], counts: dict[int, int]) -> int:
    """The greedy choice under PENALTIES, written out."""
    scores = logits.astype(np.float64)
    for token in seen:
        scores[token] *= PENALTIES.repetition_penalty ** (1 if scores[token] < 0 else -1)
    for token, count in counts.items():
        scores[token] -= PENALTIES.presence_penalty + PENALTIES.frequency_penalty * count
    return int(scores.argmax())


@pytest.mark.parametrize("between", ["nothing", "plain turns", "snapshot", "file", "prefill"])
def test_penalties_count_all_turns(engine: Engine, tmp_path: Path, between: str) -> None:
    session, other = engine.session(), engine.session()
    seen: set[int] = set()
    counts: dict[int, int] = {}
    for turn in range(3):
        tokens = [*session.pending, *random_tokens(5, seed=turn)]
        plain = between == "plain turns" and turn == 1
        new = list(session.generate(tokens, 10, None if plain else PENALTIES, stop_ids=frozenset()))
        logits = other.prefill(tokens)
        seen |= set(tokens)
        for index, found in enumerate(new):
            token = int(logits.argmax()) if plain else penalized(logits, seen, counts)
            assert found == token
            seen.add(token)
            counts[token] = counts.get(token, 0) + 1
            if index + 1 < len(new):
                logits = other.step([token])
        if between == "snapshot":
            session = engine.resume(session.snapshot())
        elif between == "file":
            session.save(tmp_path / "session")
            session = engine.restore(tmp_path / "session")
        elif between == "prefill":
            for each in (session, other):
                each.prefill(random_tokens(20, seed=9))
            seen |= set(random_tokens(20, seed=9))
    assert max(counts.values()) > 1
    session.reset()
    assert not len(session.history.seen())


def test_batched_steps_are_remembered(engine: Engine) -> None:
    sessions = [engine.session() for _ in range(3)]
    engine.step_many([(session, [index]) for index, session in enumerate(sessions)])
    engine.step_many([(session, [10 + index, 20]) for index, session in enumerate(sessions)])
    assert [session.history.seen().tolist() for session in sessions] == [[0, 10, 20], [1, 11, 20], [2, 12, 20]]


def test_a_stop_token_is_not_punished_in_later_turns(engine: Engine) -> None:
    stop = next(engine.session().generate(PROMPT, 1, stop_ids=frozenset()))
    session = engine.session()
    assert list(session.generate(PROMPT, 9, PENALTIES, stop_ids=frozenset(range(259)))) == []
    assert not session.history.chosen(session.history.seen()).any()
    assert int(session.history.chosen(np.array([stop]))[0]) == 0


def test_what_is_pending(engine: Engine) -> None:
    new = list(engine.session().generate(PROMPT, 20, stop_ids=frozenset()))
    session = engine.session()
    assert [session.pending, session.finish_reason] == [(), None]
    # Ended by its length: the last token waits.
    assert list(session.generate(PROMPT, 6, stop_ids=frozenset())) == new[:6]
    assert (session.pending, session.finish_reason) == ((new[5],), "length")
    assert session.tokens_seen == len(PROMPT) + 5
    # Going on as the docstring says gives what one call gives.
    assert list(session.generate([*session.pending], 14, stop_ids=frozenset())) == new[6:]
    session.step([1])
    assert not session.pending
    # Ended by a stop token: all of it is in the cache.
    session.reset()
    stop = new[6]
    ended = list(session.generate(PROMPT, 20, stop_ids=frozenset({stop})))
    assert ended == new[: new.index(stop)]
    assert [session.pending, session.finish_reason] == [(), "stop"]
    assert session.tokens_seen == len(PROMPT) + len(ended)
    # Ended by the caller, who has the token before it is fed.
    session.reset()
    text = session.generate(PROMPT, 20, stop_ids=frozenset())
    for expected in new[:3]:
        assert next(text) == expected
        assert session.pending == (expected,)
    text.close()
    assert session.pending == (new[2],)
    assert engine.resume(session.snapshot()).pending == (new[2],)
    session.reset()
    assert not session.pending


def test_a_turn_that_is_refused_leaves_pending(session: Session) -> None:
    list(session.generate(PROMPT, 3, stop_ids=frozenset()))
    pending = session.pending
    assert len(pending) == 1
    with pytest.raises(OptionError):
        next(session.generate([*pending, -1], 3))
    assert session.pending == pending


def test_two_texts_of_one_session(engine: Engine) -> None:
    alone = list(engine.session().generate(PROMPT, 8, stop_ids=frozenset()))
    session = engine.session()
    first = session.generate(PROMPT, 8, stop_ids=frozenset())
    second = session.generate(PROMPT, 8, stop_ids=frozenset())  # nothing is fed before the first token
    found = [next(first)]
    uses: list[Callable[[], object]] = [
        lambda: next(second),
        lambda: session.generate(PROMPT, 8),
        lambda: session.step([1]),
        lambda: session.prefill(PROMPT),
        lambda: next(session.feed(VisualPrompt(PROMPT))),
        lambda: engine.step_many([(session, [1])]),
    ]
    for use in uses:
        before = snapshot(session)
        with pytest.raises(EngineError, match="still open"):
            use()
        assert snapshot(session) == before
        found.append(next(first))
    session.snapshot()  # reading is allowed
    found += first
    assert found == alone
    session.step([1])


@pytest.mark.parametrize("how", ["close", "drop", "last token", "failure"])
def test_a_text_that_is_over_lets_the_next_begin(session: Session, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = session.generate(PROMPT, 3, stop_ids=frozenset())
    next(text)
    if how == "close":
        text.close()
    elif how == "drop":
        del text
    elif how == "last token":
        next(text)
        next(text)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "_step", lambda *_: (_ for _ in ()).throw(EngineError("no")))
            with pytest.raises(EngineError, match="no"):
                next(text)
    assert len(list(session.generate(PROMPT, 3, stop_ids=frozenset()))) == 3


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_text_does_not_go_on_in_another_conversation(engine: Engine, how: str) -> None:
    session = engine.session()
    text = session.generate(PROMPT, 9, stop_ids=frozenset())
    next(text)
    getattr(session, how)()
    with pytest.raises(EngineError, match="reset or closed before the end"):
        next(text)
    other = engine.session() if how == "close" else session
    assert other.tokens_seen == 0
    assert len(list(other.generate(PROMPT, 2, stop_ids=frozenset()))) == 2


def test_a_dropped_session_gives_its_row_back(engine: Engine) -> None:
    for _ in range(20):
        engine.session().step([1])
    sessions = [engine.session() for _ in range(4)]
    with pytest.raises(EngineError, match=r"all 4 cache rows are in use; .*as long as a variable holds it"):
        engine.session()
    del sessions[1]
    sessions.append(engine.session())
    assert sorted(session.row for session in sessions) == [0, 1, 2, 3]


def test_a_session_in_a_circle_gives_its_row_back(engine: Engine) -> None:
    for _ in range(20):
        session: Any = engine.session()
        session.itself = session
    del session
    assert engine.session().tokens_seen == 0


def test_a_row_is_given_back_once(engine: Engine) -> None:
    session = engine.session()
    session.close()
    session.close()
    del session
    sessions = [engine.session() for _ in range(4)]
    assert len({session.row for session in sessions}) == 4
    with pytest.raises(EngineError, match="rows are in use"):
        engine.session()


def test_a_session_that_cannot_be_made_costs_no_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_clear", lambda _: (_ for _ in ()).throw(MemoryError()))
        for _ in range(9):
            with pytest.raises(MemoryError):
                engine.session()
    assert len({session.row for session in [engine.session() for _ in range(4)]}) == 4


@pytest.fixture
def short(package: Path) -> Iterator[Engine]:
    """An engine for conversations of 50 positions."""
    with Engine.open(package, threads=1, context=50, max_sessions=2) as engine:
        yield engine


def test_the_context_is_the_models(engine: Engine, short: Engine) -> None:
    assert engine.context == engine.config.model.max_position_embeddings == 131072
    assert short.context == 50


def test_a_prompt_beyond_the_context(short: Engine) -> None:
    session = short.session()
    said = "51 tokens do not fit: the conversation would have 51 positions, and this engine takes 50; shorten"
    with pytest.raises(OptionError, match=said):
        session.prefill(PROMPT[:51])
    with pytest.raises(OptionError, match="takes 50, one of them for the answer"):
        next(session.generate(PROMPT[:50], 1))
    assert session.tokens_seen == 0
    session.prefill(PROMPT[:50])
    for use in (lambda: session.step([1]), lambda: short.step_many([(session, [1]), (short.session(), [1])])):
        with pytest.raises(OptionError, match="1 token does not fit: the conversation would have 51 positions"):
            use()
    assert session.tokens_seen == 50


@pytest.mark.parametrize(("prompt", "count"), [(49, 1), (45, 5), (40, 10), (20, 20)])
def test_a_text_ends_with_the_context(short: Engine, prompt: int, count: int) -> None:
    session = short.session()
    assert len(list(session.generate(PROMPT[:prompt], 20, stop_ids=frozenset()))) == count
    assert session.finish_reason == "length"
    assert session.tokens_seen == prompt + count - 1


def test_a_conversation_ends_with_the_context(short: Engine, tmp_path: Path) -> None:
    session = short.session()
    session.prefill(PROMPT[:30])
    assert len(list(session.generate(PROMPT[:15], 20, stop_ids=frozenset()))) == 5
    session.save(tmp_path / "session")
    with pytest.raises(OptionError, match="not fit"):
        next(short.restore(tmp_path / "session").generate([*session.pending], 1))
