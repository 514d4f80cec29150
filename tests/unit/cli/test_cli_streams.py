"""The standard streams of every command: closed, full, with a reader that goes away, of another encoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import Cli

from trimkv_export.cli import COMMANDS

PROGRAM = [sys.executable, "-m", "trimkv_export"]


def shell(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a bash script; "$@" is the program with the arguments."""
    command = ["bash", "-c", script, "bash", *PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def printing(package: Path) -> list[list[str]]:
    """Commands that print something, of every kind."""
    return [
        ["--help"],
        ["--version"],
        ["doctor", "--json"],
        ["inspect", str(package)],
        ["run", str(package), "--prompt", "x", "--max-new-tokens", "2"],
        ["run", str(package), "--prompt", "x", "--max-new-tokens", "2", "--json"],
        ["plan", "--list-models"],
    ]


def test_a_full_disk(package: Path) -> None:
    for arguments in printing(package):
        done = shell('"$@" > /dev/full', *arguments)
        assert done.returncode == 7, arguments
        lines = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
        assert lines == ["error: stdout: cannot be written: No space left on device"]


def test_a_reader_that_is_gone(package: Path) -> None:
    """One exit code for all commands, and no word: a report that was cut is not done."""
    for arguments in printing(package):
        done = shell('"$@" | (exec 0<&-); exit ${PIPESTATUS[0]}', *arguments)
        assert done.returncode == 141, arguments
        assert [line for line in done.stderr.splitlines() if not line.startswith("note:")] == []


def test_stdout_that_is_closed(package: Path) -> None:
    done = shell('"$@" >&-', "inspect", package)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith("error: stdout is closed")


@pytest.mark.parametrize("closing", ["2>&-", "2>/dev/full", "2> >(exec 0<&-)"])
def test_stderr_that_cannot_be_written(package: Path, tmp_path: Path, closing: str) -> None:
    """Nobody reads the notes; the command does its work, and its exit code says how it ended."""
    done = shell(f'"$@" {closing}', "run", package, "--prompt", "x", "--max-new-tokens", "2", "--stats")
    assert (done.returncode, done.stderr) == (0, "")
    assert shell(f'"$@" {closing}', "run", tmp_path, "--prompt", "x").returncode == 6


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('"$@" <&-', "error: no prompt: give --prompt TEXT or --prompt-file FILE, or pipe a text in"),
        ('"$@" --prompt-file - <&-', "error: stdin is closed: give --prompt TEXT, or a file to --prompt-file"),
        ('"$@" 0> /dev/null', "error: stdin: cannot be read: Bad file descriptor"),
    ],
)
def test_stdin_that_cannot_be_read(package: Path, script: str, said: str) -> None:
    done = shell(script, "run", package)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [said])


def test_closed_streams_lend_their_number_to_no_file(package: Path, tmp_path: Path) -> None:
    """A session file that is opened as number 2 would have the notes in it."""
    file = tmp_path / "a.session"
    run = ["run", package, "--prompt", "x", "--max-new-tokens", "2"]
    assert shell('"$@" <&- 2>&-', *run, "--save-session", file, "--stats").returncode == 0
    assert shell('"$@"', *run, "--session", file).returncode == 0


def test_an_encoding_without_the_character(package: Path) -> None:
    script = 'PYTHONIOENCODING=ascii "$@"'
    asked = ["run", package, "--prompt", "é", "--max-new-tokens", "4"]
    done = shell(script, *asked, "--json")
    assert (done.returncode, json.loads(done.stdout)["new_tokens"]) == (0, 4)
    assert shell(script, *asked).returncode == 0
    assert shell(script, "doctor").returncode == 0


BAD_NAMES = [
    ("n" * 300, "a file's name has at most 255 bytes, and this one 300: 'nnn"),
    ("é" * 200, "a file's name has at most 255 bytes, and this one 400"),
    ("a/" * 2100 + "b", "a file's path has at most 4,095 bytes, and this one 4,201"),
    ("nul\0byte", "has a NUL character, which no file's name can have: 'nul\\x00byte'"),
    ("caf\udce9", "is not UTF-8 text, at character 3: 'caf\\udce9'; rename the file"),
]
# Every option and argument that names a file or may do so, with what else its command needs.
TRAIN = "--model", "x", "--budget", "8", "--steps", "1", "--output", "x", "--text", "x"
PATHS = [
    *((command, ("PACKAGE",), ()) for command in ("run", "bench", "inspect", "verify", "eval")),
    ("triton", ("PACKAGE",), ("--output", "x")),
    ("run", ("--prompt-file", "--image", "--video", "--session", "--save-session"), ("x",)),
    ("inspect", ("--kept", "--prompt-file", "--image", "--video"), ("x",)),
    ("verify", ("--case", "--against", "--text"), ("x",)),
    ("eval", ("--task", "--text", "--plot", "--answers"), ("x",)),
    ("triton", ("--output", "--environment"), ("x", "--output", "x")),
    ("build", ("--model", "--gates", "--output", "--recipe", "--calibrate", "--device", "--timing-cache"), ()),
    ("plan", ("--model", "--gates", "--recipe", "--plot", "--device"), ("--budget", "8")),
    ("train", ("--model", "--text", "--chat", "--output", "--gates"), TRAIN),
]


@pytest.mark.parametrize(("name", "said"), BAD_NAMES, ids=["long", "bytes", "path", "nul", "surrogate"])
@pytest.mark.parametrize(("command", "options", "rest"), PATHS)
def test_names_that_no_file_can_have(
    cli: Cli, command: str, options: tuple[str, ...], rest: tuple[str, ...], name: str, said: str
) -> None:
    for option in options:
        done = cli(command, *rest, *([name] if option == "PACKAGE" else [option, name]))
        assert (done.code, done.out) == (2, ""), option
        assert done.err.startswith(f"error: {option}: {said}")
        assert done.err.count("\n") == 1


def test_texts_that_are_no_unicode(cli: Cli) -> None:
    for option in ("--prompt", "--stop", "--system", "--template-var"):
        done = cli("run", "x", option, "caf\udce9")
        assert (done.code, done.err) == (2, f"error: {option}: is not UTF-8 text, at character 3\n")


def test_every_command_is_looked_at() -> None:
    assert {command for command, _, _ in PATHS} | {"doctor"} == {*COMMANDS}


def test_a_recipe_with_a_bad_name(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {'n' * 300}\ngates: ./gates\nbudget: 8\ndevice: l4\nprecision: fp16\n")
    done = cli("build", "--recipe", recipe, "--output", tmp_path / "out")
    assert done.code == 2
    assert "--model: a file's name has at most 255 bytes" in done.err


def test_outputs_that_are_devices_are_not_replaced(cli: Cli, package: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for command, option, file in (
        ("run", "--save-session", Path("/dev/null")),
        ("eval", "--answers", Path("/dev/null")),
        ("eval", "--plot", tmp_path / "pipe.png"),
        ("inspect", "--kept", tmp_path / "pipe.png"),
    ):
        before = file.stat()
        more: dict[str, list[object]] = {"eval": ["--text", tmp_path / "none"]}
        done = cli(command, package, *more.get(command, ["--prompt", "x"]), option, file)
        assert (done.code, done.out) == (7, "")
        assert "is a device or a pipe: name an ordinary file" in done.err
        assert (file.stat().st_ino, file.stat().st_mode) == (before.st_ino, before.st_mode)


def test_errors_are_no_commands_for_a_terminal(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", tmp_path / "\x1b[2J\x07", "--prompt", "x")
    assert (done.code, "\\x1b[2J\\x07" in done.err) == (6, True)
    assert not {"\x1b", "\x07"} & set(done.err)


def test_too_little_memory(cli: Cli, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 5.82 PiB")

    monkeypatch.setattr("trimkv_export.evaluation.bench.Engine.open", fail)
    done = cli("bench", package)
    assert (done.code, done.err) == (1, "error: there is not enough memory for this: Unable to allocate 5.82 PiB\n")
