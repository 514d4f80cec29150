"""Progress and tables where nobody looks at a terminal."""

import pytest

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
