"""The scheduler on a real engine: results of single runs, rows that come free, turns, limits."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import Recorder, alone, ask

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine, SamplingOptions
from trimkv_export.serving import GenerateRequest, RequestError, Scheduler, ServingOptions

Start = Callable[..., Scheduler]


@pytest.fixture
def start(package: Path) -> Iterator[Start]:
    """Starts schedulers, each with an engine of its own."""
    started = []

    def start(**options: Any) -> Scheduler:
        chosen = ServingOptions(**{"max_sequences": 4, "threads": 1} | options)
        scheduler = Scheduler(lambda: chosen.open_engine(package), chosen)
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

    def noted_decode() -> None:
        rounds.append("d" if scheduler._decoding else "")
        decode()

    def noted_prefill() -> None:
        rounds.append("p" if scheduler._prefilling else "")
        prefill()

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
    scheduler = start(max_sequences=1)
    now = scheduler._clock()
    client, waiting = Recorder(), Recorder()
    for each in (client, waiting):
        scheduler.submit(GenerateRequest("abc", max_tokens=30000, end_id=-1, stream=True), each, timeout=1000)
    scheduler._clock = lambda: now + 2000
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
    with pytest.raises(RequestError, match="unloaded"):
        ask(scheduler, "abc")


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


def test_an_answer_keeps_its_first_space(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece drops the space at the start of a text; an answer goes on with one."""
    scheduler = start()
    tokenizer = scheduler._engine.tokenizer
    asked = []
    stream = tokenizer.stream

    def record(**options: Any) -> Any:
        asked.append(options)
        return stream(**options)

    monkeypatch.setattr(tokenizer, "stream", record)
    ask(scheduler, "abc", stop_words=("<|im_end|>",)).wait()
    ask(scheduler, "abc", chat=True).wait()
    assert list(asked[0]["after"]) == tokenizer.encode("abc")
    assert asked[0]["stop"] == ("<|im_end|>",)
    assert asked[1]["after"] == ()
