"""What a served request gets back: pieces of text, or one error."""

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Client", "ErrorKind", "Reply", "RequestError"]

ErrorKind = Literal["invalid", "not_found", "unavailable", "cancelled", "timeout", "internal"]


class RequestError(Exception):
    """A request was refused or ended early; no other is affected. `kind` says whose fault it is.

    It goes to a client as a reply, and never ends a command; so it is not in the tree of errors.py.
    """

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind


@dataclass(frozen=True)
class Reply:
    """One response.

    Attributes:
        text: new text; may be empty.
        tokens: tokens chosen since the reply before.
        prompt_tokens: of the request.
        finish_reason: "stop" or "length" in the last reply, else None.
        error: in place of all else; the last reply.
    """

    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None
    error: RequestError | None = None

    @property
    def final(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


class Client(Protocol):
    """The other end of a request; hashable by identity."""

    def send(self, reply: Reply) -> None:
        """Deliver a reply. Called by the courier's thread."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for replies any more. Called by the engine's thread."""
