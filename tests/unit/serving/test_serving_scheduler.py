"""The scheduler on a real engine: results of single runs, rows that come free, turns, limits."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import Recorder, alone, ask

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine, SamplingOptions
from trimkv_export.serving import GenerateRequest, RequestError, Scheduler, ServingOptions
from trimkv_export.text.tokenizer import Tokenizer

Start = Callable[..., Scheduler]


@pytest.fixture
def start(package: Path) -> Iterator[Start]:
    """Starts schedulers, each with an engine of its own."""
    started = []

    def start(package: Path = package, clock: Callable[[], float] = time.monotonic, **options: Any) -> Scheduler:
        chosen = ServingOptions(**{"max_sequences": 4, "threads": 1} | options)
        scheduler = Scheduler(lambda: chosen.open_engine(package), chosen, clock)
        started.append(scheduler)
        return scheduler

    yield start
    for scheduler in started:
        scheduler.close()


@pytest.fixture(scope="module")
def reference(package: Path) -> Iterator[Engine]:
    with Engine.open(package, threads=1) as engine:
        yield engine


def prompts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice([*"abcdefgh "], rng.integers(1, 90))) for _ in range(count)]


def test_many_at_once_equal_single_runs(start: Start, reference: Engine) -> None:
    scheduler = start()
    texts = prompts(24)
    lengths = [1 + 7 * index % 40 for index in range(len(texts))]
    clients = [ask(scheduler, text, max_tokens=length) for text, length in zip(texts, lengths, strict=True)]
    for client, text, length in zip(clients, texts, lengths, strict=True):
        assert client.text == alone(reference, text, length)
        assert client.replies[-1].finish_reason in ("length", "stop")
        assert client.replies[-1].prompt_tokens == len(text)
    counts = scheduler.counts()
    assert (counts.live, counts.queued, counts.finished, counts.failed) == (0, 0, len(texts), 0)
    assert counts.evictions > 0


def test_a_row_that_is_not_cleared_would_be_seen(
    start: Start, reference: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = start(max_sequences=1)
    monkeypatch.setattr(scheduler._engine.memory, "reset", lambda row: None)
    texts = prompts(4)
    found = [ask(scheduler, text).text for text in texts]
    assert found != [alone(reference, text) for text in texts]


def test_what_is_cancelled_frees_its_row_and_disturbs_nobody(start: Start, reference: Engine) -> None:
    scheduler = start()
    texts = prompts(30)
    clients = [Recorder(cancel_after=index % 5 if index % 3 == 0 else None) for index in range(len(texts))]
    for text, client in zip(texts, clients, strict=True):
        scheduler.submit(GenerateRequest(text, max_tokens=20, stream=True), client)
    for text, client in zip(texts, clients, strict=True):
        if (error := client.error) is None:
            assert client.text == alone(reference, text, 20)
        else:
            assert client.cancel_after is not None
            assert error.kind == "cancelled"
            assert alone(reference, text, 20).startswith("".join(reply.text for reply in client.replies))
    counts = scheduler.counts()
    assert (counts.live, counts.queued, counts.failed) == (0, 0, 0)
    assert counts.cancelled + counts.finished == len(texts)
    assert ask(scheduler, "abc").text == alone(reference, "abc")


def test_a_long_prompt_takes_turns_with_decoding_and_with_other_prompts(start: Start) -> None:
    scheduler = start(prefill_chunk=8)
    rounds: list[str] = []
    decode, prefill = scheduler._decode, scheduler._prefill

    def noted_decode() -> bool:
        rounds.append("d" if scheduler._decoding else "")
        return decode()

    def noted_prefill() -> bool:
        rounds.append("p" if scheduler._prefilling else "")
        return prefill()

    scheduler._decode, scheduler._prefill = noted_decode, noted_prefill  # type: ignore[method-assign]
    running = ask(scheduler, "abc", max_tokens=200, end_id=-1)
    while not running.replies:
        pass
    long, short = ask(scheduler, "x" * 800, max_tokens=1), ask(scheduler, "y" * 16, max_tokens=1)
    order = []
    for name, client in (("short", short), ("long", long)):
        client.wait()
        order.append((name, long.ended.is_set()))
    assert order[0] == ("short", False)  # it did not wait for all of the long prompt
    running.wait()
    text = "".join(rounds)
    assert text.count("p") >= 100
    assert "pp" not in text[text.index("d") : text.rindex("d")]


def test_chunks_of_a_prompt_may_be_smaller_than_the_package(start: Start, package: Path) -> None:
    text = prompts(1)[0] * 3
    with Engine.open(package) as engine, engine.session() as session:
        tokens = engine.tokenizer.encode(text)
        for first in range(0, len(tokens), 5):
            logits = session.step(tokens[first : first + 5])
        expected = engine.tokenizer.decode([int(np.argmax(logits))])
    assert ask(start(prefill_chunk=5), text, max_tokens=1).text == expected


def test_answers_in_one_piece_with_counts(start: Start, reference: Engine) -> None:
    client = ask(start(), "hello", stream=False, echo=True, max_tokens=9)
    assert client.text == "hello" + alone(reference, "hello", 9)
    assert len(client.replies) == 1
    assert client.replies[0].tokens == 9


def test_stop_words_end_ids_and_minimum(start: Start, reference: Engine) -> None:
    scheduler = start()
    full = alone(reference, "abc", 40)
    word = full[10:13]
    stopped = ask(scheduler, "abc", max_tokens=40, stop_words=(word, "never this"))
    assert stopped.text == full[: full.index(word)]
    assert stopped.replies[-1].finish_reason == "stop"
    with reference.session() as session:
        tokens = list(session.generate(reference.tokenizer.encode("abc"), 40))
    end, before = tokens[5], tokens[: tokens.index(tokens[5])]
    assert ask(scheduler, "abc", max_tokens=40, end_id=end).text == reference.tokenizer.decode(before)
    longer = ask(scheduler, "abc", max_tokens=40, end_id=end, min_tokens=20)
    assert sum(reply.tokens for reply in longer.wait().replies) >= 20


def test_seeds_repeat_whatever_runs_beside(start: Start) -> None:
    scheduler = start()
    sampling = SamplingOptions(temperature=1.0, seed=7)
    quiet = ask(scheduler, "abc", sampling=sampling).text
    busy = [ask(scheduler, text) for text in prompts(6)]
    assert ask(scheduler, "abc", sampling=sampling).text == quiet
    for client in busy:
        client.wait()


def test_a_full_queue_refuses_and_recovers(start: Start) -> None:
    scheduler = start(max_sequences=1, queue_limit=2)
    clients, refused = [], []
    for _ in range(8):
        try:
            clients.append(ask(scheduler, "abc" * 100, max_tokens=30))
        except RequestError as error:
            refused.append((error.kind, "queue_limit" in str(error)))
    assert len(refused) >= 4
    assert set(refused) == {("unavailable", True)}
    for client in clients:
        assert client.error is None
    assert ask(scheduler, "abc").error is None


def test_requests_that_take_too_long_end(start: Start) -> None:
    times = [0.0]
    scheduler = start(max_sequences=1, clock=lambda: times[0])
    client, waiting = Recorder(), Recorder()
    for each in (client, waiting):
        scheduler.submit(GenerateRequest("abc", max_tokens=30000, end_id=-1, stream=True), each, timeout=1000)
    times[0] = 2000.0
    for each in (client, waiting):
        assert each.error is not None
        assert each.error.kind == "timeout"
    assert ask(scheduler, "abc").error is None


def test_closing_answers_everybody(start: Start) -> None:
    scheduler = start(max_sequences=1)
    clients = [ask(scheduler, "abc", max_tokens=30000, end_id=-1) for _ in range(3)]
    scheduler.close()
    for client in clients:
        assert client.error is not None
        assert client.error.kind == "unavailable"
    with pytest.raises(RequestError, match="unloaded"):
        ask(scheduler, "abc")


def test_a_mistake_of_ours_leaves_nobody_waiting(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = start(max_sequences=1)
    clients = [ask(scheduler, "abc", max_tokens=30000, end_id=-1) for _ in range(2)]
    monkeypatch.setattr(scheduler, "_prefill", lambda: [][0])
    for client in clients:
        assert client.error is not None
        assert client.error.kind == "internal"
    with pytest.raises(RequestError, match=r"engine has failed.*IndexError") as caught:
        ask(scheduler, "abc")
    assert caught.value.kind == "internal"


def test_a_step_that_fails_ends_those_in_it_only(start: Start, reference: Engine) -> None:
    scheduler = start()
    step_many = scheduler._engine.step_many
    failing = threading.Event()

    def fail_once(work: Any) -> Any:
        if failing.is_set():
            failing.clear()
            raise RuntimeError("device lost")
        return step_many(work)

    scheduler._engine.step_many = fail_once  # type: ignore[method-assign]
    failing.set()
    client = ask(scheduler, "abc")
    assert client.error is not None
    assert client.error.kind == "internal"
    assert "device lost" in str(client.error)
    assert ask(scheduler, "abc").text == alone(reference, "abc")


def test_a_request_that_cannot_begin_ends_alone(start: Start, reference: Engine) -> None:
    scheduler = start(max_sequences=1)
    tokenizer = scheduler._engine.tokenizer
    stream, failing = tokenizer.stream, threading.Event()

    def fail_once(**options: Any) -> Any:
        if failing.is_set():
            failing.clear()
            raise RuntimeError("no stream")
        return stream(**options)

    tokenizer.stream = fail_once  # type: ignore[method-assign]
    failing.set()
    client = ask(scheduler, "abc")
    assert "no stream" in str(client.error)
    assert ask(scheduler, "abc").text == alone(reference, "abc")


def test_a_client_that_cannot_be_reached_harms_nobody(start: Start, reference: Engine) -> None:
    class Gone(Recorder):
        def send(self, reply: Any) -> None:
            super().send(reply)
            raise OSError("no longer there")

    scheduler = start()
    gone = Gone()
    scheduler.submit(GenerateRequest("abc", max_tokens=12, stream=True), gone)
    assert ask(scheduler, "def").text == alone(reference, "def")
    scheduler.close()
    assert scheduler.counts().live == 0


@pytest.mark.parametrize("options", [{"prefill_chunk": 17}, {"budget": 9}])
def test_options_of_another_package(start: Start, options: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        start(**options)


def test_tokens_that_end_a_text(start: Start, reference: Engine) -> None:
    scheduler = start()
    with reference.session() as session:
        tokens = list(session.generate(reference.tokenizer.encode("abc"), 40, stop_ids=frozenset()))
    ends = ask(scheduler, "abc", max_tokens=40, ignore_eos=True, stop_token_ids=(tokens[7], tokens[9]))
    first = min(tokens.index(tokens[7]), tokens.index(tokens[9]))
    assert ends.text == reference.tokenizer.decode(tokens[:first])
    assert ends.replies[-1].finish_reason == "stop"
    assert ask(scheduler, "abc", max_tokens=40, ignore_eos=True, end_id=tokens[5]).text == reference.tokenizer.decode(
        tokens
    )
    chosen = SamplingOptions(logit_bias={tokens[0]: -100.0})
    assert ask(scheduler, "abc", max_tokens=1, sampling=chosen, end_id=-1).text != reference.tokenizer.decode(
        tokens[:1]
    )


@pytest.mark.parametrize(
    "fields", [{"stop_token_ids": (10**6,)}, {"sampling": SamplingOptions(logit_bias={10**6: 1.0})}]
)
def test_tokens_that_the_model_does_not_have(start: Start, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"token ids from 0 to \d+ for this model, got 1000000") as caught:
        ask(start(), "abc", **fields)
    assert caught.value.kind == "invalid"


def test_a_stop_word_may_be_a_special_token(start: Start, reference: Engine) -> None:
    scheduler = start()
    (end,) = reference.tokenizer.encode("<|im_end|>", add_special_tokens=False)
    always = SamplingOptions(logit_bias={end: 100.0})
    client = ask(scheduler, "abc", max_tokens=40, ignore_eos=True, sampling=always, stop_words=("<|im_end|>",))
    assert client.text == ""
    assert client.replies[-1].finish_reason == "stop"
    assert sum(reply.tokens for reply in client.replies) == 1


def test_prompts_beyond_the_context(start: Start) -> None:
    scheduler = start(max_context=100)
    fits = ask(scheduler, "x" * 99, max_tokens=50, end_id=-1)
    assert fits.text
    assert fits.replies[-1].finish_reason == "length"
    assert sum(reply.tokens for reply in fits.replies) == 1
    for length in (100, 1000, 1_000_000):  # the last is counted in parts, and given up early
        error = ask(scheduler, "x" * length).error
        assert error is not None
        assert error.kind == "invalid"
        assert re.search(r"the prompt has (at least )?[\d,]+ tokens.*100 \(max_context\)", str(error))
    assert scheduler.counts().too_long == 3
    ask(scheduler, "x" * 60, session_id="a", session_start=True, max_tokens=20, end_id=-1).wait()
    error = ask(scheduler, "x" * 30, session_id="a").error
    assert "30 tokens and follows 80 of its session" in str(error)
    assert (
        ask(scheduler, "x" * 5, session_id="a", max_tokens=90, end_id=-1).wait().replies[-1].finish_reason == "length"
    )


def test_a_long_prompt_in_many_parts_is_not_encoded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is cut: into messages, or variables of the template."""
    scheduler = start(max_context=100)
    encoded: list[int] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str, **more: Any) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, **more)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    parts = tuple({"role": "user", "content": "x" * 700} for _ in range(1000))
    for literal in (False, True):
        error = ask(scheduler, "x", chat=True, messages=parts, literal=literal).error
        assert re.search(r"the prompt has at least [\d,]+ tokens.*100 \(max_context\)", str(error))
    assert sum(encoded) < 200_000


def test_the_context_is_that_of_the_model(start: Start, checkpoint: Path, tmp_path: Path) -> None:
    scheduler = start()
    assert scheduler._engine.context == scheduler._engine.config.model.max_position_embeddings


def test_a_text_that_is_far_too_long_is_not_encoded_whole(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = start(max_context=500)
    encode, seen = scheduler._engine.tokenizer.encode, []

    def noted(text: str, **options: Any) -> Any:
        seen.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(scheduler._engine.tokenizer, "encode", noted)
    assert ask(scheduler, "word " * 200_000).error is not None
    assert sum(seen) < 200_000


def test_reading_goes_on_in_other_threads(start: Start, reference: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = start()
    going, may_go = threading.Event(), threading.Event()
    encode = scheduler._engine.tokenizer.encode

    def slow(text: str, **options: Any) -> Any:
        if len(text) > 40_000:
            going.set()
            assert may_go.wait(60)
        return encode(text, **options)

    monkeypatch.setattr(scheduler._engine.tokenizer, "encode", slow)
    large = [ask(scheduler, "y" * 50_000, max_tokens=1) for _ in range(3)]
    assert going.wait(60)
    assert ask(scheduler, "abc").text == alone(reference, "abc")  # small texts are not held up
    assert not any(client.ended.is_set() for client in large)
    may_go.set()
    for client in large:
        assert client.error is None


def test_what_waits_to_be_read_leaves_when_it_is_cancelled_or_late(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [0.0]
    scheduler = start(max_context=10**6, clock=lambda: times[0])
    going, may_go = threading.Event(), threading.Event()
    encode = scheduler._engine.tokenizer.encode

    def slow(text: str, **options: Any) -> Any:
        going.set()
        assert may_go.wait(60)
        return encode(text, **options)

    monkeypatch.setattr(scheduler._engine.tokenizer, "encode", slow)
    first = ask(scheduler, "y" * 50_000, max_tokens=1)
    assert going.wait(60)
    late, cancelled = Recorder(), Recorder(cancel_after=0)
    for client in (late, cancelled):
        scheduler.submit(GenerateRequest("y" * 50_000, max_tokens=1), client, timeout=5)
    assert cancelled.error is not None
    assert cancelled.error.kind == "cancelled"
    times[0] = 6.0
    assert late.error is not None
    assert late.error.kind == "timeout"
    may_go.set()
    assert first.error is None
    assert scheduler._held == 0


def test_the_bytes_that_wait_are_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = start(max_context=10**6, max_waiting_bytes=100_000)
    may_go = threading.Event()
    encode = scheduler._engine.tokenizer.encode
    monkeypatch.setattr(
        scheduler._engine.tokenizer, "encode", lambda text, **options: may_go.wait(60) and encode(text, **options)
    )
    first = ask(scheduler, "y" * 90_000, max_tokens=1)
    with pytest.raises(RequestError, match="max_waiting_bytes") as caught:
        ask(scheduler, "y" * 20_000)
    assert caught.value.kind == "unavailable"
    may_go.set()
    assert first.error is None


class EndOfThread(BaseException):
    """Nothing that `except Exception` sees."""


def test_an_engine_thread_that_dies_is_seen_by_everybody(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = start(max_sequences=1)
    clients = [ask(scheduler, "abc", max_tokens=30000, end_id=-1) for _ in range(2)]

    def die() -> bool:
        raise EndOfThread("gone")

    monkeypatch.setattr(scheduler, "_decode", die)
    for client in clients:
        assert "EndOfThread('gone')" in str(client.error)
    probe = GenerateRequest("", probe=True)
    for request in (GenerateRequest("abc"), probe):
        with pytest.raises(RequestError, match="must be loaded again") as caught:
            scheduler.submit(request, Recorder())
        assert caught.value.kind == "internal"
    assert isinstance(scheduler.failure, EndOfThread)
    assert scheduler.counts().up == 0
    assert "in die" in caplog.text  # the traceback


def test_a_probe_needs_no_row(start: Start) -> None:
    scheduler = start(max_sequences=1, queue_limit=1)

    def probe() -> Recorder:
        client = Recorder()
        scheduler.submit(GenerateRequest("", probe=True), client)
        return client

    assert probe().error is None  # at rest
    busy = ask(scheduler, "abc", max_tokens=30000, end_id=-1)
    while not busy.replies:
        pass
    waits = ask(scheduler, "abc")
    assert probe().error is None  # others show that the engine works
    assert not busy.ended.is_set()
    assert not waits.ended.is_set()


def test_a_probe_of_an_engine_that_fails(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = start()
    monkeypatch.setattr(scheduler._engine, "session", lambda budget: [][0])
    client = Recorder()
    scheduler.submit(GenerateRequest("", probe=True), client)
    assert "IndexError" in str(client.error)


def test_histograms(start: Start) -> None:
    times = [0.0]

    def clock() -> float:
        times[0] += 0.01
        return times[0]

    scheduler = start(clock=clock)
    for _ in range(3):
        ask(scheduler, "abc", max_tokens=5, end_id=-1).wait()
    assert sum(scheduler.first_token.counts) == 3
    assert sum(scheduler.next_token.counts) == 12
    assert 0 < scheduler.next_token.total < times[0]
    assert len(scheduler.next_token.counts) == len(scheduler.next_token.bounds) + 1


def test_a_client_that_cannot_say_whether_it_is_there(start: Start, reference: Engine) -> None:
    """What its end raises is not the others' business, nor the engine's."""

    class Broken(Recorder):
        def is_cancelled(self) -> bool:
            raise OSError("the stub is gone")

    scheduler, client = start(), Broken()
    scheduler.submit(GenerateRequest("abc", max_tokens=2000), client)
    assert "cancelled" in str(client.error)
    assert ask(scheduler, "abc").text == alone(reference, "abc")
    assert scheduler.failure is None
