"""Compare what a run really took with the plan in its package."""

from typing import Any

from trimkv_export.backends import process_memory
from trimkv_export.backends.process_memory import status_bytes
from trimkv_export.errors import OptionError, PackageError, VerificationError
from trimkv_export.files import read_json_object
from trimkv_export.package import PLAN, Package
from trimkv_export.words import amount, shorten

__all__ = ["compare", "describe", "planned", "require", "stored_plan"]

# Part of the plan are round figures of a runtime that is not ours: a run may take more by this share.
TOLERANCE = 0.05
MOST = 1 << 62  # bytes
PARTS = ("weight_bytes", "cache_bytes", "activation_bytes", "vision_bytes", "io_bytes", "reserve_bytes")


def planned(package: Package, provider: str, rows: int = 1) -> dict[str, Any]:
    """Return the plan of a run, as `build` wrote it: on the CPU, or on the device that was named.

    Args:
        package: the package.
        provider: where the run is.
        rows: sequences of the run.

    Raises:
        PackageError: the package has no such plan.
        OptionError: the plan is for another number of sequences.
    """
    plan = stored_plan(package, "plan" if provider == "cpu" else "device_plan")
    if provider == "cpu" and plan is None:
        raise PackageError(f"{package.path / PLAN}: has no plan of a run; build the package again")
    if plan is None or plan.get("device") == "cpu":
        raise PackageError(
            f"{package.path / PLAN}: has no plan for a GPU, so there is nothing to compare with; build the package "
            "with --device NAME (trimkv-export plan --list-devices)"
        )
    if plan["batch"] != rows:
        raise OptionError(
            f"the plan in {package.path} is for a batch of {plan['batch']}, this run's is {rows}; compare with a run "
            f"of {plan['batch']}" + ("" if provider == "cpu" else f", or build with --max-batch {rows}")
        )
    return plan


def stored_plan(package: Package, name: str) -> dict[str, Any] | None:
    """A plan in a package's memory_plan.json.

    Args:
        package: the package.
        name: "plan", of a run on the CPU, or "device_plan".

    Returns:
        The plan; None where the package was built without one.

    Raises:
        PackageError: the file is not what `build` writes.
    """
    stored = read_json_object(package.file(PLAN), PackageError, "build the package again")
    plan = stored.get(name)
    if plan is None:
        return None
    found = [plan.get(each) for each in (*PARTS, "batch")] if isinstance(plan, dict) else [None]
    if not all(type(each) is int and 0 <= each <= MOST for each in found) or not any(found[:-1]):
        raise PackageError(f"{package.path / PLAN}: {name} is not a plan, but {shorten(plan)}; build the package again")
    return dict(plan)


def compare(plan: dict[str, Any], cache_bytes: int, *, vision: bool, provider: str = "cpu") -> dict[str, Any]:
    """Compare planned bytes with what this process took at most: resident memory, or with a GPU the memory of that.

    Args:
        plan: from `planned`.
        cache_bytes: of the slab that was allocated.
        vision: whether the run had the vision tower; without it, its part of the plan is left out.
        provider: where the run was.

    Returns:
        Bytes that were planned and measured, in all and of the cache, and the parts of the plan.

    Raises:
        EngineError: the GPU's driver does not say what this process takes.
    """
    parts = {name: plan[name] for name in PARTS if vision or name != "vision_bytes"}
    total = sum(parts.values())
    if provider == "cpu":
        measured = status_bytes("VmHWM") - process_memory.AT_START
        split = {
            "private_bytes": process_memory.status_bytes("RssAnon"),
            "file_bytes": process_memory.status_bytes("RssFile"),
        }
    else:
        measured, split = process_memory.gpu_bytes(), {}
    return {
        "planned_bytes": total,
        "measured_bytes": measured,
        "measured_share": measured / total,
        **split,
        "planned_cache_bytes": parts["cache_bytes"],
        "cache_bytes": cache_bytes,
        "parts": parts,
    }


def describe(report: dict[str, Any]) -> str:
    """Return the comparison as a line for a person."""
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
