"""Text that ends where a stop word begins."""

from collections.abc import Sequence

__all__ = ["StopFilter"]


class StopFilter:
    """Passes text on until a stop word is complete. What could be the beginning of one waits for what follows."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._held = words, ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what is now known not to be, or to follow, a stop word."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for word in self._words if (at := text.find(word)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((self._overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, word: str) -> int:
        """Characters at the end of `text` that `word` begins with, less than all of it."""
        most = min(len(text), len(word) - 1)
        return next((size for size in range(most, 0, -1) if text.endswith(word[:size])), 0)
