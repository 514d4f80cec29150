import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import Cli

from trimkv_export.cli import console
from trimkv_export.cli import eval as eval_module
from trimkv_export.evaluation import EvaluatedPolicy

ROWS = [
    {"context": "A long story. ", "prompt": "Who?", "answer": " I"},
    {"context": "A long story. ", "prompt": "When?", "answer": " now", "id": "when"},
    {"text": "Once upon a time there was a cache."},
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_json_answers_and_plot(cli: Cli, package: Path, tasks: Path, tmp_path: Path) -> None:
    text, picture, answers = tmp_path / "text", tmp_path / "quality.png", tmp_path / "answers.jsonl"
    text.write_text("The cache keeps what matters. " * 4)
    done = cli(
        "eval", package, "--task", tasks, "--text", text, "--context", 50, "--budget", 4, "--budget", 6,
        "--plot", picture, "--answers", answers, "--native", "off", "--threads", 1, "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["package"] == str(package)
    results = report["results"]
    assert len(results) == 11
    assert results[0].keys() == {
        "policy", "budget", "accuracy", "correct", "questions", "question_context", "perplexity", "tokens",
        "text_context", "accuracy_interval",
    }  # fmt: skip
    assert (results[0]["policy"], results[0]["budget"], results[0]["questions"]) == ("global", 4, 2)
    assert results[0]["tokens"] == 34 + 2 * 49
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 22
    assert rows[0].keys() == {"policy", "budget", "id", "expected", "generated", "correct"}
    assert [row["id"] for row in rows[:2]] == ["tasks.jsonl:1", "when"]
    with Image.open(picture) as image:
        assert image.size[0] > 1000


def test_tables(cli: Cli, package: Path, tasks: Path) -> None:
    some = ("--policy", "recent", "--policy", "full", "--budget", 4)
    done = cli("eval", package, "--task", tasks, *some, "--threads", 1)
    assert (done.code, done.err) == (0, "")
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert lines[0] == "Accuracy on 2 questions, contexts of 18 tokens on average"
    assert lines[1].split() == ["budget", "4", "35"]
    assert lines[2].split() == ["recent", "0.0%"]
    assert lines[4] == "Perplexity of 34 tokens, texts of 35 tokens on average"
    assert len(lines) == 8


def test_only_perplexity(cli: Cli, package: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The cache keeps what matters.")
    done = cli("eval", package, "--text", tmp_path / "text", "--policy", "full", "--plot", tmp_path / "quality.png")
    assert (done.code, done.err) == (0, "")
    assert "Accuracy" not in done.out
    assert (tmp_path / "quality.png").exists()


def test_outputs_are_checked_before_the_work(
    cli: Cli, package: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("it was evaluated")

    monkeypatch.setattr(eval_module, "evaluate", work)
    for option in ("--plot", "--answers"):
        for path, said in ((tmp_path / "no" / "file", "there is no folder"), (tmp_path, "is a folder")):
            done = cli("eval", package, "--task", tasks, option, path)
            assert (done.code, done.out) == (7, "")
            assert said in done.err
    done = cli("eval", package, "--task", tasks, "--plot", tmp_path / "quality.nosuch")
    assert done.code == 7
    assert ".nosuch is no kind of picture that matplotlib draws" in done.err


def test_lines_of_progress_without_a_terminal(
    cli: Cli, package: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "INTERVAL", 0.0)
    done = cli("eval", package, "--task", tasks, "--policy", "recent", "--policy", "full", "--budget", 4)
    lines = done.err.splitlines()
    assert lines[0].startswith("recent 4: ")
    assert lines[-1] == "full 35: 100%"
    assert len(lines) > 10


def test_the_help_names_all_policies() -> None:
    (option,) = (option for option in eval_module.command.params if option.name == "policies")
    assert list(getattr(option.type, "choices", ())) == list(EvaluatedPolicy)


def test_mistakes(cli: Cli, package: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("eval", package)
    assert (done.code, done.err) == (2, "error: nothing to evaluate: give --task FILE.jsonl or --text FILE\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    done = cli("eval", package, "--task", bad)
    assert done.code == 2
    assert done.err.startswith(f"error: {bad}, line 1: a task needs")
    done = cli("eval", tmp_path, "--task", tasks)
    assert done.code == 6
    done = cli("eval", package, "--text", tmp_path / "nosuch")
    assert (done.code, done.err) == (
        2, f"error: --text {tmp_path / 'nosuch'}: cannot be read: No such file or directory\n"
    )  # fmt: skip
    monkeypatch.delitem(sys.modules, "trimkv_export.cli.plots.quality", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("eval", package, "--task", tasks, "--plot", tmp_path / "quality.png")
    assert done.code == 10
    assert "trimkv-export[plot]" in done.err
