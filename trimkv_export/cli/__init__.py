"""The command line. A command's module is imported when the command is used; each defines `command`."""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from trimkv_export import __version__
from trimkv_export.backends import process_memory  # noqa: F401 (early: it looks at the process before libraries are loaded)
from trimkv_export.errors import TrimKVError

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
    "doctor": "Show versions and what this machine can do.",
}
INTERRUPTED = 130

EPILOG = """\b
Exit codes:
  0  done                      6  package damaged or of another version
  2  bad option                7  writing failed (disk full, target exists)
  3  bad checkpoint            8  this machine cannot run the package
  4  download failed           9  verify found a difference
  5  model not supported      10  a Python package is missing
  1  anything else           130  interrupted

\b
Example:
  trimkv-export build --model qwen3-4b --budget 256
  trimkv-export run qwen3-4b-m256 --chat --prompt "Why is the sky blue?"
"""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader went away (`| head`); what is still buffered must not raise again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trimkv-export")
def _cli() -> None:
    """Deploy LLMs with learned KV-cache eviction: one fixed cache, any context length."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; errors of the user end with one message and a documented exit code."""
    try:
        _cli.main(args=None if arguments is None else list(arguments), prog_name="trimkv-export", standalone_mode=False)
    except TrimKVError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
