"""Commands where a container leaves things out: no HOME, a user without a name, a log file in place of a terminal."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support import ROOT

NOBODY = 54321  # no line of /etc/passwd has it


# A user of this number, who may read what root may: Python may be installed in root's home.
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
AS_NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def run(folder: Path, *arguments: object, before: Sequence[str] = (), **environment: str) -> tuple[int, str, str]:
    """A command in `folder` with this environment and no other -> exit code, stdout and stderr."""
    command = [*before, sys.executable, "-m", "trimkv_export", *map(str, arguments)]
    environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def can_become_nobody() -> bool:
    try:
        return subprocess.run([*AS_NOBODY, sys.executable, "-c", "0"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def open_folder(package: Path, checkpoint: Path) -> Iterator[Path]:
    """A folder that everybody may use, with the package and its checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="trimkv-open-"))
    shutil.copytree(package, folder / "package")
    shutil.copytree(checkpoint, folder / "checkpoint")
    for each in (folder, *folder.rglob("*")):
        each.chmod(0o777 if each.is_dir() else 0o666)
    (folder / "task.jsonl").write_text('{"text": "once upon a time there was a cache"}\n')
    yield folder
    shutil.rmtree(folder)


COMMANDS: list[tuple[object, ...]] = [
    ("doctor",),
    ("run", "package", "--prompt", "x", "--max-new-tokens", "2", "--save-session", "after.session", "--stats"),
    ("run", "package", "--session", "after.session", "--prompt", "y", "--max-new-tokens", "2", "--json"),
    ("inspect", "package", "--kept", "kept.png", "--prompt", "once upon a time"),
    ("eval", "package", "--task", "task.jsonl", "--policy", "recent", "--budget", "4", "--plot", "quality.png"),
    ("verify", "package"),
    ("bench", "package", "--prompt-tokens", "20", "--new-tokens", "2", "--repeat", "1"),
    ("build", "--model", "checkpoint/base", "--gates", "checkpoint/gates", "--budget", "8", "--output", "built"),
    ("plan", "--model", "qwen3-1.7b", "--budget", "64", "--plot", "plan.png"),
    ("triton", "package", "--output", "repository"),
]


@pytest.mark.skipif(not can_become_nobody(), reason="only root may become another user, with setpriv")
def test_a_user_without_name_and_home(open_folder: Path) -> None:
    """As `docker run --user 54321` has it: no HOME, no line in /etc/passwd."""
    for command in COMMANDS:
        code, _, said = run(open_folder, *command, before=AS_NOBODY)
        assert code == 0, (command, said)
        assert [
            line for line in said.splitlines() if "rror" in line or "arning" in line or "Matplotlib" in line
        ] == [], command


def test_a_home_that_cannot_be_written(open_folder: Path) -> None:
    code, _, said = run(open_folder, "run", "package", "--prompt", "x", "--max-new-tokens", "2", HOME="/proc/nothing")
    assert (code, "Traceback" in said) == (0, False)


@pytest.mark.parametrize("name", ["FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PY_COLORS"])
def test_a_log_file_has_no_colours(open_folder: Path, name: str) -> None:
    """What asks for colours is meant for terminals; where output goes to a file or a pipe, it stays plain text."""
    colours = {name: "1", "TERM": "xterm-256color"}
    for command in (
        ("--help",),
        ("doctor",),
        ("inspect", "package"),
        ("run", "package", "--prompt", "x", "--max-new-tokens", "2", "--stats"),
        ("run", "nothing", "--prompt", "x"),
        ("bench", "package", "--prompt-tokens", "20", "--new-tokens", "2", "--repeat", "1"),
    ):
        _, out, said = run(open_folder, *command, HOME=str(open_folder), **colours)
        assert out + said
        assert "\x1b" not in out + said, command


def test_a_folder_that_is_gone(open_folder: Path, tmp_path: Path) -> None:
    """Where the shell still stands in a folder that somebody removed."""
    (gone := tmp_path / "gone").mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    for command in (
        ("doctor",),
        ("run", open_folder / "package", "--prompt", "x", "--max-new-tokens", "1"),
        ("run", "package", "--prompt", "x"),
        ("triton", open_folder / "package", "--output", "here"),
        ("build", "--model", open_folder / "checkpoint" / "base", "--gates", open_folder / "checkpoint" / "gates",
         "--budget", "8", "--output", "here"),
    ):  # fmt: skip
        gone.mkdir(exist_ok=True)
        done = subprocess.run(
            ["bash", "-c", script, gone, sys.executable, "-m", "trimkv_export", *map(str, command)],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, command
        assert done.returncode == 0 or done.stderr.startswith("error: "), (command, done.stderr)
