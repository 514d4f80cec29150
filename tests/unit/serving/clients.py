"""Clients of a scheduler in this process."""

import threading
from dataclasses import dataclass, field
from typing import Any

from trimkv_export.runtime import Engine
from trimkv_export.serving import GenerateRequest, Reply, RequestError, Scheduler

PATIENCE = 60.0


@dataclass(eq=False)
class Recorder:
    """Keeps replies. cancel_after: cancelled once it has had so many."""

    cancel_after: int | None = None
    replies: list[Reply] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def send(self, reply: Reply) -> None:
        assert not self.ended.is_set(), "a reply after the last one"
        self.replies.append(reply)
        if reply.final:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancel_after is not None and len(self.replies) >= self.cancel_after

    def wait(self) -> "Recorder":
        assert self.ended.wait(PATIENCE)
        return self

    @property
    def text(self) -> str:
        return "".join(reply.text for reply in self.wait().replies)

    @property
    def error(self) -> RequestError | None:
        return self.wait().replies[-1].error


def ask(scheduler: Scheduler, text: str, **fields: Any) -> Recorder:
    """Submit a request; streaming, unless it says otherwise."""
    client = Recorder()
    scheduler.submit(GenerateRequest(text, **{"max_tokens": 12, "stream": True} | fields), client)
    return client


def alone(engine: Engine, text: str, max_tokens: int = 12) -> str:
    """The greedy answer of an engine that does nothing else."""
    with engine.session() as session:
        tokens = list(session.generate(engine.tokenizer.encode(text), max_tokens))
    return engine.tokenizer.decode(tokens)
