"""`trimkv-export doctor`."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from trimkv_export import __version__
from trimkv_export.backends.native import find_library, has_quantized_kernels
from trimkv_export.backends.onnxruntime import import_onnxruntime
from trimkv_export.backends.tensorrt import find_plugin, import_tensorrt
from trimkv_export.backends.threads import thread_limits
from trimkv_export.cli.console import json_option, print_json, print_table
from trimkv_export.config import Target
from trimkv_export.errors import MissingDependencyError
from trimkv_export.plan.host import meminfo
from trimkv_export.words import amount

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export doctor
  trimkv-export doctor --json
"""

DISTRIBUTION = "trimkv-export"
# A requirement of an extra in a package's metadata: name, extras of that, and behind the marker ours.
REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([\w,-]+)\])?.*;.*\bextra == ['"]([^'"]+)""")
NO_QUANTIZED = "ONNX Runtime's kernels; the native one needs the library and a processor with AVX-512 VNNI"
CUDA_DRIVER = Path("/proc/driver/nvidia/version")


@click.command("doctor", epilog=EPILOG)
@json_option
def command(as_json: bool) -> None:
    """Show versions, and what this machine can do: for a first look, and for bug reports."""
    report = _report()
    if as_json:
        print_json(report)
        return
    rows = {
        "trimkv-export": report["trimkv-export"],
        "python": report["python"],
        "platform": report["platform"],
        "cpu": f"{report['cpu']}, {report['cores']} cores",
        "threads": _threads(report),
        "memory": f"{amount(report['memory_available_bytes'])} available of {amount(report['memory_bytes'])}",
        "disk here": f"{amount(report['disk_free_bytes'])} free",
        "nvidia driver": report["nvidia_driver"] or "none",
    }
    for extra, packages in report["extras"].items():
        rows[f"[{extra}]"] = ", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items())
    rows |= {
        "providers": ", ".join(report["onnxruntime_providers"]) or "none",
        "TensorRT": ", ".join(f"{target} {version or 'none'}" for target, version in report["tensorrt"].items()),
        "TensorRT plugin": report["tensorrt_plugin"] or "not built (plugins/tensorrt/README.md in the source tree)",
        "native kernels": report["native_library"] or "not built (make plugins); packages run with portable bodies",
        "int4 and int8": "the native kernel" if report["quantized_kernels"] else NO_QUANTIZED,
        "can build": "yes" if report["can_build"] else "no: pip install 'trimkv-export[export,runtime]'",
        "can run": f"yes, precisions {', '.join(report['runs_precisions'])}"
        if report["can_run"]
        else "no: pip install 'trimkv-export[runtime]'",
    }
    print_table("trimkv-export doctor", rows)


def _report() -> dict[str, Any]:
    extras = {extra: {name: _version(name) for name in names} for extra, names in _extras().items()}
    (total, available), limits = _memory(), thread_limits()
    can_build, can_run = (bool(extras.get(extra)) and all(extras[extra].values()) for extra in ("export", "runtime"))
    return {
        "trimkv-export": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": limits.default,
        "processors": limits.processors,
        "cpu_quota": limits.quota,
        "memory_bytes": total,
        "memory_available_bytes": available,
        "disk_free_bytes": shutil.disk_usage(".").free,
        "nvidia_driver": CUDA_DRIVER.read_text().splitlines()[0] if CUDA_DRIVER.exists() else None,
        "extras": extras,
        "onnxruntime_providers": _providers(),
        "tensorrt": _tensorrt(),
        "tensorrt_plugin": str(library) if (library := find_plugin()) else None,
        "native_library": str(library) if (library := find_library()) else None,
        "quantized_kernels": has_quantized_kernels(library),
        "can_build": can_build,
        "can_run": can_run,
        "runs_precisions": ["fp32", "fp16", "int4", "int8"] if can_run else [],
    }


def _threads(report: dict[str, Any]) -> str:
    """How many threads a step takes by default, and why."""
    quota = "no quota" if report["cpu_quota"] is None else f"a quota of {report['cpu_quota']:g}"
    return f"{report['threads']} by default: {report['processors']} processors may be used, {quota}"


def _extras() -> dict[str, list[str]]:
    """The distributions of each extra, also those of the extras that it includes, as this package's metadata say."""
    own: dict[str, list[str]] = {}
    included: dict[str, list[str]] = {}
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # it runs from a folder, without having been installed
        requirements = []
    for requirement in requirements:
        if match := REQUIREMENT.match(requirement):
            name, others, extra = match.groups()
            own.setdefault(extra, [])
            if name == DISTRIBUTION:
                included.setdefault(extra, []).extend(others.split(","))
            else:
                own[extra].append(name)

    def all_of(extra: str) -> dict[str, None]:
        names = dict.fromkeys(name for other in included.get(extra, []) for name in all_of(other))
        return names | dict.fromkeys(own[extra])

    return {extra: list(all_of(extra)) for extra in own}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tensorrt() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for target in (Target.TENSORRT, Target.TENSORRT_RTX):
        try:
            versions[str(target)] = str(import_tensorrt(target).__version__)
        except MissingDependencyError:
            versions[str(target)] = None
    return versions


def _providers() -> list[str]:
    try:
        return [str(name) for name in import_onnxruntime().get_available_providers()]
    except MissingDependencyError:
        return []


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> tuple[int, int]:
    """Total and available bytes; zeros where /proc does not say."""
    try:
        fields = meminfo()
        return fields["MemTotal"], fields["MemAvailable"]
    except (OSError, KeyError):
        return 0, 0
