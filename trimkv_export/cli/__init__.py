"""The command line. A command's module is imported when the command is used; each defines `command`."""

import importlib
import io
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from trimkv_export import __version__
from trimkv_export.backends import process_memory  # noqa: F401 (early: it looks at the process before libraries are loaded)
from trimkv_export.cli.streams import ReaderGone, output_errors, say, standard_streams
from trimkv_export.cli.usage import Context, usage_message
from trimkv_export.errors import OptionError, TrimKVError
from trimkv_export.words import did_you_mean, first_line, shorten

__all__ = ["main"]

COMMANDS = {
    "build": "Build a package from a checkpoint with retention gates.",
    "plan": "Plan the memory of a model, and what fits a device, from its config.json.",
    "run": "Generate text with a package.",
    "bench": "Measure the speed and the memory of a package.",
    "inspect": "Show what is in a package, or what its cache keeps of a text.",
    "triton": "Write a model repository for Triton Inference Server.",
    "verify": "Check a package: files, graph, logits and kept entries.",
    "eval": "Measure the quality of a package against budget and policy.",
    "train": "Train retention gates for a model that has none.",
    "doctor": "Show versions and what this machine can do.",
}
INTERRUPTED, READER_GONE, TERMINATED = 130, 141, 143

EPILOG = """\b
Exit codes:
  0  done                      7  writing failed (disk full, target exists)
  1  anything else             8  this machine cannot run the package
  2  bad option                9  verify found a difference
  3  bad checkpoint           10  a Python package is missing
  4  download failed          11  the model does not fit the device
  5  model not supported     130  interrupted (Ctrl-C)
  6  damaged package,        141  the reader of stdout went away (| head)
     or another version      143  terminated (SIGTERM)

\b
Example:
  trimkv-export build --model qwen3-4b --budget 256
  trimkv-export run qwen3-4b-m256 --chat --prompt "Why is the sky blue?"
"""


class _Commands(click.Group):
    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        command.context_class = Context
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            hint = did_you_mean(args[0], COMMANDS) or f"The commands are {', '.join(COMMANDS)}"
            raise OptionError(f"there is no command {shorten(args[0])}; {hint}")
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with output_errors():  # here --help and --version print
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> object:
        with output_errors():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=_Commands,
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="trimkv-export")
@click.pass_context
def _cli(ctx: click.Context) -> None:
    """Deploy LLMs with learned KV-cache eviction: one fixed cache, any context length."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class _Terminated(BaseException):
    """SIGTERM came. As with Ctrl-C, whatever is half written is removed on its way."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; errors of the user end with one message and a documented exit code."""

    def terminate(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once: a second one would stop the cleaning up
        raise _Terminated

    # Where somebody else has a use for the signal, it is theirs.
    ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        with standard_streams():
            _run(arguments)
    except TrimKVError as error:
        _fail(str(error), error.exit_code)
    except click.UsageError as error:
        _fail(usage_message(error), error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        sys.exit(INTERRUPTED)
    except ReaderGone:
        sys.exit(READER_GONE)
    except MemoryError as error:
        _fail(f"there is not enough memory for this: {first_line(error)}", TrimKVError.exit_code)
    except _Terminated:
        say("terminated")
        sys.exit(TERMINATED)
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: Sequence[str] | None) -> None:
    # A terminal of another encoding shows what it can.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    _cli.main(args=None if arguments is None else list(arguments), prog_name="trimkv-export", standalone_mode=False)


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {message}")
    sys.exit(code)
