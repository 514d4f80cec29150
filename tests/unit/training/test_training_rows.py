import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimkv_export.errors import OptionError
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.training.options import TrainingOptions
from trimkv_export.training.rows import Corpus

GOOD: dict[str, Any] = {"kind": "rg10", "budget": 8, "steps": 10, "context": 64}


@pytest.fixture
def tokenizer(checkpoint: Path) -> Tokenizer:
    """One token for each byte."""
    return Tokenizer.open(checkpoint / "base")


def with_template(checkpoint: Path, folder: Path, template: str) -> Tokenizer:
    """The same with another chat template."""
    folder.mkdir()
    for file in (checkpoint / "base").glob("token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.open(folder)


def write(path: Path, *chats: Any) -> Path:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return path


def chat(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)]}


def test_rows_of_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("".join(f"{number:04d}" for number in range(100)))
    second.write_text("x" * 100 + "<|im_end|>")  # what looks like a special token is text
    corpus = Corpus(tokenizer, [first, second], [], TrainingOptions(**GOOD))
    assert corpus.text_tokens == 400 + 1 + 110 + 1
    rows = [corpus.row(index) for index in range(50)]
    assert {len(row.tokens) for row in rows} == {64}
    assert not any(row.answers.any() for row in rows)
    assert len({row.tokens.tobytes() for row in rows}) > 40
    text = first.read_text() + second.read_text()
    assert any(tokenizer.decode(row.tokens.tolist()) in text for row in rows)


def test_rows_depend_on_seed_and_number_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{number:04d}" for number in range(100)))
    chats = write(tmp_path / "c.jsonl", chat("What?", "That."), chat("Who?", "They."))

    def rows(order: list[int], seed: int = 0) -> dict[int, bytes]:
        corpus = Corpus(tokenizer, [text], [chats], TrainingOptions(**GOOD, seed=seed))
        return {index: corpus.row(index).tokens.tobytes() for index in order}

    assert rows([0, 1, 2, 1 << 40]) == rows([1 << 40, 2, 1, 0])
    assert rows([0, 1, 2]) != rows([0, 1, 2], seed=1)


def test_a_fingerprint_is_of_the_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    for file, text in zip(files, ("a" * 100, "a" * 100, "a" * 99 + "b"), strict=True):
        file.write_text(text)
    a, b, c = (Corpus(tokenizer, [file], [], TrainingOptions(**GOOD)).fingerprint for file in files)
    assert a == b != c


def test_what_the_assistant_says_is_marked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    said = ("What is <|im_end|> it?", "A cat.", "And that?", "A dog.")
    file = write(tmp_path / "chats.jsonl", chat(*said))
    corpus = Corpus(tokenizer, [], [file], TrainingOptions(**GOOD | {"context": 256}))
    row = corpus.row(0)
    marked = tokenizer.decode(row.tokens[row.answers].tolist())
    assert "A cat." in marked
    assert "A dog." in marked
    assert "What is" not in marked
    assert "What is <|im_end|> it?" in tokenizer.decode(row.tokens.tolist())  # as text


def test_long_chats_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", chat("Hi.", "Hello."), chat("Hi. " * 100, "Hello."))
    corpus = Corpus(tokenizer, [], [file], TrainingOptions(**GOOD | {"context": 128}))
    assert (corpus.chats, corpus.too_long) == (2, 1)
    assert len(corpus.row(0).tokens) == 128
    with pytest.raises(OptionError, match=r"each of the 2 chats has more tokens than --context 16, the shortest \d+"):
        Corpus(tokenizer, [], [file], TrainingOptions(**GOOD | {"context": 16}))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_chats(share: float, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("0123456789" * 40)
    chats = write(tmp_path / "chats.jsonl", chat("What?", "That."))
    corpus = Corpus(tokenizer, [text], [chats], TrainingOptions(**GOOD, chat_share=share))
    found = np.mean([corpus.row(index).answers.any() for index in range(400)])
    assert math.isclose(found, share, abs_tol=0.08)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", 'a chat has a list of "messages", got [1]'),
        ('{"conversations": []}', 'a chat has a list of "messages"'),
        ('{"messages": []}', 'a chat has a list of "messages"'),
        ('{"messages": [{"role": "user"}]}', "got {'role': 'user'}"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', 'a text as "role"'),
        ('{"messages": ["hi"]}', "got 'hi'"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', 'no message of the "assistant"'),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "half of a pair"),
    ],
)
def test_a_bad_chat_is_named(line: str, said: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(chat("a", "b")) + "\n\n" + line + "\n")
    with pytest.raises(OptionError) as raised:
        Corpus(tokenizer, [], [file], TrainingOptions(**GOOD))
    assert str(raised.value).startswith(f"--chat {file}, line 3: ")
    assert said in str(raised.value)


def test_a_template_that_refuses_is_named_with_the_line(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = with_template(checkpoint, tmp_path / "tokenizer", "{{ raise_exception('never') }}")
    file = write(tmp_path / "chats.jsonl", chat("a", "b"))
    with pytest.raises(OptionError, match=r"line 1: .*never"):
        Corpus(tokenizer, [], [file], TrainingOptions(**GOOD))


def test_a_template_that_changes_answers_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content if m.role == 'user' }}|{% endfor %}"
    tokenizer = with_template(checkpoint, tmp_path / "tokenizer", template)
    file = write(tmp_path / "chats.jsonl", chat("a", "b"))
    with pytest.raises(OptionError, match="line 1: the chat template shows no message of the assistant"):
        Corpus(tokenizer, [], [file], TrainingOptions(**GOOD))


def test_only_the_last_answer_counts_where_the_template_shortens_earlier_ones(checkpoint: Path, tmp_path: Path) -> None:
    """As with models that think: of earlier messages, what was thought is left out."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '' }};{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}"
    )
    tokenizer = with_template(checkpoint, tmp_path / "tokenizer", template)
    file = write(tmp_path / "chats.jsonl", chat("a", "first", "c", "second"))
    row = Corpus(tokenizer, [], [file], TrainingOptions(**GOOD | {"context": 60})).row(0)
    assert tokenizer.decode(row.tokens[row.answers].tolist()).startswith("second;")


def test_too_little_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = TrainingOptions(**GOOD)
    with pytest.raises(OptionError, match="nothing to train on: give --text FILE or --chat"):
        Corpus(tokenizer, [], [], options)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(OptionError, match=r"--text .*empty\.txt: is empty"):
        Corpus(tokenizer, [empty], [], options)
    with pytest.raises(OptionError, match=r"--chat .*empty\.txt: is empty"):
        Corpus(tokenizer, [], [empty], options)
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(OptionError, match="the texts have 6 tokens together, and a row of --context 64 needs 64"):
        Corpus(tokenizer, [short], [], options)
    with pytest.raises(OptionError, match=r"--text .*absent\.txt: cannot be read"):
        Corpus(tokenizer, [tmp_path / "absent.txt"], [], options)
