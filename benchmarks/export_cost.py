"""What an export costs: wall time, peak memory and disk, against `cp -r` of the checkpoint and a peer's builder.

    python benchmarks/export_cost.py [--shapes qwen3-4b] [--work DIR] [--peers]

Makes a random checkpoint of those shapes and runs each case in a process of its own, in rounds. Before the first round
the checkpoint is dropped from the page cache ("cold"); later rounds find what the round before left there ("warm").
Outputs are deleted after each case, everything at the end. Disk: up to three times the checkpoint, 27 GB for 4B shapes.

Limits: peak memory at most 1 GB; with linked weights at most 15 s and 200 MB beyond the checkpoint; with copied weights
at most 1.5 times what `cp -r` took in the same round; every size that a package states is right (package_figures.py).
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import (
    GB,
    MB,
    Check,
    add_checkpoint_options,
    build_command,
    describe_machine,
    header,
    make_checkpoint,
    peer_build_command,
    peer_python,
    print_checks,
    run_child,
    table,
    work_folder,
    write_json,
)

SHAPES = ("qwen3-0.6b", "qwen3-4b", "qwen3-vl-4b")
MAX_PEAK_GB = 1.0
MAX_LINK_S = 15.0
MAX_LINK_MB = 200.0
MAX_COPY_RATIO = 1.5
REFERENCE, LINK, COPY = "cp -r", "trimkv-export bf16 link", "trimkv-export bf16 copy"


@dataclass(frozen=True)
class Case:
    """A command that writes `output`."""

    name: str
    command: Sequence[str | Path]
    ours: bool = False


@dataclass(frozen=True)
class Result:
    """One run of a case. `disk_bytes` are what the output takes beyond the checkpoint; `figures`: of our packages."""

    case: str
    round: int
    wall_s: float
    peak_rss_bytes: int
    disk_bytes: int
    other_cpu_s: float
    figures: Sequence[Mapping[str, Any]]


def cases(work: Path, *, budget: int, peer: Path | None) -> list[Case]:
    """The reference, our builds and, with a Python that has it as `peer`, onnxruntime-genai's."""
    checkpoint, output = work / "checkpoint", work / "output"

    def ours(precision: str, weights: str) -> Sequence[str]:
        return build_command(checkpoint, output, budget=budget, precision=precision, weights=weights)

    out = [
        Case(REFERENCE, ["cp", "-r", checkpoint, output]),
        Case(LINK, ours("bf16", "link"), ours=True),
        Case(COPY, ours("bf16", "copy"), ours=True),
        Case("trimkv-export fp32", ours("fp32", "copy"), ours=True),
    ]
    if peer:
        for precision in ("fp32", "int4"):
            command = peer_build_command(peer, checkpoint, output, precision=precision, cache=work / "cache")
            out.append(Case(f"onnxruntime-genai 0.18 {precision}", command))
    return out


def files(folder: Path) -> Iterator[Path]:
    """All regular files below `folder`."""
    return (path for path in folder.rglob("*") if path.is_file())


def disk_beyond(output: Path, checkpoint: Path) -> int:
    """Bytes of `output` that are not hard links to files of `checkpoint`."""
    shared = {(info.st_dev, info.st_ino) for info in (path.stat() for path in files(checkpoint))}
    infos = {(info.st_dev, info.st_ino): info for info in (path.stat() for path in files(output))}
    return sum(info.st_size for key, info in infos.items() if key not in shared)


def drop_from_page_cache(folder: Path) -> None:
    """Forget the content of files, so that the next reader goes to the disk. Needs no rights."""
    os.sync()
    for path in files(folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def run_rounds(work: Path, plan: Sequence[Case], rounds: int) -> list[Result]:
    """Run every case once per round."""
    checkpoint, output = work / "checkpoint", work / "output"
    results = []
    for number in range(rounds):
        for case in plan:
            shutil.rmtree(work / "cache", ignore_errors=True)
            if number == 0:
                drop_from_page_cache(checkpoint)
            os.sync()  # what the case before left to be written is not this one's cost
            run = run_child(case.command, work / "log")
            disk = disk_beyond(output, checkpoint)
            figures = stated_figures(work) if case.ours else ()
            result = Result(case.name, number, run.wall_s, run.peak_rss_bytes, disk, run.other_cpu_s, figures)
            shutil.rmtree(output)
            results.append(result)
            print(
                f"round {number}: {case.name}: {run.wall_s:.1f} s, peak {run.peak_rss_bytes / GB:.2f} GB, "
                f"{result.disk_bytes / MB:,.0f} MB",
                file=sys.stderr,
            )
    return results


def stated_figures(work: Path) -> list[dict[str, Any]]:
    """The sizes that the package states against those found, as checks; in a process of its own, which imports onnx."""
    script, found = Path(__file__).with_name("package_figures.py"), work / "figures.json"
    run_child(
        [sys.executable, script, work / "output", "--checkpoint", work / "checkpoint", "--json", found], work / "log"
    )
    checks: list[dict[str, Any]] = json.loads(found.read_text())["checks"]
    return checks


def check(results: Sequence[Result], plan: Sequence[Case]) -> list[Check]:
    """Every limit, for every round."""
    checks = []
    reference = {result.round: result.wall_s for result in results if result.case == REFERENCE}
    ours = {case.name for case in plan if case.ours}
    for result in results:
        if result.case not in ours:
            continue
        label = f"{result.case}, {'warm' if result.round else 'cold'}"
        checks.append(Check(f"{label}: peak memory", result.peak_rss_bytes / GB, MAX_PEAK_GB, "GB"))
        if result.case == LINK:
            checks.append(Check(f"{label}: wall time", result.wall_s, MAX_LINK_S, "s"))
            checks.append(Check(f"{label}: disk", result.disk_bytes / MB, MAX_LINK_MB, "MB"))
        if result.case == COPY:
            ratio = result.wall_s / reference[result.round]
            checks.append(Check(f"{label}: wall time", ratio, MAX_COPY_RATIO, "x cp"))
        wrong = sum(not figure["passed"] for figure in result.figures)
        checks.append(Check(f"{label}: {len(result.figures)} stated sizes", wrong, 0, "wrong"))
    return checks


def figures_report(results: Sequence[Result]) -> str:
    """What the packages state, once for each case, and how far it is off."""
    rows = [
        [result.case, figure["what"], f"{figure['value']:,}", figure["unit"]]
        for result in results
        if not result.round
        for figure in result.figures
    ]
    return table(("package", "stated", "off", ""), rows)


def report(results: Sequence[Result], plan: Sequence[Case]) -> str:
    """One row per case: wall times of the rounds, largest peak, disk."""
    rows = []
    for case in plan:
        own = [result for result in results if result.case == case.name]
        walls = " / ".join(f"{result.wall_s:.1f}" for result in own)
        peak = max(result.peak_rss_bytes for result in own)
        other = " / ".join(f"{result.other_cpu_s:.1f}" for result in own)
        rows.append([case.name, walls, f"{peak / GB:.2f}", f"{own[-1].disk_bytes / MB:,.0f}", other])
    columns = ("export", "wall s, cold / warm", "peak RSS GB", "disk MB beyond the checkpoint", "CPU s of others")
    return table(columns, rows)


def main() -> None:
    """Parse the command line, measure, and exit with 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser, SHAPES, "qwen3-4b")
    parser.add_argument("--rounds", type=int, default=2, help="the first is cold; default 2")
    parser.add_argument("--peers", action="store_true", help="also onnxruntime-genai 0.18's builder (installs it)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.peers and "-vl-" in options.shapes:
        parser.error(f"--peers takes text models only, got {options.shapes}")
    with work_folder("export-cost-", options) as work:
        # The environment is kept where the caller chose a folder: it is slow to make and fits every later run.
        peer = peer_python(options.work or work) if options.peers else None
        nbytes = sum(path.stat().st_size for path in files(make_checkpoint(work, options)))
        plan = cases(work, budget=options.budget, peer=peer)
        results = run_rounds(work, plan, options.rounds)
    machine = describe_machine()
    print(header(machine))
    print(f"Checkpoint: {options.shapes}, {nbytes / GB:.2f} GB with gates ({options.gate}).\n")
    print(report(results, plan), end="\n\n")
    print(figures_report(results), end="\n\n")
    checks = check(results, plan)
    passed = print_checks(checks)
    content = {
        "machine": machine,
        "shapes": options.shapes,
        "checkpoint_bytes": nbytes,
        "runs": [asdict(result) for result in results],
        "checks": [entry.as_dict() for entry in checks],
    }
    write_json(options.json, content)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
