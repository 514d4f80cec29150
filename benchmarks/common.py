"""What the benchmarks share: the machine in words, children that are measured, and tables with limits."""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

__all__ = [
    "GB",
    "MB",
    "ROOT",
    "Check",
    "ChildRun",
    "add_checkpoint_options",
    "build_command",
    "describe_machine",
    "header",
    "make_checkpoint",
    "median_seconds",
    "peak_resident_bytes",
    "peer_build_command",
    "peer_python",
    "print_checks",
    "read_rate",
    "reset_peak",
    "resident_bytes",
    "run_child",
    "table",
    "work_folder",
    "write_json",
]

ROOT = Path(__file__).resolve().parent.parent
MB, GB = 10**6, 10**9

# The peer's builder imports torch; naming it first keeps pip from choosing a CUDA build of another version.
PEER_PACKAGES = (("torch==2.13.0",), ("onnxruntime-genai==0.18.0", "onnx", "onnx_ir", "transformers"))


@dataclass(frozen=True)
class ChildRun:
    """A finished child process.

    Attributes:
        wall_s: seconds that it took.
        peak_rss_bytes: the kernel's ru_maxrss of it, shared file pages included.
        other_cpu_s: what all else on the machine computed meanwhile; where it is not small, the wall time says little.
        output: its stdout.
    """

    wall_s: float
    peak_rss_bytes: int
    other_cpu_s: float
    output: str


@dataclass(frozen=True)
class Check:
    """A measured value against its limit (at most)."""

    what: str
    value: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the value keeps the limit."""
        return self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "passed": self.passed}


def run_child(command: Sequence[str | Path], log: Path, *, cwd: Path | None = None) -> ChildRun:
    """Run a command and measure it; stdout goes to `log`.out, stderr to `log`.err.

    The caller should be a small process: what it holds when it forks counts in the child's ru_maxrss.

    Raises:
        SystemExit: it fails; with the end of its stderr.
    """
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    with out.open("wb") as out_file, err.open("wb") as err_file:
        start, busy = time.perf_counter(), _busy_seconds()
        child = subprocess.Popen([str(part) for part in command], stdout=out_file, stderr=err_file, cwd=cwd)
        # wait4 and not Popen.wait: it gives the resources of exactly this child.
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        other = _busy_seconds() - busy - usage.ru_utime - usage.ru_stime
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = err.read_text(errors="replace")[-2000:]
        sys.exit(f"failed with status {child.returncode}: {' '.join(str(part) for part in command)}\n{tail}")
    return ChildRun(wall, usage.ru_maxrss * 1024, max(other, 0.0), out.read_text(errors="replace"))


def _busy_seconds() -> float:
    """CPU seconds of the whole machine that were not idle or waiting for a disk; interrupts left out."""
    user, nice, system = (int(part) for part in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def build_command(
    checkpoint: Path,
    output: Path,
    *,
    budget: int,
    precision: str,
    weights: str = "copy",
    max_image_tokens: int | None = None,
) -> list[str]:
    """The command that builds a package from `checkpoint`/base and `checkpoint`/gates; it prints its report as JSON."""
    options = {
        "--model": checkpoint / "base",
        "--gates": checkpoint / "gates",
        "--output": output,
        "--budget": budget,
        "--precision": precision,
        "--weights": weights,
        **({"--max-image-tokens": max_image_tokens} if max_image_tokens else {}),
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "trimkv_export", "build", "--json", *words]


def peer_build_command(peer: Path, checkpoint: Path, output: Path, *, precision: str, cache: Path) -> list[str | Path]:
    """The command by which onnxruntime-genai builds the same backbone, with the Python that `peer_python` gives."""
    options: dict[str, str | Path] = {
        "-m": checkpoint / "base",
        "-o": output,
        "-p": precision,
        "-e": "cpu",
        "-c": cache,
    }
    words = [word for option in options.items() for word in option]
    return [peer, "-m", "onnxruntime_genai.models.builder", *words]


@contextlib.contextmanager
def work_folder(prefix: str, options: argparse.Namespace) -> Iterator[Path]:
    """A folder below --work (else a temporary one), which goes at the end unless --keep is there."""
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=options.work))
    try:
        yield work
    finally:
        if options.keep:
            print(f"kept {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)


def add_checkpoint_options(parser: argparse.ArgumentParser, shapes: Sequence[str], default: str) -> None:
    """The options of `work_folder` and `make_checkpoint`, and --json."""
    parser.add_argument("--shapes", choices=shapes, default=default, help="the model whose shapes to take")
    parser.add_argument("--gate", choices=("rg10", "rg"), default="rg10", help="kind of retention gate")
    parser.add_argument("--budget", type=int, default=256, help="default 256")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to work; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep what was made there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")


def make_checkpoint(work: Path, options: argparse.Namespace) -> Path:
    """Write a random checkpoint in a process of its own: this one stays small (see `run_child`)."""
    maker, checkpoint = Path(__file__).with_name("random_checkpoint.py"), work / "checkpoint"
    run_child([sys.executable, maker, checkpoint, "--shapes", options.shapes, "--gate", options.gate], work / "log")
    return checkpoint


def median_seconds(work: Callable[[], object], repeat: int) -> float:
    """Of `repeat` calls, after two that do not count."""
    times = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def read_rate(nbytes: int, repeat: int) -> float:
    """GB/s of reading so many bytes from start to end, a part on each core, by BLAS's dot product."""
    import numpy as np

    data = np.ones(nbytes // 4, np.float32)
    parts = np.array_split(data, os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:
        # np.dot lets go of the interpreter lock; BLAS itself does not split a dot product.
        return data.nbytes / median_seconds(lambda: list(pool.map(np.dot, parts, parts)), repeat) / GB


def resident_bytes() -> int:
    """This process's resident memory. From smaps_rollup: statm is kept per CPU and off by up to some hundred KB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no Rss line")


def reset_peak() -> None:
    """Let `peak_resident_bytes` start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """The most resident memory that this process had since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")


def describe_machine() -> dict[str, Any]:
    """CPU model, cores, RAM and software, for the head of a table."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ram_gb": round(memory / GB, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def header(machine: Mapping[str, Any]) -> str:
    """Date, machine and command in two lines."""
    command = " ".join(["python", *(os.path.relpath(arg, ROOT) if arg == sys.argv[0] else arg for arg in sys.argv)])
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['ram_gb']} GB RAM; {machine['system']}, Python {machine['python']}\n`{command}`\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def print_checks(checks: Sequence[Check]) -> bool:
    """Print one line per limit and say whether all are kept."""
    rows = [
        [
            check.what,
            f"{check.value:.2f} {check.unit}",
            f"{check.limit:g} {check.unit}",
            "pass" if check.passed else "FAIL",
        ]
        for check in checks
    ]
    print(table(("limit on", "measured", "at most", "result"), rows))
    return all(check.passed for check in checks)


def peer_python(work: Path) -> Path:
    """Python of a virtual environment of its own with onnxruntime-genai and what its builder needs.

    Made below `work` on first use (about 2 GB with torch's CPU build; a minute or more).
    """
    folder = work / "genai-venv"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {', '.join(PEER_PACKAGES[1])} into {folder} …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in PEER_PACKAGES:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write `--json FILE`, if asked for."""
    if path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
