"""The small trained model: its gates keep what questions need, and the engine answers as PyTorch does."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import ROOT
from tokenizers import Tokenizer

from trimkv_export.checkpoint.gates import open_gates
from trimkv_export.cli import main
from trimkv_export.evaluation import Result, evaluate, read_tasks

TINY_GATES = ROOT / "examples" / "tiny_gates"
BUDGET, LENGTH = 128, 1024


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(TINY_GATES / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten documents of 1,024 tokens with four questions each, and two texts."""
    folder = tmp_path_factory.mktemp("tasks")
    done = script("tasks", folder, "--length", LENGTH, "--documents", 10, "--texts", 2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the shipped rg10 gates with a budget of 1/8 of the documents."""
    folder = tmp_path_factory.mktemp("tiny_gates") / "package"
    main(["build", "--model", str(TINY_GATES / "checkpoint/rg10"), "--budget", str(BUDGET), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def results(package: Path, tasks: Path) -> dict[str, Result]:
    """What three policies make of the tasks at a budget of 1/8."""
    rows = [*read_tasks(tasks / "recall.jsonl"), *read_tasks(tasks / "text.jsonl")]
    found = evaluate(package, rows, ["global", "sinks+recent", "full"], [BUDGET], threads=1)
    return {str(result.policy): result for result in found}


def test_the_right_answer_is_told(tmp_path: Path) -> None:
    done = script("tasks", tmp_path, "--length", 512, "--documents", 1, "--questions", 1, "--texts", 1)
    row = json.loads((tmp_path / "recall.jsonl").read_text())
    answer = (tmp_path / "answer.txt").read_text()
    assert answer == row["answer"].strip() + "\n"
    assert done.stdout.endswith(f": {answer}")
    assert (tmp_path / "question.txt").read_text() == row["context"] + row["prompt"]


def test_recall_from_an_eighth_of_the_document(results: dict[str, Result]) -> None:
    gates, window, full = (results[name].accuracy or 0.0 for name in ("global", "sinks+recent", "full"))
    assert full >= 0.9
    assert gates >= 0.9 * full
    assert gates >= 2 * window


def test_perplexity_from_an_eighth_of_the_text(results: dict[str, Result]) -> None:
    gates, window, full = (results[name].perplexity or 0.0 for name in ("global", "sinks+recent", "full"))
    assert gates <= 1.1 * full
    assert gates < window


def test_engine_answers_as_pytorch(package: Path, tasks: Path) -> None:
    done = script("against_torch", package, "--task", tasks / "recall.jsonl", "--budget", 16, BUDGET, "--questions", 8)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["engine"] for row in rows} >= {"portable"}
    assert all(row["same"] == row["questions"] == 8 for row in rows)


@pytest.mark.parametrize("arguments", [("--questions", 13), ("--length", 100), ("--documents", 0)])
def test_tasks_refuses_what_has_no_room(tmp_path: Path, arguments: tuple[object, ...]) -> None:
    done = script("tasks", tmp_path, *arguments)
    assert done.returncode == 2
    assert f"got {arguments[1]}" in done.stderr


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script train.py as a module. Its neighbours have common names, so none stays imported."""
    names = ("train", "data", "documents", "model", "plots", "ship", "text")
    monkeypatch.syspath_prepend(TINY_GATES)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("train")
    for name in names:
        sys.modules.pop(name, None)


def small_trainee(training: ModuleType) -> Any:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        value = (layer(torch.full((1, 3), step / 10)) - 1).square().mean()
        return value, {"loss": value.item()}

    return training.Trainee(layer, [torch.optim.AdamW(layer.parameters(), lr=0.1)], lambda step: 1 / (step + 1), loss)


def test_training_goes_on_where_it_was(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    (tmp_path / "whole").mkdir()
    whole = small_trainee(training)
    log = training.fit("run", whole, 6, tmp_path / "whole")
    stopped = small_trainee(training)
    inner = stopped.loss

    def stop_at_three(step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return inner(step)

    stopped.loss = stop_at_three
    with pytest.raises(KeyboardInterrupt):
        training.fit("run", stopped, 6, tmp_path)
    again = small_trainee(training)
    assert training.fit("run", again, 6, tmp_path) == log
    assert torch.equal(again.module.weight, whole.module.weight)


def test_gates_are_trained_on_documents(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short steps, with the shipped backbone."""
    data = sys.modules["data"]
    monkeypatch.setattr(training, "GATE_MIX", replace(training.GATE_MIX, length=512, facts=2, asked=2, plain=0.0))
    small = {"steps": 2, "context": 512, "budget": 32}
    monkeypatch.setattr(training, "GATE_OPTIONS", training.GATE_OPTIONS | small)
    tokenizer = Tokenizer.from_file(str(TINY_GATES / "checkpoint/base/tokenizer.json"))
    corpus = data.Corpus(tokenizer, (TINY_GATES / "held_out.txt").read_text().splitlines()[:500])
    rows = training.Documents(corpus, 0)
    assert rows.row(0).answers.any()
    assert (rows.row(3).tokens == training.Documents(corpus, 0).row(3).tokens).all()
    log = training.train_gates(corpus, TINY_GATES / "checkpoint/base", "rg10", 0, tmp_path / "gates")
    assert [row["step"] for row in log] == [1, 2]
    assert open_gates(tmp_path / "gates").memory_size == 32
    assert training.train_gates(corpus, TINY_GATES / "checkpoint/base", "rg10", 0, tmp_path / "gates") == log


def test_documents_say_what_is_asked(training: ModuleType) -> None:
    documents, data = sys.modules["documents"], sys.modules["data"]
    sentences = [f"This is sentence {number}." for number in range(50)]
    rng = data.random.Random(0)
    facts = documents.draw_facts(rng, 5)
    parts = documents.plant(rng, [" " + sentence for sentence in sentences], facts, asked=20)
    read = ""
    asked = 0
    for text, is_answer in parts:
        if is_answer:
            name, number = text.strip().rsplit(" ", 1)
            assert f"The code is {name} {number}." in read
            assert read.endswith(f"Which code begins with {name}?\nAnswer:")
            asked += 1
        read += text
    assert asked == 20
    assert all(sentence in read for sentence in sentences)
