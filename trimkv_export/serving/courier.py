"""Replies on their way: sent by a thread of their own, so that the engine never waits for a client.

What a client has not been sent yet is sent as one reply: with many streams of a fast model several tokens come
together, and delivery does not bound the speed.
"""

import logging
import threading

from trimkv_export.serving.replies import Client, Reply

__all__ = ["Courier"]

LOG = logging.getLogger(__name__)


class Courier:
    """Delivers replies in order, to each client in its turn. A client that cannot be reached is not told again."""

    def __init__(self) -> None:
        self._waiting: dict[Client, Reply] = {}  # in the order of arrival
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="trimkv-courier", daemon=True)
        self._thread.start()

    def post(self, client: Client, reply: Reply) -> None:
        """Send a reply soon. An error takes the place of text that was not sent yet."""
        with self._changed:
            before = self._waiting.get(client)
            self._waiting[client] = reply if before is None or reply.error else _joined(before, reply)
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Send what waits, and end; wait for that, at most `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                client = next(iter(self._waiting))
                reply = self._waiting.pop(client)
            try:
                client.send(reply)
            except BaseException:  # this thread serves the others too
                LOG.info("a reply cannot be delivered, its client is gone", exc_info=True)


def _joined(first: Reply, second: Reply) -> Reply:
    return Reply(first.text + second.text, first.tokens + second.tokens, second.prompt_tokens, second.finish_reason)
