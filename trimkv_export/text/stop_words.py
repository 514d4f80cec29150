"""Text that ends where a stop word begins."""

from collections.abc import Sequence

__all__ = ["StopFilter"]


class StopFilter:
    """Passes text on until a stop word is complete. What could be the beginning of one waits for what follows.

    A stop word may be, or contain, special tokens, which are not part of the text that is passed on: words are looked
    for in what is shown, and in all that was written. Where it ends does not depend on how the text is cut: the word
    that is complete first ends it; of several, the one that begins first.

    Attributes:
        stopped: whether a stop word was complete; nothing is passed on any more.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """words: what ends the text; an empty one never does."""
        self._words = [word for word in words if word]
        self.stopped = False
        self._held = ""  # shown, but not passed on yet
        # The end of all that was written, as far as a stop word may have begun in it; and which of it is shown.
        self._written, self._shown = "", [False] * 0

    def push(self, text: str, *, shown: bool = True) -> str:
        """Add text.

        Args:
            text: what was written.
            shown: whether it is part of the text; special tokens are not.

        Returns:
            What is now known not to be, or to follow, a stop word.
        """
        if self.stopped:
            return ""
        if not self._words:
            return text if shown else ""
        written, marks = self._written + text, self._shown + [shown] * len(text)
        held = self._held + text if shown else self._held
        found = []  # (characters of the new text that it takes to complete a word, characters of `held` before it)
        for word in self._words:
            if (at := written.find(word)) >= 0:
                found.append((at + len(word) - len(self._written), len(held) - sum(marks[at:])))
            if shown and (at := held.find(word)) >= 0:
                found.append((at + len(word) - len(self._held), at))
        if found:
            self.stopped, self._held, self._written, self._shown = True, "", "", []
            return held[: min(found)[1]]
        begun = max(self._overlap(written, word) for word in self._words)
        self._written, self._shown = written[len(written) - begun :], marks[len(marks) - begun :]
        waiting = max(sum(self._shown), max(self._overlap(held, word) for word in self._words))
        self._held = held[len(held) - waiting :]
        return held[: len(held) - waiting]

    def flush(self) -> str:
        """What was held back, once no text follows."""
        held, self._held, self._written, self._shown = self._held, "", "", []
        return held

    @staticmethod
    def _overlap(text: str, word: str) -> int:
        """Characters at the end of `text` that `word` begins with, less than all of it."""
        most = min(len(text), len(word) - 1)
        return next((size for size in range(most, 0, -1) if text.endswith(word[:size])), 0)
