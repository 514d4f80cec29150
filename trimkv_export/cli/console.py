"""What the commands share: tables, progress bars, JSON, sizes in words. Reports go to stdout, the rest to stderr."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
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

from trimkv_export.cli.streams import say
from trimkv_export.cli.usage import FILE
from trimkv_export.errors import OptionError
from trimkv_export.files import decode_text, read_text
from trimkv_export.words import amount, shorten

__all__ = [
    "SAMPLING",
    "budget_option",
    "build_progress",
    "byte_progress",
    "check_chat",
    "check_fps",
    "check_plan_option",
    "context_option",
    "json_option",
    "note",
    "note_portable",
    "print_columns",
    "print_json",
    "print_table",
    "prompt_options",
    "provider_option",
    "read_prompt",
    "step_progress",
    "template_variables",
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
        table.add_row(Text(name), Text(value))
    _print(title, table)


def print_columns(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells under the names of their columns; all but the first column are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if index else "left", style=None if index else "bold")
    for row in rows:
        table.add_row(*map(Text, row))
    _print(title, table)


def _print(title: str, table: Table) -> None:
    console = _console()
    with console.capture() as captured:
        console.print(Text(title, style="italic"), soft_wrap=True)
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


def prompt_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a prompt: its text, its chat, its pictures and videos, and the limit on these."""
    path = FILE
    file = FILE
    options = (
        click.option("--prompt", help="The text of the prompt. Default: what comes on stdin."),
        click.option("--prompt-file", type=file, help="Read the prompt from a file; - is stdin."),
        click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template, as the user."),
        click.option("--system", help="With --chat: begin with this message of the system."),
        click.option(
            "--template-var",
            "template_vars",
            metavar="NAME=VALUE",
            multiple=True,
            help="With --chat: give a variable to the chat template, as JSON or else as text; repeatable.",
        ),
        click.option(
            "--no-thinking",
            is_flag=True,
            help="With --chat: the same as --template-var enable_thinking=false, for models that can think.",
        ),
        click.option(
            "--literal", is_flag=True, help="Take special tokens in the prompt, such as <|im_end|>, as ordinary text."
        ),
        click.option("--image", "images", type=path, multiple=True, help="Show the model a picture; repeatable."),
        click.option(
            "--video",
            "videos",
            type=path,
            multiple=True,
            help="Show the model a video, a file or a folder of frames; repeatable.",
        ),
        click.option(
            "--fps",
            type=float,
            help="Frames per second of the --video: a folder of frames needs it, and a file may state them wrongly.",
        ),
        click.option(
            "--max-image-pixels",
            type=int,
            help="Refuse a picture, or a video's frame, that has more pixels in its file. Default: 67108864.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def template_variables(values: Sequence[str], *, no_thinking: bool) -> dict[str, Any]:
    """The variables of --template-var and --no-thinking.

    Raises:
        OptionError: a value that is not NAME=VALUE, or a name that is given twice.
    """
    found: dict[str, Any] = {"enable_thinking": False} if no_thinking else {}
    for each in values:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"--template-var: must be NAME=VALUE, such as enable_thinking=false, got {shorten(each)}")
        if name in found:
            raise OptionError(f"--template-var: {name} is given twice, the second time as {shorten(value)}")
        try:
            found[name] = json.loads(value)
        except RecursionError:
            raise OptionError(f"--template-var: {name} is nested too deeply") from None
        except ValueError:
            found[name] = value
    return found


def check_chat(chat: bool, system: str | None, variables: Mapping[str, Any]) -> None:
    """Raise OptionError for --system, --template-var or --no-thinking without --chat."""
    for option, value in (("--system", system), ("--template-var or --no-thinking", variables or None)):
        if value is not None and not chat:
            raise OptionError(f"{option} goes with --chat")


def check_fps(fps: float | None, videos: Sequence[Path]) -> None:
    """Raise OptionError for --fps without --video."""
    if fps is not None and not videos:
        raise OptionError(f"--fps {fps:g} goes with --video")


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the prompt of --prompt, --prompt-file or stdin.

    A byte-order mark is left out. So is one newline at the end of stdin, which is how `echo` and a typed line end; a
    file is taken as it is.

    Raises:
        OptionError: there is none, or it is not UTF-8; the message names the option.
    """
    if prompt is not None and prompt_file is not None:
        raise OptionError("give --prompt or --prompt-file, not both")
    if prompt is not None:
        what, text = "--prompt", prompt
    elif prompt_file is not None and str(prompt_file) != "-":
        what = f"--prompt-file {prompt_file}"
        text = read_text(prompt_file, "--prompt-file")
    elif prompt_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise OptionError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe a text in")
    else:
        what, text = "stdin", _read_stdin()
    if not text:
        raise OptionError(f"{what}: the prompt is empty")
    return text


def _read_stdin() -> str:
    if sys.stdin is None:
        raise OptionError("stdin is closed: give --prompt TEXT, or a file to --prompt-file")
    try:
        content = sys.stdin.buffer.read()
    except (OSError, ValueError) as fault:  # a folder, or a descriptor that is open for writing alone
        raise OptionError(f"stdin: cannot be read: {getattr(fault, 'strerror', None) or fault}") from None
    return re.sub(r"\r?\n\Z", "", decode_text(content, "stdin"))
