import json
from pathlib import Path
from typing import Any

import pytest

from trimkv_export.errors import OptionError
from trimkv_export.evaluation import Question, Text, read_tasks
from trimkv_export.evaluation.tasks import question_tokens, text_tokens
from trimkv_export.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    """One token per byte."""
    return Tokenizer.open(checkpoint / "base")


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "tasks.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_both_kinds_in_one_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"prompt": "What?", "answer": " 4"},
        "",
        {"context": "Long. ", "prompt": "What?", "answer": " 4", "id": 7},
        {"text": "Once upon", "id": "tale"},
    )
    assert read_tasks(file) == [
        Question("What?", " 4", id="tasks.jsonl:1"),
        Question("What?", " 4", "Long. ", "7"),
        Text("Once upon", id="tale"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2: not JSON \(.*\): '{'"),
        ("[1]", r"line 2: a task is an object with keys, got '\[1\]'"),
        ({"prompt": "a"}, 'line 2: a task needs a text as "answer", which is missing'),
        ({"answer": "a"}, 'line 2: a task needs a text as "prompt", which is missing'),
        ({"prompt": "a", "answer": 4}, 'line 2: a task needs a text as "answer", got 4'),
        ({"prompt": "a", "answer": "b", "context": None}, 'line 2: a task needs a text as "context", got None'),
        ({"prompt": "a", "answer": " "}, "line 2: \"answer\" is empty: ' '"),
        ({"text": ""}, "line 2: \"text\" is empty: ''"),
        ({"text": "a", "id": [1]}, r'line 2: a task needs a text as "id", got \[1\]'),
        ({"text": "a\ud800"}, 'line 2: "text" is not valid Unicode'),
        ({"prompt": "a", "anwser": "b"}, "line 2: a question has no key 'anwser'; the keys are prompt, answer"),
        ({"prompt": "a", "text": "b"}, "line 2: a text has no key 'prompt'; the keys are text, id"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path, {"text": "good"}, row)
    with pytest.raises(OptionError, match=f"^{file}, {message}"):
        read_tasks(file)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"the task file .*missing: cannot be read: No such file"):
        read_tasks(tmp_path / "missing")
    with pytest.raises(OptionError, match="the task file is empty"):
        read_tasks(write(tmp_path, "", " "))
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(OptionError, match=r"the task file .*latin: is not UTF-8 text: byte 0xe9 at 10"):
        read_tasks(tmp_path / "latin")


def test_tokens_of_a_question(tokenizer: Tokenizer) -> None:
    question = Question("ab?", " 42", "cde")
    found = question_tokens(question, tokenizer, None)
    assert (list(found.context), list(found.prompt)) == (tokenizer.encode("cde"), tokenizer.encode("ab?"))
    assert found.new_tokens == 3
    assert question_tokens(question, tokenizer, found).context is found.context
    assert question_tokens(Question("ab?", " 42"), tokenizer, None).context == []


def test_pieces_of_a_text(tokenizer: Tokenizer) -> None:
    def pieces(text: str, piece: int | None) -> list[str]:
        return [tokenizer.decode(tokens) for tokens in text_tokens(Text(text, piece), tokenizer)]

    assert pieces("abcdefgh", None) == ["abcdefgh"]
    assert pieces("abcdefgh", 3) == ["abc", "def"]
    assert pieces("abcdefgh", 4) == ["abcd", "efgh"]
    assert pieces("abcdefgh", 100) == ["abcdefgh"]
    with pytest.raises(OptionError, match="perplexity needs two tokens or more, got 1 in 'a'"):
        pieces("a", None)
    with pytest.raises(OptionError, match="perplexity needs two tokens or more, got 1 in 'abc'"):
        pieces("abc", 1)
