"""What the commands share: tables, progress bars, JSON, sizes in words. Reports go to stdout, the rest to stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
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

from trimkv_export.errors import OptionError

__all__ = [
    "build_progress",
    "byte_progress",
    "check_fps",
    "json_option",
    "note",
    "print_columns",
    "print_json",
    "print_table",
    "prompt_options",
    "provider_option",
    "read_prompt",
    "token_progress",
]

provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where the model runs; tensorrt: by the package's engine.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON report instead of text.")


def print_json(report: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(report, indent=2, ensure_ascii=False))


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Names and values."""
    table = Table(title=escape(title), show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    Console(soft_wrap=not Console().is_terminal).print(table)


def print_columns(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells under the names of their columns; all but the first column are numbers."""
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if index else "left", style=None if index else "bold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(soft_wrap=not Console().is_terminal).print(table)


def note(text: str) -> None:
    """A line for the person, on stderr."""
    click.echo(text, err=True)


@contextlib.contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar in bytes on stderr, for (what, done, total)."""
    with _named(DownloadColumn()) as progress:
        yield progress


@contextlib.contextmanager
def build_progress() -> Iterator[Callable[[str, int, int], None]]:
    """As `byte_progress`, in percent."""
    with _named(TaskProgressColumn()) as progress:
        yield progress


@contextlib.contextmanager
def _named(counter: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    with _bar(counter) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total, visible=True)


@contextlib.contextmanager
def token_progress(what: str = "reading the prompt") -> Iterator[Callable[[int, int], None]]:
    """A progress bar in tokens on stderr, called with (tokens done, tokens in all); removed at the end."""
    with _bar(MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(counter: ProgressColumn, *, transient: bool = False) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        counter,
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


def prompt_options(function: Callable[..., None]) -> Callable[..., None]:
    """--prompt, --prompt-file, --chat, --image, --video and --fps."""
    path = click.Path(path_type=Path)
    fps = "Frames per second of the --video, where it does not say (a folder of frames) or says it wrong."
    function = click.option("--fps", type=float, help=fps)(function)
    function = click.option("--video", "videos", type=path, multiple=True, help="A video file or a folder of frames.")(
        function
    )
    function = click.option("--image", "images", type=path, multiple=True, help="A picture; repeat it for more.")(
        function
    )
    chat = "Put the prompt into the model's chat template, as the user's message."
    file = click.Path(path_type=Path, allow_dash=True)
    function = click.option("--chat", is_flag=True, help=chat)(function)
    function = click.option("--prompt-file", type=file, help="Read the prompt from a file; - is stdin.")(function)
    return click.option("--prompt", help="The prompt. Default: stdin.")(function)


def check_fps(fps: float | None, videos: Sequence[Path]) -> None:
    """Raise OptionError for --fps without --video."""
    if fps is not None and not videos:
        raise OptionError(f"--fps {fps:g} goes with --video")


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt of --prompt, --prompt-file or stdin. Raises OptionError."""
    if prompt is not None and prompt_file is not None:
        raise OptionError("give --prompt or --prompt-file, not both")
    if prompt is None and prompt_file is None and sys.stdin.isatty():
        raise OptionError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe a text in")
    if prompt is None:
        try:
            if prompt_file is None or str(prompt_file) == "-":
                raw = sys.stdin.buffer.read()
            else:
                raw = prompt_file.read_bytes()
            prompt = raw.decode()
        except OSError as error:
            raise OptionError(f"--prompt-file {prompt_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise OptionError(
                f"the prompt is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}"
            ) from None
    if not prompt:
        raise OptionError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python passes the bytes of an argument that is not UTF-8 as surrogates
        raise OptionError(f"the prompt is not UTF-8 text, at character {error.start}") from None
    return prompt
