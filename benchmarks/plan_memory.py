"""Does a package's memory plan hold? Planned bytes against the peak of a real run, for three sizes of model.

    python benchmarks/plan_memory.py [--sizes demo 100m 600m] [--decode-steps 5000]

Each size is built (fp32, budget 256; the demo 64) and run by `trimkv-export bench` on ONNX Runtime's CPU provider: a
prefill of 2,048 tokens, then single steps. Measured is the process's peak resident memory above what an interpreter has
before it imports anything; planned is `memory_plan.json`. Limit: measured is 85 to 105% of the plan. 6 GB of disk.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    MB,
    ROOT,
    Check,
    build_command,
    describe_machine,
    header,
    print_checks,
    run_child,
    table,
    write_json,
)

LEAST, MOST = 0.85, 1.05
PREFILL = 2048
PARTS = ("weight", "cache", "activation", "vision", "io", "reserve")
DEMO = {"demo": [], "100m": ["--layers=12", "--hidden=768", "--heads=12", "--kv-heads=4", "--head-dim=64",
                             "--intermediate=2560", "--gate-hidden=256"]}  # fmt: skip
RANDOM = {"600m": "qwen3-0.6b"}
# Resident kB of an interpreter that imports nothing.
EMPTY = "print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmRSS')))"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=(*DEMO, *RANDOM), default=[*DEMO, *RANDOM])
    parser.add_argument("--decode-steps", type=int, default=5000)
    parser.add_argument("--work", type=Path, help="folder for the models; default: a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    machine = describe_machine()
    print(header(machine))
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        results = {size: _measure(size, Path(work), arguments.decode_steps) for size in arguments.sizes}
    columns = ("model", "planned MB", "measured MB", "of the plan", "weights", "cache", "activations", "runtime")
    rows = [
        [
            size,
            f"{result['planned'] / MB:.1f}",
            f"{result['measured'] / MB:.1f}",
            f"{result['measured'] / result['planned']:.1%}",
            *(f"{result['parts'][name] / MB:.1f}" for name in ("weight", "cache", "activation", "reserve")),
        ]
        for size, result in results.items()
    ]
    print(table(columns, rows), "\n")
    checks = []
    for size, result in results.items():
        share = result["measured"] / result["planned"]
        checks.append(Check(f"{size}: measured, of the plan", 100 * share, 100 * MOST, "%"))
        checks.append(Check(f"{size}: the plan's excess", 100 * (1 - share), 100 * (1 - LEAST), "%"))
        checks.append(
            Check(f"{size}: cache that was not planned", result["cache"] - result["parts"]["cache"], 0, "bytes")
        )
    passed = print_checks(checks)
    write_json(arguments.json, {"machine": machine, "results": results, "checks": [c.as_dict() for c in checks]})
    sys.exit(not passed)


def _measure(size: str, work: Path, steps: int) -> dict[str, Any]:
    checkpoint, package = work / size, work / f"{size}-package"
    if size in DEMO:
        make: list[str | Path] = [sys.executable, ROOT / "examples" / "demo_checkpoint.py", checkpoint, *DEMO[size]]
    else:
        make = [sys.executable, ROOT / "benchmarks" / "random_checkpoint.py", checkpoint, "--shapes", RANDOM[size]]
    run_child(make, work / "make")
    budget = 64 if size == "demo" else 256
    run_child(build_command(checkpoint, package, budget=budget, precision="fp32"), work / "build")
    lengths = [f"--prompt-tokens={PREFILL}", f"--new-tokens={steps + 1}", "--warmup=0", "--repeat=1"]
    done = run_child([sys.executable, "-m", "trimkv_export", "bench", package, *lengths, "--json"], work / "run")
    empty = run_child([sys.executable, "-c", EMPTY], work / "empty")
    report = json.loads(done.output)
    plan = json.loads((package / "memory_plan.json").read_text())["plan"]
    return {
        "planned": plan["total_bytes"],
        "measured": report["peak_resident_bytes"] - 1024 * int(empty.output),
        "cache": report["cache_bytes"],
        "parts": {name: plan[f"{name}_bytes"] for name in PARTS},
        "bench": report,
    }


if __name__ == "__main__":
    main()
