"""Text that stays text: special tokens that a user writes do not become the ids that steer the model.

A special token is found wherever its text stands, in a user's message too: who writes "<|im_end|><|im_start|>system"
there would begin a message of the system. So every place in a user's text where such a token could begin, whatever
follows, gets a mark before it, a character that is none (U+FDD0): before every "<", as a rule. A chat template carries
marks along like any other character. Then what it rendered is cut at the tokens that have no mark, which are its own,
and between them text with marks is encoded by a tokenizer without special tokens, which is else the same.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trimkv_export.errors import OptionError, PackageError

__all__ = ["MARK", "ControlTokens"]

MARK = "\ufdd0"
MOST_ID = 1 << 24
# What of a message is the template's business, not text.
STRUCTURE = frozenset({"role", "type"})


class ControlTokens:
    """The added tokens of a tokenizer, special or not (<think> is none in Qwen3), but for those of white space.

    Attributes:
        ids: the ids of the special ones.
    """

    def __init__(self, backend: Any) -> None:
        """backend: a `tokenizers.Tokenizer`."""
        added = [each for each in backend.get_added_tokens_decoder().items() if _is_control(each[1].content)]
        self.ids = frozenset(id_ for id_, token in added if token.special)
        tokens = sorted((token for _, token in added), key=lambda token: -len(token.content))
        self._strip_left = {token.content for token in tokens if token.lstrip}
        # Where ordinary words begin, or white space, a mark stands only where it must.
        firsts = {token.content[0] for token in tokens}
        signs = {first for first in firsts if not (first.isalnum() or first.isspace())}
        self._words = [token.content for token in tokens if token.content[0] not in signs]
        begins = [f"[{''.join(map(re.escape, sorted(signs)))}]"] * bool(signs) + [*map(re.escape, self._words)]
        self._begins = re.compile(f"(?={'|'.join(begins) or '(?!)'})")
        # As the tokenizers package finds them: the longest, with the white space that it takes along.
        own = "|".join(_pattern(token) for token in tokens) or "(?!)"
        self._own = re.compile(f"(?=[{''.join(map(re.escape, sorted(firsts)))}])(?:{own})" if tokens else own)

    def mark(self, text: str) -> str:
        """A text with a mark wherever a token of these begins, or would with what follows.

        Raises:
            OptionError: it has the mark itself.
        """
        if MARK in text:
            raise OptionError("the text has U+FDD0, which is no character: leave it out, or leave --literal out")
        # Where words begin that the text does not end; all else in one go, for texts are long.
        end = text[-max(map(len, self._words), default=1) :]
        begun = {match.start() for match in self._begins.finditer(end)}
        places = {
            len(end) - size
            for word in self._words
            for size in range(1, min(len(word), len(end) + 1))
            if end.endswith(word[:size])
        }
        marked = self._begins.sub(MARK, text)
        if not places - begun:
            return marked
        cuts = [0, *sorted(places | begun), len(end)]
        ending = MARK.join(end[start:stop] for start, stop in itertools.pairwise(cuts))
        return marked[: len(marked) - len(end) - len(begun)] + ending

    def mark_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with marks in all that it says. The assistant's own are as they are: templates look into them.

        Raises:
            OptionError: as `mark`; or lists in it are nested too deeply.
        """
        if message.get("role") == "assistant":
            return dict(message)
        try:
            return {key: value if key in STRUCTURE else self._mark_all(value) for key, value in message.items()}
        except RecursionError:
            raise OptionError("a message has lists in lists that are nested too deeply") from None

    def _mark_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {key: item if key in STRUCTURE else self._mark_all(item) for key, item in value.items()}
        return [self._mark_all(item) for item in value] if isinstance(value, list | tuple) else value

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Parts of a text with marks, and whether each is to be encoded without special tokens; without the marks."""
        plain = done = 0  # where what is encoded as it is begins, and where what is between two tokens begins
        for match in [*self._own.finditer(text), None]:
            end = len(text) if match is None else match.start()
            if MARK in (part := text[done:end]):
                if plain < done:
                    yield text[plain:done], False
                if match is not None and any(match.group().startswith(token) for token in self._strip_left):
                    part = part.rstrip()
                if literal := part.replace(MARK, ""):
                    yield literal, True
                plain = end
            done = end if match is None else match.end()
        if plain < done:
            yield text[plain:done], False

    def backend_without(self, backend: Any) -> Any:
        """A copy of the tokenizer that does not find these tokens.

        Raises:
            PackageError: an id is so large that no vocabulary has it.
        """
        known = backend.get_vocab(with_added_tokens=False)
        if (highest := max(known.values(), default=0)) > MOST_ID:  # the library would go through all ids below
            raise PackageError(f"the tokenizer has a token of id {highest}; no vocabulary has more than {MOST_ID:,}")
        content = json.loads(backend.to_str())
        content["post_processor"] = None  # it may name them, and adds nothing here
        added = content["added_tokens"]
        # The library numbers added tokens as they come, after the model's own; so each keeps its place, under a name
        # that no text has. What the model's vocabulary has is simply left out.
        content["added_tokens"] = [
            token | ({"content": f"{MARK}{token['id']}", "normalized": False} if _is_control(token["content"]) else {})
            for token in added
            if not (_is_control(token["content"]) and token["content"] in known)
        ]
        made = type(backend).from_str(json.dumps(content))
        kept = [token for token in added if not _is_control(token["content"])]
        if any(made.token_to_id(token["content"]) != token["id"] for token in kept):  # numbers with gaps
            made = type(backend).from_str(json.dumps(content | {"added_tokens": []}))
        return made


def _is_control(text: str) -> bool:
    return bool(text.strip(" \t\r\n\N{LOWER ONE EIGHTH BLOCK}"))


def _pattern(token: Any) -> str:
    """A regular expression for a token that no mark stands before."""
    before, after = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    space = r"\s*" if token.rstrip else ""
    return f"(?<!{MARK}){before}{re.escape(token.content)}{after}{space}"
