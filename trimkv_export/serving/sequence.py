"""One request: while it waits, and on its row of the cache."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimkv_export.runtime import Engine, Sampler, Session, VisualPrompt
from trimkv_export.serving.conversations import Conversation
from trimkv_export.serving.replies import Client, Reply, RequestError
from trimkv_export.serving.requests import GenerateRequest

__all__ = ["Sequence", "Ticket"]

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A request that waits, first to be read and then for a row.

    Attributes:
        request: its fields. Its images and videos are taken out once they are in the prompt.
        client: who waits for replies.
        conversation: that it is a turn of.
        clock: gives the time.
        arrival: the clock's time when it came.
        deadline: the clock's time by which it must have ended.
        text_size: bytes of its texts.
        held: bytes that it holds while it waits.
        files: its image files, once their headers were looked at.
        videos: its video files, once their packets were counted.
        prompt: its tokens as int32, and its pictures, once they were read.
    """

    request: GenerateRequest
    client: Client
    conversation: Conversation | None
    clock: Callable[[], float]
    arrival: float
    deadline: float
    text_size: int
    held: int
    files: list[bytes] | None = None
    videos: list[bytes] | None = None
    prompt: VisualPrompt | None = None

    def check(self) -> None:
        """Raise RequestError if the request must end now: it was cancelled, or has taken too long."""
        try:
            gone = self.client.is_cancelled()
        except Exception:  # the threads that ask serve the others too
            LOG.exception("a client does not say whether it is still there")
            gone = True
        if gone:
            raise RequestError("cancelled", "the request was cancelled")
        if self.clock() >= self.deadline:
            raise RequestError(
                "timeout", "the request took too long (timeout); ask for fewer tokens, or try again later"
            )


class Sequence:
    """A request on a row: its prompt step by step, then its tokens.

    Attributes:
        ticket: the request.
        session: its row.
        prompt_tokens: tokens of its prompt.
        token: the last token chosen, which is fed next; -1 before.
        chosen_at: the clock's time when it was chosen; -1 before.
        finish_reason: "stop" or "length" once it has ended well.
    """

    def __init__(self, engine: Engine, ticket: Ticket, prompt: VisualPrompt, session: Session, chunk: int) -> None:
        """Begin.

        Args:
            engine: of the model.
            ticket: the request.
            prompt: its tokens and pictures.
            session: empty, or with the state of the ticket's conversation.
            chunk: tokens of the prompt that are fed in a step.
        """
        request, tokenizer = ticket.request, engine.tokenizer
        self.ticket, self.session = ticket, session
        self.prompt_tokens = self._left = len(prompt.tokens)
        self.token, self.chosen_at = -1, -1.0
        self.finish_reason: str | None = None
        self._evictions = session.evictions
        self._chunk, self._context = chunk, engine.context
        self._feed = session.feed(prompt, chunk=chunk)
        self._never = list(engine.config.placeholder_ids)
        ends = tokenizer.eos_ids if request.end_id is None else {request.end_id}
        self._ends = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else ends)
        self._banned = [token for token in self._ends if 0 <= token < engine.config.model.vocab_size]
        self._sampler = Sampler(request.sampling, session.history, self._ends)
        # What a chat template is answered with is a text of its own; else it goes on with the prompt's.
        after = () if request.chat else prompt.tokens
        self._stream = tokenizer.stream(after=after, stop=request.stop_words)
        self._chosen = self._replied = 0
        self._text = request.text if request.echo else ""  # that no reply has had yet

    def prefill(self) -> NDArray[np.float32] | None:
        """Feed a chunk of the prompt -> the logits [V] of its last token, or None before the last chunk."""
        logits = next(self._feed)
        self._left -= self._chunk
        return logits if self._left <= 0 else None

    def choose(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token from logits [V], which are changed."""
        request = self.ticket.request
        logits[self._never] = -np.inf
        if self._chosen < request.min_tokens:
            logits[self._banned] = -np.inf
        token = self._sampler(logits)
        if token in self._ends:
            self.finish_reason, self.token = "stop", -1
        else:
            self.token = token
            self._chosen += 1
            self._text += self._stream.push(token)
            if self._stream.stopped:
                self.finish_reason = "stop"
            elif self._chosen == request.max_tokens or self.session.next_position + 1 >= self._context:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._text += self._stream.flush()

    def reply(self) -> Reply | None:
        """What there is to say, if anything; it is not said twice."""
        if self.finish_reason is None and not (self.ticket.request.stream and self._text):
            return None
        tokens, text = self._chosen - self._replied, self._text
        self._replied, self._text = self._chosen, ""
        return Reply(text, tokens, self.prompt_tokens, self.finish_reason)

    @property
    def pending(self) -> tuple[int, ...]:
        """Tokens of the answer that were not fed."""
        return () if self.token < 0 else (self.token,)

    @property
    def evictions(self) -> int:
        """Evictions since the request has been on this row."""
        return self.session.evictions - self._evictions

    def close(self) -> None:
        """Give the row back."""
        self._feed.close()
        self.session.close()
