"""`trimkv-export verify`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from trimkv_export.cli.console import byte_progress, json_option, print_json, print_table, read_prompt
from trimkv_export.config import Precision
from trimkv_export.errors import MissingDependencyError, OptionError, VerificationError
from trimkv_export.package import DECODER, VISION, Package

if TYPE_CHECKING:
    from trimkv_export.runtime import Engine

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export verify PACKAGE
  trimkv-export verify PACKAGE --case tests/golden/rg10_default
  trimkv-export verify PACKAGE --backend tensorrt
  trimkv-export verify PACKAGE-int4 --against PACKAGE-fp32 --text article.txt
"""
# Tokens of a comparison: at random where there is no text, and that follow.
RANDOM_TOKENS, NEW_TOKENS = 512, 64
# What is the largest over the kinds of kernels in the report; the rest does not differ.
WORST = {"kept_mismatches", "max_logit_difference", "max_visual_difference"}


@click.command("verify", epilog=EPILOG)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--case", type=click.Path(path_type=Path), help="Replay a case recorded from the official code.")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="What is checked; tensorrt is compared with ONNX Runtime, through Polygraphy.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Also say how far logits, tokens and kept entries are from those of this package, of another precision.",
)
@click.option("--text", type=click.Path(path_type=Path), help="What --against compares on. Default: random tokens.")
@json_option
def command(
    package: Path, case: Path | None, backend: str, against: Path | None, text: Path | None, as_json: bool
) -> None:
    """Check PACKAGE: every file's sha256, the graphs, then logits and kept entries.

    Without --case the engine is compared with a plain NumPy model and eviction policy on random tokens, and pictures if
    the model sees; with --case, with what the official code computed and kept at every step.
    """
    if case is not None and backend == "tensorrt":
        raise OptionError(f"--case {case} is replayed by ONNX Runtime; leave out --backend tensorrt")
    if text is not None and against is None:
        raise OptionError(f"--text {text} goes with --against")
    opened = Package.open(package)
    total, done = sum(size for _, size in opened.large_files()), 0
    with byte_progress() as progress:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("sha256", done, total)

        opened.verify_large_files(advance)
    try:
        from trimkv_export.backends.native import find_library
        from trimkv_export.graph.check import check_graph_file
        from trimkv_export.runtime import Engine
        from trimkv_export.verify import check_engine, compare_backends, compare_engines, replay_case
    except ImportError as error:
        raise MissingDependencyError(
            f"verifying needs the package {error.name!r}; install it with: pip install 'trimkv-export[export,runtime]'"
        ) from None
    sees = opened.config.vision is not None
    for graph in (DECODER, VISION) if sees else (DECODER,):
        check_graph_file(package / graph)
    report: dict[str, Any] = {"package": str(package), "files": len(opened.config.files), "graph": "valid"}
    checks: dict[str, dict[str, Any]] = {}
    if backend == "tensorrt":
        checks["tensorrt"] = compare_backends(package).as_dict()
        report |= {"compared_with": "ONNX Runtime, by Polygraphy"} | checks["tensorrt"]
    elif opened.config.precision is Precision.BF16:
        report |= {"engine": "not run: ONNX Runtime's CPU provider has no bfloat16", "passed": True}
    else:
        modes = {"portable": "off"} | ({"native": "require"} if find_library() else {})
        # The portable bodies are part of the package; the native kernels that would run here are checked beside them.
        for kernels, native in modes.items():
            with Engine.open(package, native=native) as engine:
                checks[kernels] = (replay_case(engine, case) if case else check_engine(engine)).as_dict()
        numpy_model = "NumPy decoder, vision tower and policy" if sees else "NumPy decoder and policy"
        report["compared_with"] = f"case {case}" if case else numpy_model
        report |= checks["portable"]
        for worst in WORST & report.keys():
            report[worst] = max(check[worst] for check in checks.values())
        report |= {"passed": all(check["passed"] for check in checks.values()), "kernels": checks}
    if against is not None:
        with Engine.open(package, vision=False) as engine, Engine.open(against, vision=False) as other:
            tokens = _tokens(engine, text)
            report["against"] = {
                "package": str(against),
                **compare_engines(engine, other, tokens, NEW_TOKENS).as_dict(),
            }
    if as_json:
        print_json(report)
    else:
        print_table(str(package), _rows(report | {"kernels": ", ".join(checks)}))
        if against is not None:
            print_table(f"against {against}", _rows(report["against"]))
    for kernels, check in checks.items():
        if not check["passed"]:
            raise VerificationError(f"{package}: with {kernels} kernels, {_summary(check)}")


def _tokens(engine: "Engine", text: Path | None) -> Sequence[int]:
    """Those of a text file, or some at random."""
    if text is not None:
        return engine.tokenizer.encode(read_prompt(None, text))
    random = np.random.default_rng(0)
    drawn = random.integers(0, engine.config.model.vocab_size, RANDOM_TOKENS)
    tokens: list[int] = drawn[~np.isin(drawn, engine.config.placeholder_ids)].tolist()
    return tokens


def _rows(report: dict[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): _text(value) for name, value in report.items() if not isinstance(value, dict)}


def _summary(check: dict[str, Any]) -> str:
    parts = [
        f"{check['kept_mismatches']} of {check['steps']} steps keep other entries",
        f"logits differ by {check['max_logit_difference']:.2g}",
    ]
    if check.get("pictures"):
        parts.append(f"the vision tower by {check['max_visual_difference']:.2g} on {check['pictures']} pictures")
    return f"{', '.join(parts)} (tolerance {check['tolerance']:g})"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
