"""Continuous batching: one thread runs the engine, and requests join and leave between its steps.

In each round every sequence that decodes gets one token, all of them in one batch, and one sequence that still reads
its prompt gets one chunk. So a prompt, however long, delays the tokens of the others by at most one prefill chunk (and
the encoding of the pictures that begin in it); sequences that read prompts take turns.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import OptionError, TrimKVError
from trimkv_export.runtime import Engine
from trimkv_export.runtime.prompts import encode_prompt
from trimkv_export.serving.conversations import Conversation, Conversations
from trimkv_export.serving.courier import Courier
from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.replies import Client, Reply, RequestError
from trimkv_export.serving.requests import GenerateRequest
from trimkv_export.serving.sequence import Sequence, Ticket

__all__ = ["Counts", "Scheduler"]

EXPIRY_CHECK_SECONDS = 10.0
# Between two looks at whether clients on rows, and in the queue, are still there; in Triton each takes 40 µs.
POLL_SECONDS, QUEUE_POLL_SECONDS = 0.02, 0.5


@dataclass(frozen=True)
class Counts:
    """What metrics show: the first four as they are now, the others since the start."""

    live: int
    queued: int
    conversations: int
    cache_bytes: int
    prompt_tokens: int
    generated_tokens: int
    evictions: int
    finished: int
    cancelled: int
    failed: int


class Scheduler:
    """Serves an engine to many clients. `submit` may be called by any thread.

    Requests wait in the order of their arrival. Those that are cancelled or take too long leave at the next round, or
    20 ms later where rounds are shorter.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], options: ServingOptions, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the engine and warm it up.

        Args:
            open_engine: opens it for `options.max_sequences` sessions. The engine thread calls it, for with CUDA graphs
                an engine belongs to the thread that opens it.
            options: of the served model.
            clock: seconds, for limits of time.

        Raises:
            OptionError: a prefill chunk or a budget that the package cannot have.
            TrimKVError: as `open_engine`.
        """
        self._options, self._clock = options, clock
        self._conversations = Conversations(options.max_conversations, options.conversation_expiry, clock)
        self._queue: deque[Ticket] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []
        self._sums = dict.fromkeys(("prompt_tokens", "generated_tokens", "evictions"), 0)
        self._sums |= dict.fromkeys(("finished", "cancelled", "failed"), 0)
        self._changed = threading.Condition()
        self._closed = False
        self._polled = self._queue_polled = 0.0
        opened: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(open_engine, opened), name="trimkv-engine", daemon=True)
        self._thread.start()
        self._engine = opened.result()
        self._courier = Courier()

    def submit(self, request: GenerateRequest, client: Client, timeout: float | None = None) -> None:
        """Queue a request. Its text is encoded, and its images are read, on the caller's thread.

        Args:
            request: what to serve.
            client: gets the replies.
            timeout: seconds that it may take, if less than `options.timeout`.

        Raises:
            RequestError: the request cannot be served; the client gets no reply then.
        """
        with self._changed:
            self._check_room()
        conversation = None
        if request.session_id is not None:
            conversation = self._conversations.claim(request.session_id, start=request.session_start)
        try:
            if conversation is not None and not request.text:  # only with session_end
                self._conversations.end(conversation)
                self._courier.post(client, Reply(finish_reason="stop"))
                return
            limits = [seconds for seconds in (timeout, self._options.timeout) if seconds]
            deadline = self._clock() + min(limits, default=float("inf"))
            prompt = encode_prompt(
                self._engine,
                request.text,
                chat=request.chat,
                images=request.images,
                continued=conversation is not None and conversation.snapshot is not None,
                before=() if conversation is None else conversation.pending,
            )
            ticket = Ticket(request, prompt, client, conversation, deadline)
            with self._changed:
                self._check_room()
                self._queue.append(ticket)
                self._changed.notify()
        except Exception as error:
            self._release(conversation)
            if isinstance(error, TrimKVError):
                raise RequestError("invalid", str(error)) from None
            raise

    def _check_room(self) -> None:
        if self._closed:
            raise RequestError("unavailable", "the model is being unloaded")
        if len(self._queue) >= self._options.queue_limit:
            raise RequestError(
                "unavailable",
                f"the queue is full: {len(self._queue)} requests wait (queue_limit); try again later",
            )

    def close(self) -> None:
        """Stop at the end of the current round, and close the engine; whatever runs or waits gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._courier.close()

    def counts(self) -> Counts:
        """Current figures."""
        live = len(self._prefilling) + len(self._decoding)
        return Counts(live, len(self._queue), len(self._conversations), self._engine.cache_bytes, **self._sums)

    def _warm_up(self, engine: Engine) -> None:
        """Go through the shapes to come: a full chunk of each row, then decoding as a batch that shrinks."""
        most = engine.config.prefill_chunk
        if self._options.prefill_chunk > most:
            raise OptionError(f"prefill_chunk must be at most the package's, {most}; got {self._options.prefill_chunk}")
        self._chunk, self._budget = self._options.prefill_chunk or most, self._options.budget or None
        rows = [engine.session(self._budget) for _ in range(self._options.max_sequences)]
        for row in rows:
            row.step([0] * self._chunk)
        for count in range(len(rows), 0, -1):
            engine.step_many([(row, [0]) for row in rows[:count]])
        for row in reversed(rows):  # the first row is the first to be used
            row.close()

    def _run(self, open_engine: Callable[[], Engine], opened: "Future[Engine]") -> None:
        try:
            engine = open_engine()
        except BaseException as error:
            opened.set_exception(error)
            return
        with engine:
            try:
                self._warm_up(engine)
            except BaseException as error:
                opened.set_exception(error)
                return
            opened.set_result(engine)
            self._serve()

    def _serve(self) -> None:
        end = RequestError("unavailable", "the model was unloaded before the answer was complete")
        try:
            while self._wait():
                self._leave()
                self._join()
                self._decode()
                self._prefill()
        except Exception as error:  # a mistake of ours: nobody shall wait for ever
            end = RequestError("internal", f"internal error, the model must be loaded again: {error!r}")
        with self._changed:
            self._closed = True
            waiting = list(self._queue)
            self._queue.clear()
        for ticket in waiting:
            self._refuse(ticket, end)
        for sequence in [*self._prefilling, *self._decoding]:
            self._fail(sequence, end)

    def _wait(self) -> bool:
        """Until there is something to do; False once closed."""
        with self._changed:
            while not (self._closed or self._queue or self._prefilling or self._decoding):
                self._changed.wait(EXPIRY_CHECK_SECONDS)
                self._conversations.expire()
            return not self._closed

    def _leave(self) -> None:
        """Drop what was cancelled, or has taken too long."""
        now, clock = time.monotonic(), self._clock()
        if now - self._polled >= POLL_SECONDS:
            self._polled = now
            for sequence in [*self._prefilling, *self._decoding]:
                if error := _overdue(sequence.ticket, clock):
                    self._fail(sequence, error)
        if now - self._queue_polled >= QUEUE_POLL_SECONDS:
            self._queue_polled = now
            with self._changed:
                waiting = list(self._queue)
            for ticket in waiting:
                if error := _overdue(ticket, clock):
                    with self._changed:
                        self._queue.remove(ticket)
                    self._refuse(ticket, error)

    def _join(self) -> None:
        """Give free rows to those who wait longest."""
        while len(self._prefilling) + len(self._decoding) < self._options.max_sequences:
            with self._changed:
                if not self._queue:
                    return
                ticket = self._queue.popleft()
            if error := _overdue(ticket, self._clock()):
                self._refuse(ticket, error)
                continue
            try:
                self._prefilling.append(self._begin(ticket))
            except Exception as failure:
                self._refuse(ticket, failure)

    def _begin(self, ticket: Ticket) -> Sequence:
        snapshot = None if ticket.conversation is None else ticket.conversation.snapshot
        session = self._engine.session(self._budget) if snapshot is None else self._engine.resume(snapshot)
        try:
            return Sequence(self._engine, ticket, session, self._chunk)
        except BaseException:
            session.close()
            raise

    def _prefill(self) -> None:
        """A chunk of the prompt whose turn it is."""
        if not self._prefilling:
            return
        sequence = self._prefilling[0]
        try:
            logits = sequence.prefill()
        except Exception as error:
            self._fail(sequence, error)
            return
        self._prefilling.rotate(-1)
        if logits is not None:
            self._prefilling.remove(sequence)
            self._decoding.append(sequence)
            self._sums["prompt_tokens"] += len(sequence.ticket.prompt.tokens)
            self._choose(sequence, logits)

    def _decode(self) -> None:
        """A token of every sequence that has read its prompt."""
        work = [(sequence.session, (sequence.token,)) for sequence in self._decoding]
        if not work:
            return
        try:
            found = self._engine.step_many(work)
        except Exception as error:
            for sequence in [*self._decoding]:
                self._fail(sequence, error)
            return
        for sequence, logits in zip([*self._decoding], found, strict=True):
            self._choose(sequence, logits)

    def _choose(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        try:
            sequence.choose(logits)
            self._sums["generated_tokens"] += 1
            if sequence.finish_reason is not None:
                self._finish(sequence)
            if reply := sequence.reply():  # the last one once the next turn of the conversation may come
                self._courier.post(sequence.ticket.client, reply)
        except Exception as error:
            self._fail(sequence, error)

    def _finish(self, sequence: Sequence) -> None:
        ticket = sequence.ticket
        if ticket.conversation is not None:
            if ticket.request.session_end:
                self._conversations.end(ticket.conversation)
            else:
                self._conversations.store(ticket.conversation, sequence.session.snapshot(), sequence.pending)
        self._free(sequence)
        self._sums["finished"] += 1

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._free(sequence)
        self._refuse(sequence.ticket, error)

    def _free(self, sequence: Sequence) -> None:
        self._sums["evictions"] += sequence.evictions
        sequence.close()
        (self._decoding if sequence in self._decoding else self._prefilling).remove(sequence)

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        self._release(ticket.conversation)
        if not isinstance(error, RequestError):
            error = RequestError(
                "internal", str(error) if isinstance(error, TrimKVError) else f"internal error: {error!r}"
            )
        self._sums["cancelled" if error.kind == "cancelled" else "failed"] += 1
        self._courier.post(ticket.client, Reply(error=error))

    def _release(self, conversation: Conversation | None) -> None:
        if conversation is not None:
            self._conversations.release(conversation)


def _overdue(ticket: Ticket, now: float) -> RequestError | None:
    """Why a request must end now, if it must."""
    if ticket.client.is_cancelled():
        return RequestError("cancelled", "the request was cancelled")
    if now >= ticket.deadline:
        return RequestError("timeout", "the request took too long (timeout); ask for fewer tokens, or try again later")
    return None
