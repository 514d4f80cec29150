import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Cli

from trimkv_export.checkpoint.gates import open_gates
from trimkv_export.cli import train as command
from trimkv_export.training.trainer import state_file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return file


def arguments(checkpoint: Path, text: Path, output: Path) -> list[Any]:
    numbers = ("--budget", 8, "--steps", 2, "--context", 48, "--width", 8, "--start-rows", 1)
    return ["train", "--model", checkpoint / "base", "--text", text, *numbers, "--output", output]


def test_a_report_in_words(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    done = cli(*arguments(checkpoint, text, tmp_path / "gates"))
    assert done.code == 0, done.err
    assert done.out.startswith(f"Trained {tmp_path / 'gates'}\n")
    for said in ("rg10, ", "96 tokens in 2 steps", "KL to the full cache", "next-token loss", "capacity loss"):
        assert said in done.out
    assert done.out.rstrip().endswith(f"trimkv-export build --model {tmp_path / 'gates'} --budget 8")


def test_a_report_in_json(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
    long = [{"role": "user", "content": "Hi? " * 99}, messages[1]]
    chats.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (messages, long)))
    done = cli(*arguments(checkpoint, text, tmp_path / "gates"), "--chat", chats, "--kind", "rg", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["steps"], report["tokens"], report["chats"], report["text_tokens"]) == (2, 96, 2, 1801)
    assert {"kl", "next_token", "capacity", "seconds", "precision", "device", "parameters"} <= report.keys()
    assert "1 of 2 chats are longer than the context" in done.err
    assert open_gates(tmp_path / "gates").kind == "rg"


def test_the_gates_name_their_backbone(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    cli(*arguments(checkpoint, text, tmp_path / "a"))
    cli(*arguments(checkpoint, text, tmp_path / "b"), "--base-model", "owner/name")
    named = open_gates(tmp_path / "a").base_model
    assert named is not None
    assert (tmp_path / "a" / named).resolve() == (checkpoint / "base").resolve()
    assert open_gates(tmp_path / "b").base_model == "owner/name"
    assert cli("build", "--model", tmp_path / "a", "--budget", 8, "--output", tmp_path / "package").code == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--budget", "48"], 2, "budget must be below the context (48), got 48"),
        (["--steps", "0"], 2, "steps must be a whole number from 1"),
        (["--learning-rate", "nan"], 2, "learning-rate must be a number, got nan"),
        (["--save-every", "0"], 2, "save-every must be a whole number of at least 1, got 0"),
        (["--device", "abacus"], 8, "device 'abacus' cannot be used here"),
        (["--text", "absent.txt"], 2, "--text absent.txt: cannot be read"),
        (["--gates", "absent"], 3, "absent: does not exist"),
        (["--model", "absent"], 3, "the model 'absent' is neither a folder"),
        (["--kind", "rg4"], 2, "'rg4' is not one of 'rg10', 'rg'"),
    ],
)
def test_bad_options(
    options: list[str], code: int, said: str, cli: Cli, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    done = cli(*arguments(checkpoint, text, tmp_path / "gates"), *options)
    assert done.code == code
    assert said in done.err
    assert done.err.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_nothing_to_train_on(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli("train", "--model", checkpoint / "base", "--budget", 8, "--steps", 1, "--output", tmp_path / "gates")
    assert done.code == 2
    assert "nothing to train on: give --text FILE or --chat FILE.jsonl" in done.err


def test_output_that_is_there_is_refused_before_anything_is_read(
    cli: Cli, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "mine").write_text("mine")
    monkeypatch.setattr(command, "Corpus", None)
    done = cli(*arguments(checkpoint, text, tmp_path / "gates"))
    assert done.code == 7
    assert "exists already" in done.err


def test_a_stopped_run_says_how_to_go_on(
    cli: Cli, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.optim.AdamW.step

    def stop(self: torch.optim.AdamW, *more: Any) -> Any:
        if state_file(tmp_path / "gates").exists():
            raise KeyboardInterrupt
        return whole(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        assert cli(*arguments(checkpoint, text, tmp_path / "gates")).code == 130
    done = cli(*arguments(checkpoint, text, tmp_path / "gates"))
    assert done.code == 2
    assert "go on with --resume" in done.err
    assert cli(*arguments(checkpoint, text, tmp_path / "gates"), "--resume").code == 0
    assert (tmp_path / "gates" / "trimkv_weights.pth").is_file()
