"""One request: while it waits, and on its row of the cache."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimkv_export.runtime import Engine, Sampler, Session, VisualPrompt
from trimkv_export.serving.conversations import Conversation
from trimkv_export.serving.replies import Client, Reply
from trimkv_export.serving.requests import GenerateRequest
from trimkv_export.text.stop_words import StopFilter

__all__ = ["Sequence", "Ticket"]


@dataclass(frozen=True, eq=False)
class Ticket:
    """A request that waits for a row; it must have ended when the clock says `deadline`."""

    request: GenerateRequest
    prompt: VisualPrompt
    client: Client
    conversation: Conversation | None
    deadline: float


class Sequence:
    """A request on a row: its prompt step by step, then its tokens.

    Attributes:
        ticket: the request.
        session: its row.
        token: the last token chosen, which is fed next; -1 before.
        finish_reason: "stop" or "length" once it has ended well.
    """

    def __init__(self, engine: Engine, ticket: Ticket, session: Session, chunk: int) -> None:
        """Begin a request.

        Args:
            engine: that of the session.
            ticket: the request.
            session: empty, or with the state of the ticket's conversation.
            chunk: tokens of the prompt in a step.
        """
        request, tokenizer = ticket.request, engine.tokenizer
        self.ticket, self.session = ticket, session
        self.token = -1
        self.finish_reason: str | None = None
        self._evictions = session.evictions
        self._chunk, self._left = chunk, len(ticket.prompt.tokens)
        self._feed = session.feed(ticket.prompt, chunk=chunk)
        self._never = list(engine.config.placeholder_ids)
        self._ends = tokenizer.eos_ids if request.end_id is None else frozenset([request.end_id])
        self._sampler = Sampler(request.sampling, session.history, self._ends)
        self._stream, self._stops = tokenizer.stream(), StopFilter(request.stop_words)
        self._chosen = self._replied = 0
        self._text = request.text if request.echo else ""  # that no reply has had yet

    def prefill(self) -> NDArray[np.float32] | None:
        """Feed a chunk of the prompt -> the logits [V] of its last token, or None before the last chunk."""
        logits = next(self._feed)
        self._left -= self._chunk
        return logits if self._left <= 0 else None

    def choose(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token from logits [V], which are changed."""
        logits[self._never] = -np.inf
        if self._chosen < self.ticket.request.min_tokens:
            logits[[token for token in self._ends if 0 <= token < len(logits)]] = -np.inf
        token = self._sampler(logits)
        if token in self._ends:
            self.finish_reason, self.token = "stop", -1
        else:
            self.token = token
            self._chosen += 1
            self._text += self._stops.push(self._stream.push(token))
            if self._stops.stopped:
                self.finish_reason = "stop"
            elif self._chosen == self.ticket.request.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._text += self._stops.push(self._stream.flush()) + self._stops.flush()

    def reply(self) -> Reply | None:
        """What there is to say, if anything; it is not said twice."""
        if self.finish_reason is None and not (self.ticket.request.stream and self._text):
            return None
        tokens, text = self._chosen - self._replied, self._text
        self._replied, self._text = self._chosen, ""
        return Reply(text, tokens, len(self.ticket.prompt.tokens), self.finish_reason)

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
