"""What gates are trained on: rows of tokens, cut out of texts or put together of chats.

A row depends on the seed and its number alone, so a run that goes on sees what it would have seen.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trimkv_export.checks import is_unicode
from trimkv_export.errors import OptionError
from trimkv_export.files import read_text
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.training.options import TrainingOptions
from trimkv_export.words import first_line, shorten

__all__ = ["Corpus", "Row", "Rows"]

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """Tokens [T], and which of them are answers [T] bool: of these, losses look at more."""

    tokens: Tokens
    answers: npt.NDArray[np.bool_]


class Rows(Protocol):
    """Where rows come from.

    Attributes:
        fingerprint: differs where rows do.
    """

    fingerprint: str

    def row(self, index: int) -> Row:
        """The row of a number from 0, the same each time; all have the same length."""


class Corpus:
    """Rows of texts and chats.

    Attributes:
        fingerprint: sha256 of the tokens.
        text_tokens: tokens of all texts.
        chats: how many there are.
        too_long: chats with more tokens than a row; they are left out.
    """

    def __init__(
        self, tokenizer: Tokenizer, texts: Sequence[Path], chats: Sequence[Path], options: TrainingOptions
    ) -> None:
        """Read and encode the files.

        Args:
            tokenizer: the backbone's.
            texts: UTF-8 files.
            chats: JSON lines; a line has "messages", each with "role" and "content".
            options: of the run.

        Raises:
            OptionError: there is no file; a file cannot be read or is too short; a line is no chat, or one that the
                chat template refuses.
        """
        if not texts and not chats:
            raise OptionError("there is nothing to train on: give --text FILE or --chat FILE.jsonl")
        self._options, self._begin = options, _begin(tokenizer)
        self._window = options.context - len(self._begin)
        self._texts = _encode_texts(tokenizer, texts)
        self.text_tokens = len(self._texts)
        if texts and self.text_tokens < self._window:
            raise OptionError(
                f"the texts have {self.text_tokens:,} tokens together, and a row of --context {options.context} needs "
                f"{self._window:,}: give more text, or a shorter --context"
            )
        found = [chat for file in chats for chat in _read_chats(tokenizer, file)]
        self._chats = [chat for chat in found if len(chat.tokens) <= options.context]
        self.chats, self.too_long = len(found), len(found) - len(self._chats)
        if found and not self._chats:
            shortest = min(len(chat.tokens) for chat in found)
            raise OptionError(
                f"each of the {len(found):,} chats has more tokens than --context {options.context}, the shortest "
                f"{shortest:,}: give a longer --context"
            )
        digest = hashlib.sha256(self._texts.tobytes())
        for chat in self._chats:
            digest.update(chat.tokens.tobytes() + chat.answers.tobytes())
        self.fingerprint = digest.hexdigest()

    def row(self, index: int) -> Row:
        """See `Rows`."""
        draw = np.random.default_rng([self._options.seed, index])
        share = self._options.chat_share if self.text_tokens else 1.0
        return self._packed(draw) if self._chats and draw.random() < share else self._cut(draw)

    def _cut(self, draw: np.random.Generator) -> Row:
        """A piece of the texts."""
        start = draw.integers(self.text_tokens - self._window + 1)
        tokens = np.concatenate([self._begin, self._texts[start : start + self._window]]).astype(np.int64)
        return Row(tokens, np.zeros(len(tokens), bool))

    def _packed(self, draw: np.random.Generator) -> Row:
        """Chats one after the other; the last one is cut."""
        length, picked = 0, []
        while length < self._options.context:
            picked.append(self._chats[draw.integers(len(self._chats))])
            length += len(picked[-1].tokens)
        parts = zip(*((chat.tokens, chat.answers) for chat in picked), strict=True)
        tokens, answers = (np.concatenate(part)[: self._options.context] for part in parts)
        return Row(tokens.astype(np.int64), answers)


def _begin(tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """What the tokenizer puts before a text."""
    text = "a"
    plain, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    before = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return np.array(whole[:before], np.int32)


def _encode_texts(tokenizer: Tokenizer, files: Sequence[Path]) -> npt.NDArray[np.int32]:
    """The tokens of all texts, with what ends a text after each."""
    end = sorted(tokenizer.eos_ids)[:1]
    parts = [tokenizer.encode(read_text(file, "--text"), add_special_tokens=False, literal=True) for file in files]
    for file, part in zip(files, parts, strict=True):
        if not part:
            raise OptionError(f"--text {file}: is empty")
    return np.array([token for part in parts for token in [*part, *end]], np.int32)


def _read_chats(tokenizer: Tokenizer, file: Path) -> Iterator[Row]:
    lines = [(n, line) for n, line in enumerate(read_text(file, "--chat").split("\n"), 1) if line.strip()]
    if not lines:
        raise OptionError(f'--chat {file}: is empty; a line is {{"messages": [{{"role": …, "content": …}}, …]}}')
    for number, line in lines:
        where = f"--chat {file}, line {number}"
        try:
            yield _encode_chat(tokenizer, _messages(line, where))
        except OptionError as error:
            raise error if str(error).startswith(where) else OptionError(f"{where}: {error}") from None


def _messages(line: str, where: str) -> Sequence[Mapping[str, Any]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{where}: is not JSON ({first_line(error)}): {shorten(line)}") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise OptionError(f'{where}: a chat has a list of "messages", got {shorten(row)}')
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise OptionError(f'{where}: a message has a text as "role" and one as "content", got {shorten(message)}')
        if not is_unicode(content):
            raise OptionError(f"{where}: a message is not valid Unicode, it has a half of a pair: {shorten(content)}")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise OptionError(f'{where}: the chat has no message of the "assistant", which is what is learned from')
    return messages


def _encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Row:
    """A chat in the model's template, special tokens in users' messages as text; what the assistant says is marked.

    Raises:
        OptionError: the template refuses the chat, or changes what an assistant said so that it is not found.
    """
    whole = tokenizer.render_chat(messages, add_generation_prompt=False, literal=True)
    cuts = [0]  # an assistant's words are from an odd one to the next
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        before = tokenizer.render_chat(messages[:index], literal=True) if index else ""
        through = tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False, literal=True)
        said = through.startswith(before) and message["content"].strip() in through[len(before) :]
        # Some templates show another past than present, without what was thought.
        if said and cuts[-1] <= len(before) and whole.startswith(through):
            cuts += [len(before), len(through)]
    if len(cuts) == 1:
        raise OptionError("the chat template shows no message of the assistant as it was said")
    tokens: list[int] = []
    answers: list[bool] = []
    for part, (begin, end) in enumerate(zip(cuts, [*cuts[1:], len(whole)], strict=True)):
        ids = tokenizer.encode_marked(whole[begin:end], add_special_tokens=False) if end > begin else []
        tokens += ids
        answers += [part % 2 == 1] * len(ids)
    return Row(np.array(tokens, np.int32), np.array(answers, bool))
