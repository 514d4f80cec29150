"""The command line as a whole: help, exit codes, pipes and Ctrl-C."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from support import Cli, build, copy_package, make_checkpoint, seal

from trimkv_export import __version__
from trimkv_export import errors as errors_module
from trimkv_export.cli import COMMANDS
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
    assert codes == list(range(1, 11))
    listed = done.out.partition("Exit codes:")[2]
    assert all(f" {code}  " in listed for code in codes)
    assert {kind.__name__ for kind in classes} == {name for name in errors_module.__all__ if name[0].isupper()}


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.code, done.out) == (0, f"trimkv-export, version {__version__}\n")


@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["--fly"], ["build", "--model", "x"], ["verify", "a", "b"]])
def test_wrong_usage(cli: Cli, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage: trimkv-export" in done.err
    assert "Error: " in done.err


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
        (bad / "decoder.onnx").write_bytes(b"no graph")
        seal(bad)
        return ["verify", bad]

    def code_10(self) -> list[str | Path]:
        self.patch.setitem(sys.modules, "onnxruntime", None)
        return ["run", self.package, "--prompt", "x"]


@pytest.mark.parametrize("code", range(1, 11))
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


def test_a_reader_that_goes_away(endless: Path) -> None:
    run = " ".join([*PROGRAM, "run", str(endless), "--prompt", "x", "--max-new-tokens", "100000"])
    script = f"{run} | head -c 1 | wc -c; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "0"]
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
