"""What the commands share: tables, progress bars, JSON, sizes in words. Reports go to stdout, the rest to stderr."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from trimkv_export.cli.streams import say, visible
from trimkv_export.words import amount

__all__ = [
    "SAMPLING",
    "budget_option",
    "build_progress",
    "byte_progress",
    "check_plan_option",
    "context_option",
    "json_option",
    "note",
    "note_portable",
    "print_columns",
    "print_json",
    "print_table",
    "provider_option",
    "step_progress",
    "threads_option",
    "token_progress",
    "trust_option",
]

# Columns where nobody looks: in a pipe or a file a line is never folded.
UNFOLDED = 1 << 16
# Seconds between two lines of progress where stderr is no terminal.
INTERVAL = 10.0
PORTABLE = (
    "note: native kernels are not built, so the slower portable bodies run; build the kernels with `make plugins` in "
    "the source tree, or reinstall where there is a C++17 compiler"
)

# What the sampling options of `run` and `triton` do.
SAMPLING = {
    "temperature": "0 takes the likeliest token, a higher value draws more freely.",
    "top_p": "Draw from the likeliest tokens that have this probability together.",
    "top_k": "Draw from this many of the likeliest tokens; 0 or -1 draws from all.",
    "min_p": "Draw from tokens at least this fraction as likely as the likeliest.",
    "repetition_penalty": "A value above 1 makes tokens that were used less likely.",
    "presence_penalty": "A value above 0 makes tokens that the model chose before less likely.",
    "frequency_penalty": "A value above 0 makes tokens less likely each time that the model chooses them.",
    "logit_bias": "Add BIAS to the logit of a token id, -100 to 100; repeatable.",
}

provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where the model runs. tensorrt uses the package's TensorRT engine.",
)
trust_option = click.option(
    "--trust-package-plugin",
    is_flag=True,
    help="With tensorrt, load the package's own native library where none is installed here.",
)
threads_option = click.option(
    "--threads", type=int, help="Threads that compute a step. Default: as many as this process may keep busy."
)
context_option = click.option(
    "--context", type=int, help="Refuse conversations beyond this many tokens. Default: the model's limit."
)
budget_option = click.option("--budget", type=int, help="Keep fewer entries than the package was built for.")
check_plan_option = click.option(
    "--check-plan", is_flag=True, help="Compare memory with the package's plan; fail if it took more."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON report instead of text.")


def _console(*, stderr: bool = False) -> Console:
    """Styles are for terminals, and not where NO_COLOR is set (https://no-color.org)."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    plain = not terminal or bool(os.environ.get("NO_COLOR"))
    return Console(
        stderr=stderr,
        force_terminal=terminal,
        color_system=None if plain else "auto",
        width=None if terminal else UNFOLDED,
        highlight=False,
    )


def print_json(report: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout, with escapes where stdout's encoding lacks a character."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(report, indent=2)
    click.echo(text)


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print names and values to stdout, under a title."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(visible(name)), Text(visible(value)))
    _print(title, table)


def print_columns(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells under the names of their columns; all but the first column are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if index else "left", style=None if index else "bold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    _print(title, table)


def _print(title: str, table: Table) -> None:
    console = _console()
    with console.capture() as captured:
        console.print(Text(visible(title), style="italic"), soft_wrap=True)
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def note(text: str) -> None:
    """Print a line for the person to stderr."""
    say(text)


def note_portable(native: bool) -> None:
    """Tell the person when an engine runs without native kernels."""
    if not native:
        note(PORTABLE)


@contextlib.contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress in bytes on stderr; yields what is called with (what, done, total)."""
    with _progress(DownloadColumn(), lambda done, total: f"{amount(done)} of {amount(total)}") as progress:
        yield progress


@contextlib.contextmanager
def build_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress in percent on stderr; yields what is called with (what, done, total)."""
    with _progress(TaskProgressColumn(), lambda done, total: f"{done / max(total, 1):.0%}") as progress:
        yield progress


@contextlib.contextmanager
def token_progress(what: str = "reading the prompt") -> Iterator[Callable[[int, int], None]]:
    """Show progress in tokens on stderr; yields what is called with (tokens done, tokens in all)."""

    def words(done: int, total: int) -> str:
        return f"{done:,} of {total:,} tokens"

    with _progress(MofNCompleteColumn(), words, transient=True) as progress:
        yield lambda done, total: progress(what, done, total)


@contextlib.contextmanager
def step_progress() -> Iterator[Callable[[str, int, int, Mapping[str, float]], None]]:
    """Show progress in steps on stderr; yields what is called with (what, done, total, values to show)."""
    with _progress(MofNCompleteColumn(), lambda done, total: f"{done:,} of {total:,}") as progress:

        def show(what: str, done: int, total: int, values: Mapping[str, float]) -> None:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
            progress(f"{what} ({shown})" if shown else what, done, total)

        yield show


@contextlib.contextmanager
def _progress(
    counter: ProgressColumn, words: Callable[[int, int], str], *, transient: bool = False
) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, removed at the end if `transient`; elsewhere a line every INTERVAL seconds."""
    console = _console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=transient) as bar:
            task = bar.add_task("", total=None, visible=False)
            yield lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total, visible=True
            )
        return
    said = time.monotonic()

    def say(what: str, done: int, total: int) -> None:
        nonlocal said
        if (now := time.monotonic()) - said >= INTERVAL:
            said = now
            note(f"{what}: {words(done, total)}")

    yield say
