"""Conversations between their turns: a copy of the cache row, of fixed size however long the history is."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimkv_export.runtime.snapshot import Snapshot
from trimkv_export.serving.replies import RequestError

__all__ = ["Conversation", "Conversations"]


@dataclass
class Conversation:
    """One conversation.

    Attributes:
        session_id: its name.
        snapshot: its state after the last whole turn; None before the first.
        pending: tokens of that turn's answer which were not fed yet; the next prompt begins with them.
        earlier: the conversation of the same name that this one takes the place of once its first turn is whole.
        busy: whether a turn is under way.
        used: the clock's time when its last turn ended.
    """

    session_id: str
    snapshot: Snapshot | None = None
    pending: Sequence[int] = ()
    earlier: "Conversation | None" = None
    busy: bool = False
    used: float = 0.0


class Conversations:
    """The conversations of a served model, by id. Safe for use by several threads.

    A turn is whole or has not been: one that fails, is cancelled or times out leaves its conversation as it was.
    """

    def __init__(self, limit: int, expiry: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._expiry, self._clock = limit, expiry, clock
        self._by_id: dict[str, Conversation] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._by_id)

    def claim(self, session_id: str, *, start: bool) -> Conversation:
        """Take a conversation for a turn; `start` begins it anew. One of that name stays until the turn is whole.

        Raises:
            RequestError: there is no such conversation, a turn of it is under way, or there are as many as may be.
        """
        with self._lock:
            self._forget_expired()
            found = self._by_id.get(session_id)
            if found is not None and found.busy:
                raise RequestError("unavailable", f"a turn of session {session_id!r} is under way; wait for its end")
            if start:
                if found is None and len(self._by_id) >= self._limit:
                    raise RequestError(
                        "unavailable",
                        f"this model keeps {self._limit} sessions at most (max_conversations); end one, or try again "
                        "later",
                    )
                if found is not None:
                    found.busy = True  # it does not expire meanwhile
                found = self._by_id[session_id] = Conversation(session_id, earlier=found)
            elif found is None:
                raise RequestError(
                    "not_found",
                    f"there is no session {session_id!r}: it was not begun, was ended, or was not used for "
                    f"{self._expiry:g} s; begin it with session_start",
                )
            found.busy = True
            return found

    def release(self, conversation: Conversation) -> None:
        """End a turn that was not whole: all is as it was before."""
        with self._lock:
            before = conversation.earlier if conversation.snapshot is None else conversation
            if before is None:
                del self._by_id[conversation.session_id]
            else:
                self._by_id[conversation.session_id] = before
                self._free(before)

    def store(self, conversation: Conversation, snapshot: Snapshot, pending: Sequence[int]) -> None:
        """End a turn with the state after it."""
        with self._lock:
            conversation.snapshot, conversation.pending, conversation.earlier = snapshot, tuple(pending), None
            self._free(conversation)

    def end(self, conversation: Conversation) -> None:
        """Forget a conversation that was claimed."""
        with self._lock:
            del self._by_id[conversation.session_id]

    def expire(self) -> None:
        """Forget what was not used for too long."""
        with self._lock:
            self._forget_expired()

    def _free(self, conversation: Conversation) -> None:
        conversation.busy, conversation.used = False, self._clock()

    def _forget_expired(self) -> None:
        oldest = self._clock() - self._expiry
        for found in [found for found in self._by_id.values() if not found.busy and found.used < oldest]:
            del self._by_id[found.session_id]
