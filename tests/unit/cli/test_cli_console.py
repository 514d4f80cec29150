"""Progress and tables, on a terminal and elsewhere."""

import os
import subprocess
import sys

import pytest
from support import ROOT

from trimkv_export.cli import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_line_of_progress_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.build_progress() as progress:
        for second in range(25):
            clock[0] = 100.0 + second
            progress("weights", second, 40)
    assert capsys.readouterr().err.splitlines() == ["weights: 25%", "weights: 50%"]


def test_each_kind_of_progress_has_its_words(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.byte_progress() as progress, console.token_progress("measuring") as tokens:
        clock[0] += 10
        progress("sha256", 1_500_000, 3_000_000)
        tokens(1000, 2000)
    assert capsys.readouterr().err.splitlines() == ["sha256: 1.5 MB of 3 MB", "measuring: 1,000 of 2,000 tokens"]


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.build_progress() as progress:
        progress("weights", 0, 0)
        progress("weights", 1, 1)
    assert capsys.readouterr().err == ""


def test_columns_are_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_columns("A title that is longer than the table", ["name", "1"], [["x" * 100, "2"], ["[b]y", "33"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "A title that is longer than the table",
        "name" + " " * 98 + " 1",
        "x" * 100 + "   2",
        "[b]y" + " " * 98 + "33",
    ]


def test_a_table_in_a_pipe_is_not_folded() -> None:
    """As wide as its rows, whatever COLUMNS says, without spaces at the ends and without colours."""
    environment = os.environ | {"COLUMNS": "40", "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "trimkv_export", "doctor"], capture_output=True, text=True, check=True, env=environment
    )
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) > 80
    assert [line for line in lines if line != line.rstrip() or line.startswith(" ")] == []


@pytest.mark.parametrize(("colours", "styled"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_has_styles_unless_no_color(colours: dict[str, str], styled: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | colours
    environment |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    code = "from trimkv_export.cli.console import print_table as p; p('title', {'name': 'value'})"
    outer, inner = os.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=inner, check=True, env=environment)
    os.close(inner)
    with os.fdopen(outer, "rb") as terminal:
        written = terminal.read1(4096)
    assert b"title" in written
    assert (b"\x1b[" in written) == styled
