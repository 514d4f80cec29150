"""`trimkv-export verify`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from trimkv_export.cli.console import byte_progress, json_option, note, print_json, print_table, trust_option
from trimkv_export.cli.usage import FILE
from trimkv_export.errors import OptionError, missing
from trimkv_export.files import read_text

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export verify PACKAGE
  trimkv-export verify PACKAGE --case tests/golden/rg10_default
  trimkv-export verify PACKAGE --backend tensorrt
  trimkv-export verify PACKAGE-int4 --against PACKAGE-fp32 --text article.txt
"""


@click.command("verify", epilog=EPILOG)
@click.argument("package", type=FILE)
@click.option(
    "--case",
    type=FILE,
    help="Replay a case recorded from the official code: a folder with case.json and trace.npz.",
)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="Check what this backend computes; tensorrt is compared with ONNX Runtime, by Polygraphy.",
)
@click.option(
    "--against",
    type=FILE,
    help="Also report how far logits, tokens and kept entries are from those of this package of the same model.",
)
@click.option(
    "--text",
    type=FILE,
    help="Compare --against on the text of this file. Default: on random tokens.",
)
@trust_option
@json_option
def command(package: Path, against: Path | None, text: Path | None, as_json: bool, **options: Any) -> None:
    """Check PACKAGE: the sha256 of every file, the graphs, then logits and kept entries.

    Without --case, the engine is compared with a plain NumPy model and eviction policy on random tokens, and on random
    pictures if the model has a vision tower; with --case, with what the official code computed and kept at every step.
    """
    if text is not None and against is None:
        raise OptionError(f"--text {text} goes with --against")
    compared_on = None if text is None else read_text(text, "--text")
    try:
        from trimkv_export.verify import check_package
    except ImportError as error:
        raise missing("verifying", str(error.name), "export,runtime") from None
    with byte_progress() as progress:
        found = check_package(package, against=against, text=compared_on, **options, progress=progress)
    report = found.as_dict()
    if as_json:
        print_json(report)
    else:
        for lacking in found.notes:
            note(f"note: {lacking}")
        print_table(str(package), _rows(report | {"kernels": ", ".join(found.checks)}))
        if against is not None:
            print_table(f"against {against}", _rows(report["against"]))
    found.require()


def _rows(report: Mapping[str, Any]) -> dict[str, str]:
    shown = {name: value for name, value in report.items() if not isinstance(value, Mapping | list)}
    return {name.replace("_", " "): _text(value) for name, value in shown.items()}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
