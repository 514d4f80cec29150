"""Compare what a run really took with the plan in its package."""

import json
from typing import Any

from trimkv_export.cli.console import amount
from trimkv_export.cli.resident import AT_START, status_bytes
from trimkv_export.engine.package import PLAN, Package
from trimkv_export.errors import PackageError, VerificationError

__all__ = ["compare", "describe", "require"]

# The plan is in round figures of a runtime that is not ours; by this share reality may be above it.
TOLERANCE = 0.05
PARTS = ("weight_bytes", "cache_bytes", "activation_bytes", "vision_bytes", "io_bytes", "reserve_bytes")


def compare(package: Package, cache_bytes: int, *, vision: bool) -> dict[str, Any]:
    """Planned bytes, and what this process took at most.

    cache_bytes: of the slab that was allocated. vision: whether the run had the vision tower; without it, its part of
    the plan is left out.

    Raises PackageError when the package has no plan of a run.
    """
    try:
        plan: dict[str, Any] = json.loads((package.path / PLAN).read_text(encoding="utf-8"))["plan"]
    except KeyError:
        raise PackageError(f"{package.path / PLAN}: has no plan of a run; build the package again") from None
    parts = {name: plan[name] for name in PARTS if vision or name != "vision_bytes"}
    planned, measured = sum(parts.values()), status_bytes("VmHWM") - AT_START
    return {
        "planned_bytes": planned,
        "measured_bytes": measured,
        "measured_share": measured / planned,
        "private_bytes": status_bytes("RssAnon"),
        "file_bytes": status_bytes("RssFile"),
        "planned_cache_bytes": parts["cache_bytes"],
        "cache_bytes": cache_bytes,
        "parts": parts,
    }


def describe(report: dict[str, Any]) -> str:
    """The comparison in a line for a person."""
    parts = ", ".join(f"{name.removesuffix('_bytes')} {amount(size)}" for name, size in report["parts"].items() if size)
    return (
        f"plan {amount(report['planned_bytes'])} ({parts}); measured {amount(report['measured_bytes'])}, "
        f"{report['measured_share']:.0%} of it; cache {report['cache_bytes']:,} bytes, planned "
        f"{report['planned_cache_bytes']:,}"
    )


def require(report: dict[str, Any]) -> None:
    """Raise VerificationError when reality exceeds the plan."""
    if report["cache_bytes"] != report["planned_cache_bytes"]:
        raise VerificationError(
            f"the cache takes {report['cache_bytes']:,} bytes, planned were {report['planned_cache_bytes']:,}"
        )
    if report["measured_share"] > 1 + TOLERANCE:
        raise VerificationError(
            f"the run took {report['measured_bytes']:,} bytes, {report['measured_share']:.0%} of the plan's "
            f"{report['planned_bytes']:,}"
        )
