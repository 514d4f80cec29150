"""What `eval` measures: questions with an answer, and texts.

A task file is JSON lines. A question has "prompt" and "answer", and may have a "context" that comes before the prompt,
and an "id"; a text has "text", and may have an "id". One file may have both.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_export.checks import is_unicode
from trimkv_export.errors import OptionError
from trimkv_export.files import read_text
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.words import shorten

__all__ = ["Question", "QuestionTokens", "Task", "Text", "question_tokens", "read_tasks", "text_tokens"]

QUESTION_KEYS, TEXT_KEYS = ("prompt", "answer", "context", "id"), ("text", "id")


@dataclass(frozen=True)
class Question:
    """A model that has read `context + prompt` is to go on with `answer`.

    Questions in sequence with the same context share one pass over it.

    Attributes:
        prompt: the question itself.
        answer: the right answer, with the space that it begins with.
        context: what the model reads before the prompt.
        id: any name.
    """

    prompt: str
    answer: str
    context: str = ""
    id: str = ""


@dataclass(frozen=True)
class Text:
    """A text whose perplexity is measured.

    Attributes:
        text: the text.
        piece: cut the text into pieces of so many tokens; None leaves it whole.
        id: any name.
    """

    text: str
    piece: int | None = None
    id: str = ""


Task = Question | Text


@dataclass(frozen=True)
class QuestionTokens:
    """A question as a model takes it.

    Attributes:
        question: the question in words.
        context: tokens of its context.
        prompt: tokens of its prompt.
        new_tokens: how many tokens the answer has.
    """

    question: Question
    context: Sequence[int]
    prompt: Sequence[int]
    new_tokens: int


def read_tasks(file: Path) -> list[Task]:
    """Read a task file. A task without an "id" gets FILE:LINE.

    Raises:
        OptionError: a line is no task, or the file has none; the message names file and line.
    """
    lines = read_text(file, "the task file").split("\n")
    tasks = [
        _task(line, f"{file}, line {number}", f"{file.name}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not tasks:
        raise OptionError(f'{file}: the task file is empty; a line is {{"prompt": …, "answer": …}} or {{"text": …}}')
    return tasks


def _task(line: str, where: str, name: str) -> Task:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{where}: not JSON ({error}): {shorten(line)}") from None
    if not isinstance(row, Mapping):
        raise OptionError(f"{where}: a task is an object with keys, got {shorten(line)}")
    keys = TEXT_KEYS if "text" in row else QUESTION_KEYS
    if unknown := [key for key in row if key not in keys]:
        kind = "a text" if "text" in row else "a question"
        raise OptionError(f"{where}: {kind} has no key {shorten(unknown[0])}; the keys are {', '.join(keys)}")
    values = {"context": "", "id": name, **row}
    if isinstance(values["id"], int):
        values["id"] = str(values["id"])
    for key in keys:
        value = values.get(key)
        if not isinstance(value, str):
            got = f"got {shorten(value)}" if key in row else "which is missing"
            raise OptionError(f'{where}: a task needs a text as "{key}", {got}')
        if not value.strip() and key not in ("context", "id"):
            raise OptionError(f'{where}: "{key}" is empty: {shorten(value)}')
        if not is_unicode(value):
            raise OptionError(f'{where}: "{key}" is not valid Unicode, it has a half of a pair: {shorten(value)}')
    return Text(values["text"], id=values["id"]) if "text" in row else Question(**values)


def question_tokens(question: Question, tokenizer: Tokenizer, context: QuestionTokens | None) -> QuestionTokens:
    """Return the tokens of a question.

    Args:
        question: the question.
        tokenizer: of the model.
        context: a question with the same context, whose tokens are taken; None reads the context.
    """

    def more(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prompt = more(question.prompt) if question.context else tokenizer.encode(question.prompt)
    before: Sequence[int] = []
    if question.context:
        before = context.context if context else tokenizer.encode(question.context)
    # The answer as it follows the prompt: where a word begins it may be other tokens than alone.
    count = len(more(question.prompt + question.answer)) - len(more(question.prompt))
    return QuestionTokens(question, before, prompt, max(1, count))


def text_tokens(text: Text, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the tokens of a text, or of its pieces; each begins as the tokenizer begins a text.

    What is left after the last whole piece is left out, unless it is all there is.

    Raises:
        OptionError: the text, or a piece, has fewer than two tokens.
    """
    first, tokens = tokenizer.encode(""), tokenizer.encode(text.text, add_special_tokens=False)
    size = len(tokens) if text.piece is None else min(text.piece - len(first), len(tokens))
    if size < 1 or size + len(first) < 2:
        raise OptionError(
            f"perplexity needs two tokens or more, got {max(0, size) + len(first)} in {shorten(text.text[:60])}"
        )
    for start in range(0, len(tokens) - size + 1, size):
        yield [*first, *tokens[start : start + size]]
