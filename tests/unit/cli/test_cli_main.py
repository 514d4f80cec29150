"""The command line as a whole: help, exit codes, pipes and Ctrl-C."""

import functools
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import huggingface_hub
import onnx
import pytest
from support import Cli, build, copy_package, make_checkpoint, seal

from trimkv_export import __version__
from trimkv_export import errors as errors_module
from trimkv_export.cli import COMMANDS
from trimkv_export.config import GROUPS
from trimkv_export.errors import TrimKVError
from trimkv_export.runtime import Engine

PROGRAM = [sys.executable, "-m", "trimkv_export"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_examples(cli: Cli, command: str, flag: str) -> None:
    done = cli(command, flag)
    assert (done.code, done.err) == (0, "")
    assert f"  trimkv-export {command}" in done.out.partition("Example")[2]


def test_help_lists_commands_and_exit_codes(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    assert all(f"  {command} " in done.out for command in COMMANDS)
    classes: list[type[TrimKVError]] = [TrimKVError, *TrimKVError.__subclasses__(), errors_module.DownloadError]
    codes = sorted({kind.exit_code for kind in classes})
    assert codes == list(range(1, 12))
    listed = done.out.partition("Exit codes:")[2]
    assert all(f" {code}  " in listed for code in [*codes, 130, 141, 143])
    assert {kind.__name__ for kind in classes} == {name for name in errors_module.__all__ if name[0].isupper()}


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.code, done.out) == (0, f"trimkv-export, version {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("fly", "there is no command 'fly'; The commands are build, plan, "),
        ("buid", "there is no command 'buid'; did you mean 'build'?"),
        ("--fly", "there is no option '--fly'. See trimkv-export --help"),
        ("build --buget 8", "there is no option '--buget'; did you mean '--budget'"),
        (
            "eval x --plt y",
            "there is no option '--plt'; did you mean '--plot' or '--policy'? See trimkv-export eval --help",
        ),
        ("run", "PACKAGE is missing. See trimkv-export run --help"),
        ("triton x", "--output is missing. See trimkv-export triton --help"),
        ("verify a b", "got unexpected extra argument (b). See trimkv-export verify --help"),
        ("build --budget", "option '--budget' requires an argument"),
        ("bench x --repeat 0", "--repeat: 0 is not in the range x>=1. See trimkv-export bench --help"),
        ("bench x --threads many", "--threads: 'many' is not a valid integer. See "),
        ("run x --provider tpu", "--provider: 'tpu' is not one of 'cpu', 'cuda', 'tensorrt'. See "),
        ("build --model x", "there is no budget: give --budget"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: str, said: str) -> None:
    """In the style of every other error: one line."""
    done = cli(*arguments.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {said}")
    assert done.err.count("\n") == 1


def test_without_a_command(cli: Cli) -> None:
    assert cli() == cli("--help")


def help_words(command: click.Command) -> set[str]:
    """What a help shows in one piece: every option's name, and the words of the texts."""
    parameters = [each for each in command.params if isinstance(each, click.Option)]
    texts = [each.help or "" for each in parameters] + [command.help or "", command.epilog or ""]
    names = {name for each in parameters for name in (*each.opts, *each.secondary_opts)}
    return names | {word for text in texts for word in text.split() if len(word) < 40} - {"\b"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_in_80_columns(cli: Cli, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is too long, and none ends within a word, such as after the first hyphen of --max-batch."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli(command, "--help").out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    missing = help_words(importlib.import_module(f"trimkv_export.cli.{command}").command) - set(shown.split())
    assert missing == set()


def test_long_examples_are_commands_of_a_shell(cli: Cli) -> None:
    shown = cli("build", "--help").out.partition("Examples:")[2]
    commands = [shlex.split(text) for text in re.split(r"\n(?!      )", shown.replace("\\\n", "")) if text.strip()]
    assert [words[:2] for words in commands] == [["trimkv-export", "build"]] * len(commands)
    assert ["--gates", "ngocbh/DBTrimKV-Qwen3-4B-Math", "--budget", "128"] in [words[-4:] for words in commands]


@pytest.mark.parametrize("command", ["build", "plan"])
def test_options_in_groups(cli: Cli, command: str) -> None:
    shown = cli(command, "--help").out
    found = re.findall(r"^(\w[\w ]+):$", shown, re.MULTILINE)
    groups = [group for group in GROUPS if command == "build" or group != "TensorRT"]
    assert found == [*groups, "Other options"]
    basics = shown.partition("Basics:")[2].partition("Eviction:")[0]
    assert all(f"--{name} " in basics for name in ("model", "budget", "recipe"))


class ExitCodes:
    """One way to each exit code; every method gives the arguments of a command."""

    def __init__(self, folder: Path, checkpoint: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.checkpoint, self.package, self.patch = folder, checkpoint, package, monkeypatch

    def build(self, model: str | Path, gates: str | Path) -> list[str | Path]:
        return ["build", "--model", model, "--gates", gates, "--budget", "8", "--output", self.folder / "out"]

    def code_1(self) -> list[str | Path]:
        def fail(*_: object, **__: object) -> None:
            raise TrimKVError("something else")

        self.patch.setattr(Engine, "open", fail)
        return ["run", self.package, "--prompt", "x"]

    def code_2(self) -> list[str | Path]:
        return ["run", self.package, "--prompt", ""]

    def code_3(self) -> list[str | Path]:
        return self.build(self.folder / "nothing", self.checkpoint / "gates")

    def code_4(self) -> list[str | Path]:
        def unreachable(*_: object, **__: object) -> None:
            raise ConnectionError("no route to host")

        self.patch.setattr(huggingface_hub, "snapshot_download", unreachable)
        return self.build("owner/name", self.checkpoint / "gates")

    def code_5(self) -> list[str | Path]:
        base = shutil.copytree(self.checkpoint / "base", self.folder / "base")
        file = base / "config.json"
        file.write_text(file.read_text().replace('"qwen3"', '"qwen9"'))
        return self.build(base, self.checkpoint / "gates")

    def code_6(self) -> list[str | Path]:
        return ["run", self.checkpoint / "base", "--prompt", "x"]

    def code_7(self) -> list[str | Path]:
        (self.folder / "out").mkdir()
        (self.folder / "out" / "mine").touch()
        return [*self.build(self.checkpoint / "base", self.checkpoint / "gates"), "--overwrite"]

    def code_8(self) -> list[str | Path]:
        return ["run", build(self.checkpoint, self.folder / "bf16", precision="bf16").path, "--prompt", "x"]

    def code_9(self) -> list[str | Path]:
        bad = copy_package(self.package, self.folder / "bad")
        (bad / "decoder.onnx").write_bytes(onnx.ModelProto(ir_version=11).SerializeToString())
        seal(bad)
        return ["verify", bad]

    def code_10(self) -> list[str | Path]:
        self.patch.setitem(sys.modules, "onnxruntime", None)
        return ["run", self.package, "--prompt", "x"]

    def code_11(self) -> list[str | Path]:
        arguments = self.build(self.checkpoint / "base", self.checkpoint / "gates")
        return [*arguments, "--device", "orin-nano-4gb", "--max-batch", "60000"]


@pytest.mark.parametrize("code", range(1, 12))
def test_exit_codes(
    cli: Cli, tmp_path: Path, checkpoint: Path, package: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with monkeypatch.context() as patch:
        arguments = getattr(ExitCodes(tmp_path, checkpoint, package, patch), f"code_{code}")()
        done = cli(*arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert not list(tmp_path.glob(".out*"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose texts never end."""
    folder = tmp_path_factory.mktemp("endless")
    source = make_checkpoint(folder)
    (source / "base" / "generation_config.json").unlink()
    file = source / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))
    return build(source, folder / "package").path


def test_interrupted(endless: Path) -> None:
    command = [*PROGRAM, "run", str(endless), "--prompt", "x", "--max-new-tokens", "100000000"]
    # A shell starts its background jobs, these tests perhaps, with SIGINT ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard) as process:
        assert process.stdout
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip().endswith("interrupted")
    assert b"Traceback" not in err


WAITING_BUILD = """
import sys, time
from trimkv_export.build import builder
from trimkv_export.cli import main
def wait(*_):
    print("ready", flush=True)
    time.sleep(600)
builder.place_weights = wait
main(sys.argv[1:])
"""


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def terminated(command: list[str], folder: Path, started: Callable[["subprocess.Popen[bytes]"], None]) -> None:
    """Send SIGTERM to a command that has made a hidden folder; it removes it and says how it ended."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            started(process)
            assert len(hidden(folder)) == 1
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143
    assert err.decode() == "terminated\n"
    assert hidden(folder) == []


def test_a_build_that_is_terminated(checkpoint: Path, tmp_path: Path) -> None:
    def started(process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"

    arguments = ["build", "--model", checkpoint / "base", "--gates", checkpoint / "gates", "--budget", "8"]
    output = ["--output", tmp_path / "package"]
    terminated([sys.executable, "-c", WAITING_BUILD, *map(str, [*arguments, *output])], tmp_path, started)
    assert list(tmp_path.iterdir()) == []


def test_an_eval_that_is_terminated(package: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Which errors count, and which do not? " * 20_000)
    (tmp_path / "packages").mkdir()
    copied = copy_package(package, tmp_path / "packages" / "small")

    def started(process: "subprocess.Popen[bytes]") -> None:
        while not hidden(copied.parent):
            assert process.poll() is None, "it ended before it made a folder"
            time.sleep(0.01)

    arguments = ["eval", str(copied), "--text", str(tmp_path / "text.txt"), "--policy", "per_head"]
    terminated([*PROGRAM, *arguments], copied.parent, started)


def test_the_signal_is_given_back(cli: Cli) -> None:
    cli("--version")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_reader_that_goes_away(endless: Path) -> None:
    run = " ".join([*PROGRAM, "run", str(endless), "--prompt", "x", "--max-new-tokens", "100000"])
    script = f"{run} | head -c 1 | wc -c; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "141"]  # not 0: nothing after what was read has been done
    assert done.stderr == ""


def test_the_program_and_the_module_are_one() -> None:
    script = Path(sys.executable).parent / "trimkv-export"
    outputs = [
        subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
        for command in ([script], PROGRAM)
    ]
    assert outputs[0] == outputs[1]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom trimkv_export.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"onnx", "onnxruntime", "numpy", "tokenizers", "torch", "rich"} & set(found)


def test_names_with_brackets_are_printed_as_they_are(cli: Cli, package: Path, tmp_path: Path) -> None:
    copied = copy_package(package, tmp_path / "[red]x[/red]")
    done = cli("inspect", copied)
    assert done.code == 0
    assert f"{os.sep}[red]x[/red]" in done.out
