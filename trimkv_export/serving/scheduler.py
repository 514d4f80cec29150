"""Continuous batching: one thread runs the engine, and requests join and leave between its steps.

In each round every sequence that decodes gets one token, all of them in one batch, and one sequence that still reads
its prompt gets one chunk. So a prompt, however long, delays the tokens of the others by at most one prefill chunk (and
the encoding of the pictures that begin in it); sequences that read prompts take turns. Texts are encoded and images
are read before that, by other threads (`intake`).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import OptionError, TrimKVError
from trimkv_export.runtime import Engine, VisualPrompt
from trimkv_export.serving.conversations import Conversation, Conversations
from trimkv_export.serving.courier import Courier
from trimkv_export.serving.histogram import Histogram
from trimkv_export.serving.intake import Intake
from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.prompt import PromptTooLongError, check_tokens, held_bytes, read_prompt
from trimkv_export.serving.replies import Client, Reply, RequestError
from trimkv_export.serving.requests import GenerateRequest
from trimkv_export.serving.sequence import Sequence, Ticket

__all__ = ["Counts", "Scheduler"]

LOG = logging.getLogger(__name__)

EXPIRY_CHECK_SECONDS = 10.0
# Between two looks at whether clients on rows, and in the queue, are still there; in Triton each takes 40 µs.
POLL_SECONDS, QUEUE_POLL_SECONDS = 0.02, 0.5
# Upper ends of the buckets of the two histograms, in seconds.
FIRST_TOKEN_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
NEXT_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True)
class Counts:
    """What metrics show. The first five are of now, the others since the start."""

    up: int
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
    too_long: int


class Scheduler:
    """Serves an engine to many clients. `submit` may be called by any thread.

    Requests wait in the order in which they were read. Those that are cancelled or take too long leave at the next
    round, or 20 ms later where rounds are shorter.

    Attributes:
        failure: what ended the engine's thread, if something did; nothing is answered any more then.
        first_token: seconds from a request's arrival to its first token.
        next_token: seconds from one token of a request to its next.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], options: ServingOptions, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the engine and warm it up.

        Args:
            open_engine: opens it for `options.max_sequences` sessions; called by the engine thread, for with CUDA
                graphs an engine belongs to the thread that opens it.
            options: the limits.
            clock: gives the time in seconds.

        Raises:
            OptionError: the prefill chunk or the budget is not of this package.
            TrimKVError: as `open_engine`.
        """
        self._options, self._clock = options, clock
        self._conversations = Conversations(options.max_conversations, options.conversation_expiry, clock)
        self._queue: deque[Ticket] = deque()
        self._probes: deque[Client] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []
        self._sums = dict.fromkeys(("prompt_tokens", "generated_tokens", "evictions"), 0)
        self._sums |= dict.fromkeys(("finished", "cancelled", "failed", "too_long"), 0)
        self.first_token, self.next_token = Histogram(FIRST_TOKEN_BOUNDS), Histogram(NEXT_TOKEN_BOUNDS)
        self._changed = threading.Condition()
        self._held = self._prepared = 0  # bytes of requests that wait; of those in the queue
        self._end: RequestError | None = None  # why nothing is taken any more
        self.failure: BaseException | None = None
        self._polled = self._queue_polled = 0.0
        self._courier = Courier()
        self._intake = Intake(options, self._read, self._fail_reading)
        opened: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(open_engine, opened), name="trimkv-engine", daemon=True)
        self._thread.start()
        try:
            self._engine = opened.result()
        except BaseException:
            self._intake.close()
            self._courier.close()
            raise

    def submit(self, request: GenerateRequest, client: Client, timeout: float | None = None) -> None:
        """Take a request. Other threads read its text and its pictures; what is wrong with them comes as a reply.

        Args:
            request: what is asked for.
            client: gets the replies.
            timeout: seconds that it may take, if less than `options.timeout`.

        Raises:
            RequestError: the request cannot be served; the client gets no reply then.
        """
        text_size = request.text_size
        held = text_size + sum(map(len, (*request.images, *request.videos)))
        with self._changed:
            self._check_end()
            if request.probe:
                self._probes.append(client)
                self._changed.notify_all()
                return
            self._check_room(held)
        try:
            check_tokens(request, self._engine.config.model.vocab_size)
        except OptionError as error:
            raise RequestError("invalid", str(error)) from None
        conversation = None
        if request.session_id is not None:
            conversation = self._conversations.claim(request.session_id, start=request.session_start)
        if conversation is not None and not (request.text or request.messages):  # only with session_end
            self._conversations.end(conversation)
            self._courier.post(client, Reply(finish_reason="stop"))
            return
        arrival = self._clock()
        limits = [seconds for seconds in (timeout, self._options.timeout) if seconds]
        deadline = arrival + min(limits, default=float("inf"))
        ticket = Ticket(request, client, conversation, self._clock, arrival, deadline, text_size, held)
        with self._changed:
            try:
                self._check_end()
                self._check_room(held)
            except RequestError:
                self._release(conversation)
                raise
            self._held += held
            self._intake.add(ticket)
            self._changed.notify_all()  # the engine's thread looks after what waits

    def _check_end(self) -> None:
        if self._end is not None:
            raise self._end

    def _check_room(self, held: int) -> None:
        """Raise RequestError if there is no room for another request that holds so many bytes."""
        waiting = len(self._queue) + len(self._intake)
        if waiting >= self._options.queue_limit:
            raise RequestError(
                "unavailable", f"the queue is full: {waiting} requests wait (queue_limit); try again later"
            )
        if self._held and self._held + held > self._options.max_waiting_bytes:
            raise RequestError(
                "unavailable",
                f"the queue is full: {waiting} requests wait with {self._held:,} bytes, at most "
                f"{self._options.max_waiting_bytes:,} are held (max_waiting_bytes); try again later",
            )

    def close(self) -> None:
        """Stop at the end of the current round, and close the engine; whatever runs or waits gets an error."""
        with self._changed:
            self._end = self._end or RequestError("unavailable", "the model is being unloaded")
            self._changed.notify_all()
        self._thread.join()
        self._intake.join()
        self._courier.close()

    def flush(self, timeout: float) -> None:
        """After a failure: wait until replies were sent, at most so many seconds."""
        self._courier.close(timeout)

    def counts(self) -> Counts:
        """Current figures."""
        live, waiting = len(self._prefilling) + len(self._decoding), len(self._queue) + len(self._intake)
        up = int(self._end is None)
        return Counts(up, live, waiting, len(self._conversations), self._engine.cache_bytes, **self._sums)

    def _add(self, name: str, count: int = 1) -> None:
        with self._changed:  # several threads count
            self._sums[name] += count

    def _read(self, ticket: Ticket) -> None:
        """Make a ticket's prompt and put it into the queue. Called by the intake's threads."""
        with self._changed:  # pictures that were read take memory: those to come wait until some of them are on a row
            seen, most = ticket.files or ticket.videos, self._options.max_waiting_bytes
            while seen and self._prepared >= most and self._end is None:
                ticket.check()
                self._changed.wait(QUEUE_POLL_SECONDS)
        options = self._options
        prompt = read_prompt(
            self._engine, ticket, encode_images=options.provider == "cpu", max_frames=options.max_frames or None
        )
        held = held_bytes(prompt)
        with self._changed:
            self._check_end()
            ticket.prompt, ticket.files, ticket.videos = prompt, None, None
            ticket.request = replace(ticket.request, images=(), videos=())
            self._held += held - ticket.held
            self._prepared += held
            ticket.held = held
            self._queue.append(ticket)
            self._changed.notify_all()

    def _fail_reading(self, ticket: Ticket, error: BaseException) -> None:
        if isinstance(error, TrimKVError):
            if isinstance(error, PromptTooLongError):
                self._add("too_long")
            error = RequestError("invalid", str(error))
        self._refuse(ticket, error)

    def _unqueue(self, ticket: Ticket) -> None:
        """A ticket that was taken out of the queue holds nothing any more."""
        with self._changed:
            self._held -= ticket.held
            self._prepared -= ticket.held
            ticket.held = 0
            self._changed.notify_all()

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
                stepped = self._decode()
                stepped = self._prefill() or stepped
                self._answer_probes(stepped)
        except BaseException as error:  # nobody shall wait for ever, whatever it was
            LOG.critical("the engine has failed; the model must be loaded again", exc_info=True)
            self.failure = error
            end = RequestError("internal", f"the engine has failed, and the model must be loaded again: {error!r}")
        with self._changed:
            self._end = self._end or end
            waiting, probes = list(self._queue), list(self._probes)
            self._queue.clear()
            self._probes.clear()
            self._changed.notify_all()
        for client in probes:
            self._courier.post(client, Reply(error=end))
        for ticket in [*waiting, *self._intake.close()]:
            self._refuse(ticket, end)
        for sequence in [*self._prefilling, *self._decoding]:
            self._refuse(sequence.ticket, end)
        for sequence in [*self._prefilling, *self._decoding]:  # only now: a broken engine may fail here too
            try:
                self._free(sequence)
            except Exception:
                LOG.exception("a row cannot be freed")

    def _wait(self) -> bool:
        """Until there is something to do; False once closed."""
        with self._changed:
            while not (self._end or self._queue or self._probes or self._prefilling or self._decoding):
                if len(self._intake):
                    self._changed.wait(QUEUE_POLL_SECONDS)
                    break  # those that are being read may have waited too long
                self._changed.wait(EXPIRY_CHECK_SECONDS)
                self._conversations.expire()
            return self._end is None

    def _leave(self) -> None:
        """Drop what was cancelled, or has taken too long."""
        now = time.monotonic()
        if now - self._polled >= POLL_SECONDS:
            self._polled = now
            for sequence in [*self._prefilling, *self._decoding]:
                try:
                    sequence.ticket.check()
                except RequestError as error:
                    self._fail(sequence, error)
        if now - self._queue_polled >= QUEUE_POLL_SECONDS:
            self._queue_polled = now
            with self._changed:
                waiting = [*self._queue, *self._intake.waiting()]
            for ticket in waiting:
                try:
                    ticket.check()
                except RequestError as error:
                    if self._take_back(ticket):
                        self._refuse(ticket, error)

    def _take_back(self, ticket: Ticket) -> bool:
        """Take a ticket out of where it waits; False if it is being read."""
        with self._changed:
            if ticket not in self._queue:
                return self._intake.discard(ticket)
            self._queue.remove(ticket)
        self._unqueue(ticket)
        return True

    def _join(self) -> None:
        """Give free rows to those who wait longest."""
        while len(self._prefilling) + len(self._decoding) < self._options.max_sequences:
            with self._changed:
                if not self._queue:
                    return
                ticket = self._queue.popleft()
            self._unqueue(ticket)
            try:
                ticket.check()
                self._prefilling.append(self._begin(ticket))
            except Exception as failure:
                self._refuse(ticket, failure)

    def _begin(self, ticket: Ticket) -> Sequence:
        prompt, ticket.prompt = ticket.prompt or VisualPrompt(()), None
        snapshot = None if ticket.conversation is None else ticket.conversation.snapshot
        session = self._engine.session(self._budget) if snapshot is None else self._engine.resume(snapshot)
        try:
            return Sequence(self._engine, ticket, prompt, session, self._chunk)
        except BaseException:
            session.close()
            raise

    def _answer_probes(self, stepped: bool) -> None:
        """Tell those who ask whether the engine works; if it has not just shown it, on a free row."""
        if not self._probes or not (
            stepped or len(self._prefilling) + len(self._decoding) < self._options.max_sequences
        ):
            return
        reply = Reply(finish_reason="stop")
        if not stepped:
            try:
                with self._engine.session(self._budget) as session:
                    session.step([0])
            except Exception as error:
                LOG.exception("a probe has failed")
                reply = Reply(error=_internal(error))
        with self._changed:
            clients = list(self._probes)
            self._probes.clear()
        for client in clients:
            self._courier.post(client, reply)

    def _prefill(self) -> bool:
        """A chunk of the prompt whose turn it is; whether there was one, and it went well."""
        if not self._prefilling:
            return False
        sequence = self._prefilling[0]
        try:
            logits = sequence.prefill()
        except Exception as error:
            self._fail(sequence, error)
            return False
        self._prefilling.rotate(-1)
        if logits is not None:
            self._prefilling.remove(sequence)
            self._decoding.append(sequence)
            self._add("prompt_tokens", sequence.prompt_tokens)
            self._choose(sequence, logits)
        return True

    def _decode(self) -> bool:
        """A token of every sequence that has read its prompt; whether there was one, and it went well."""
        work = [(sequence.session, (sequence.token,)) for sequence in self._decoding]
        if not work:
            return False
        try:
            found = self._engine.step_many(work)
        except Exception as error:
            for sequence in [*self._decoding]:
                self._fail(sequence, error)
            return False
        for sequence, logits in zip([*self._decoding], found, strict=True):
            self._choose(sequence, logits)
        return True

    def _choose(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        try:
            sequence.choose(logits)
            self._add("generated_tokens")
            self._time(sequence)
            reply = sequence.reply()
            if sequence.finish_reason is not None:
                self._finish(sequence)
            if reply:  # the last one once the next turn of the conversation may come
                self._courier.post(sequence.ticket.client, reply)
        except Exception as error:
            self._fail(sequence, error)

    def _time(self, sequence: Sequence) -> None:
        now = self._clock()
        if sequence.chosen_at < 0:
            self.first_token.observe(now - sequence.ticket.arrival)
        else:
            self.next_token.observe(now - sequence.chosen_at)
        sequence.chosen_at = now

    def _finish(self, sequence: Sequence) -> None:
        ticket = sequence.ticket
        if ticket.conversation is not None:
            if ticket.request.session_end:
                self._conversations.end(ticket.conversation)
            else:
                self._conversations.store(ticket.conversation, sequence.session.snapshot(), sequence.pending)
        self._free(sequence)
        self._add("finished")

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._free(sequence)
        self._refuse(sequence.ticket, error)

    def _free(self, sequence: Sequence) -> None:
        (self._decoding if sequence in self._decoding else self._prefilling).remove(sequence)
        self._add("evictions", sequence.evictions)
        sequence.close()

    def _refuse(self, ticket: Ticket, error: BaseException) -> None:
        with self._changed:
            self._held -= ticket.held
            ticket.held = 0
            ticket.files = ticket.prompt = None
        self._release(ticket.conversation)
        if isinstance(error, OptionError):  # of the request, which the session looks at once more
            error = RequestError("invalid", str(error))
        elif not isinstance(error, RequestError):
            LOG.error("a request has failed", exc_info=error)
            error = _internal(error)
        self._add("cancelled" if error.kind == "cancelled" else "failed")
        self._courier.post(ticket.client, Reply(error=error))

    def _release(self, conversation: Conversation | None) -> None:
        if conversation is not None:
            self._conversations.release(conversation)


def _internal(error: BaseException) -> RequestError:
    return RequestError("internal", str(error) if isinstance(error, TrimKVError) else f"internal error: {error!r}")
