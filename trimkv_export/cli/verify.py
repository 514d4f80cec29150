"""`trimkv-export verify`."""

from pathlib import Path
from typing import Any

import click

from trimkv_export.cli.console import byte_progress, json_option, print_json, print_table
from trimkv_export.config import Precision
from trimkv_export.engine.package import DECODER, VISION, Package
from trimkv_export.errors import MissingDependencyError, VerificationError

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export verify PACKAGE
  trimkv-export verify PACKAGE --case tests/golden/rg10_default
"""
# What is the largest over the kinds of kernels in the report; the rest does not differ.
WORST = {"kept_mismatches", "max_logit_difference", "max_visual_difference"}


@click.command("verify", epilog=EPILOG)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--case", type=click.Path(path_type=Path), help="Replay a case recorded from the official code.")
@json_option
def command(package: Path, case: Path | None, as_json: bool) -> None:
    """Check PACKAGE: every file's sha256, the graphs, then logits and kept entries.

    Without --case the engine is compared with a plain NumPy model and eviction policy on random tokens, and pictures if
    the model sees; with --case, with what the official code computed and kept at every step.
    """
    opened = Package.open(package)
    total, done = sum(size for _, size in opened.large_files()), 0
    with byte_progress() as progress:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("sha256", done, total)

        opened.verify_large_files(advance)
    try:
        import onnx
        from google.protobuf.message import DecodeError

        from trimkv_export.graph.check import check_graph
        from trimkv_export.runtime import Engine
        from trimkv_export.runtime.native import find_library
        from trimkv_export.verify import check_engine, replay_case
    except ImportError as error:
        raise MissingDependencyError(
            f"verifying needs the package {error.name!r}; install it with: pip install 'trimkv-export[export,runtime]'"
        ) from None
    sees = opened.config.vision is not None
    for graph in (DECODER, VISION) if sees else (DECODER,):
        try:
            check_graph(onnx.load(str(package / graph), load_external_data=False))
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError) as error:
            raise VerificationError(f"{package}: {graph} is not a valid graph: {error}") from None
    report: dict[str, Any] = {"package": str(package), "files": len(opened.config.files), "graph": "valid"}
    checks: dict[str, dict[str, Any]] = {}
    if opened.config.precision is Precision.BF16:
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
    if as_json:
        print_json(report)
    else:
        rows = report | {"kernels": ", ".join(checks)}
        print_table(str(package), {name.replace("_", " "): _text(value) for name, value in rows.items()})
    for kernels, check in checks.items():
        if not check["passed"]:
            raise VerificationError(f"{package}: with {kernels} kernels, {_summary(check)}")


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
