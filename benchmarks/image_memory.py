"""Do images cost memory once they were read? 8,000 image tokens in one prompt, as several images and as one.

    python benchmarks/image_memory.py [--tokens 8000]

Builds the small random Qwen3-VL with a budget of 64. Each case runs in a process of its own: a prompt of 10 tokens, a
small image with 2,600 tokens of text (so that code and the decoder's buffers are in), and then, three times, noise
images with `--tokens` image tokens. Memory is read before and after, when images and prompt are freed.

Limits, for each case and each time: the cache is as large as with 10 tokens; resident memory comes back to within 5 MB.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    MB,
    ROOT,
    Check,
    build_command,
    describe_machine,
    header,
    peak_resident_bytes,
    print_checks,
    reset_peak,
    resident_bytes,
    run_child,
    table,
    write_json,
)
from numpy.typing import NDArray

from trimkv_export.runtime import Engine, Session

MAX_GROWTH_MB = 5.0
BUDGET = 64
PASSES = 3
WARM_UP = 2600  # tokens of text, as in constant_cost.py
TOKEN_PIXELS = 32  # side of the square that one token stands for
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = "What has changed between these pictures?"


@dataclass(frozen=True)
class Case:
    """Images of one size. side: in tokens."""

    name: str
    images: int
    side: int

    @property
    def tokens(self) -> int:
        """Image tokens in all."""
        return self.images * self.side**2

    @property
    def max_image_tokens(self) -> int:
        """What the package is built for."""
        return 1 << (self.side**2 - 1).bit_length()


@dataclass(frozen=True)
class Pass:
    """What one prompt did; bytes."""

    prompt_tokens: int
    before: int
    peak: int
    after: int
    cache: int


def cases(tokens: int) -> list[Case]:
    """The same number of tokens in images of 1,024, of 256, and in one."""
    whole = round(tokens**0.5 + 0.5)
    return [
        Case("images of 1,024 tokens", -(-tokens // 1024), 32),
        Case("images of 256 tokens", -(-tokens // 256), 16),
        Case("one image", 1, whole),
    ]


def noise(count: int, side: int, seed: int) -> list[NDArray[np.uint8]]:
    """Images of side² tokens each."""
    rng, pixels = np.random.default_rng(seed), side * TOKEN_PIXELS
    return [rng.integers(0, 256, (pixels, pixels, 3), np.uint8) for _ in range(count)]


def feed(session: Session, engine: Engine, images: Sequence[NDArray[np.uint8]], text: str) -> int:
    """Start the conversation with these images; returns the tokens of the prompt."""
    session.reset()
    session.prefill(engine.tokenizer.encode(IMAGE * len(images) + text), images=images)
    return session.tokens_seen


def measure(package: Path, count: int, side: int, native: str) -> dict[str, Any]:
    """All passes of a case, in this process."""
    with Engine.open(package, native=native) as engine, engine.session() as session:
        session.prefill(engine.tokenizer.encode("ten tokens"))
        cache = allocated_cache(engine)
        feed(session, engine, noise(1, 8, seed=0), TEXT * (WARM_UP // len(TEXT)))
        passes = []
        for number in range(PASSES):
            gc.collect()
            reset_peak()
            before = resident_bytes()
            images = noise(count, side, seed=number)
            tokens = feed(session, engine, images, TEXT)
            del images
            gc.collect()
            passes.append(Pass(tokens, before, peak_resident_bytes(), resident_bytes(), allocated_cache(engine)))
        return {"cache_of_10_tokens": cache, "native": engine.native, "passes": [asdict(entry) for entry in passes]}


def allocated_cache(engine: Engine) -> int:
    """The engine's own figure, if the arrays of its one row add up to it, alignment aside."""
    arrays = sum(array.nbytes for array in engine.memory.read(0).values())
    if not arrays <= engine.cache_bytes < arrays + 256 * len(engine.slab.entries):
        raise RuntimeError(f"the engine says {engine.cache_bytes} bytes of cache, its arrays have {arrays}")
    return engine.cache_bytes


def run_case(work: Path, case: Case, native: str) -> dict[str, Any]:
    """Build the case's package and measure it in a child."""
    package = work / f"package-{case.max_image_tokens}"
    if not package.exists():
        most = case.max_image_tokens
        run_child(build_command(work, package, budget=BUDGET, precision="fp32", max_image_tokens=most), work / "log")
    sizes = [str(case.images), str(case.side)]
    command: list[str | Path] = [sys.executable, Path(__file__), "--native", native, "--child", package, *sizes]
    found: dict[str, Any] = json.loads(run_child(command, work / "log").output)
    return found


def report(results: Sequence[tuple[Case, dict[str, Any]]]) -> str:
    """One row for each case and pass."""
    rows = [
        [
            case.name if not number else "",
            f"{case.images} x {case.side**2:,} = {case.tokens:,}",
            f"{entry['prompt_tokens']:,}",
            f"{entry['cache']:,}",
            f"{entry['before'] / MB:.2f}",
            f"+{(entry['peak'] - entry['before']) / MB:.1f}",
            f"{(entry['after'] - entry['before']) / MB:+.2f}",
        ]
        for case, result in results
        for number, entry in enumerate(result["passes"])
    ]
    columns = ("images", "image tokens", "prompt", "cache, bytes", "RSS before, MB", "peak", "after")
    return table(columns, rows)


def check(results: Sequence[tuple[Case, dict[str, Any]]]) -> list[Check]:
    """The limits: for each case, the worst of its passes."""
    checks = []
    for case, result in results:
        small, passes = result["cache_of_10_tokens"], result["passes"]
        change = max(abs(entry["cache"] - small) for entry in passes)
        growth = max(entry["after"] - entry["before"] for entry in passes) / MB
        total = (passes[-1]["after"] - passes[0]["before"]) / MB
        checks.append(Check(f"{case.name}: cache, against a prompt of 10 tokens", change, 0, "bytes"))
        checks.append(
            Check(f"{case.name}: memory that did not come back, worst of {PASSES}", growth, MAX_GROWTH_MB, "MB")
        )
        checks.append(Check(f"{case.name}: the same over all {PASSES}", total, MAX_GROWTH_MB, "MB"))
    return checks


def main() -> None:
    """Parse the command line, measure, and exit with 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000, help="image tokens of a prompt, at least; default 8,000")
    parser.add_argument("--native", choices=("auto", "require", "off"), default="auto", help="native kernels")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; default 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--child", nargs=3, metavar=("PACKAGE", "IMAGES", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        package, images, side = options.child
        print(json.dumps(measure(Path(package), int(images), int(side), options.native)))
        return
    if options.tokens < 1024:
        parser.error(f"--tokens must be at least 1024, got {options.tokens}")
    with tempfile.TemporaryDirectory(prefix="image-memory-") as folder:
        work = Path(folder)
        demo = ROOT / "examples" / "demo_checkpoint.py"
        run_child([sys.executable, demo, work, "--family", "qwen3_vl", "--seed", str(options.seed)], work / "log")
        results = [(case, run_case(work, case, options.native)) for case in cases(options.tokens)]
    machine = describe_machine()
    print(header(machine))
    kernels = "native kernels" if all(result["native"] for _, result in results) else "portable bodies"
    print(f"Small random Qwen3-VL, fp32, budget {BUDGET}, {kernels}.\n")
    print(report(results), end="\n\n")
    checks = check(results)
    passed = print_checks(checks)
    content = {
        "machine": machine,
        "cases": [asdict(case) | result for case, result in results],
        "checks": [entry.as_dict() for entry in checks],
    }
    write_json(options.json, content)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
