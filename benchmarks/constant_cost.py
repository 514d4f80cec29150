"""Does a long conversation cost more than a short one? Time per token and memory from 1,000 to 100,000 tokens.

    python benchmarks/constant_cost.py [--tokens 100000] [--plot constant_cost.png]

Builds the demo checkpoint with a budget of 64 and decodes fixed random tokens one by one. At the end the time per token
is compared with that of a fresh session at about 1,000 tokens: blocks of both take turns in the same process, so that
what else the machine does hits both.

Limits: memory grows by less than 1 MB after the warm-up, time per token by no more than 10%.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
    print_checks,
    resident_bytes,
    table,
    write_json,
)
from numpy.typing import NDArray

from trimkv_export.runtime import Engine
from trimkv_export.runtime.session import Session

# Steps that are timed together: a multiple of `evict_every` (32), so that each block has as many evictions.
BLOCK = 128
WINDOW_BLOCKS = 16  # 2,048 steps
FRESH_START = 500  # the fresh session's window is 500 … 2,548 tokens
MAX_GROWTH_MB = 1.0
MAX_SLOWDOWN_PERCENT = 10.0


def run_block(session: Session, tokens: Sequence[int]) -> float:
    """Feed tokens one by one; milliseconds per token."""
    start = time.perf_counter()
    for token in tokens:
        session.step([token])
    return (time.perf_counter() - start) * 1e3 / len(tokens)


class Record:
    """Time and memory over a session; all arrays exist from the start, so that recording costs no memory."""

    def __init__(self, blocks: int) -> None:
        self.ms: NDArray[np.float64] = np.zeros(blocks)
        self.rss: NDArray[np.int64] = np.zeros(blocks, np.int64)
        self.tokens: NDArray[np.int64] = np.zeros(blocks, np.int64)
        self._next = 0

    def add(self, session: Session, ms: float) -> None:
        """Note a block that just ended."""
        self.ms[self._next], self.rss[self._next] = ms, resident_bytes()
        self.tokens[self._next] = session.tokens_seen
        self._next += 1

    def cut(self) -> None:
        """Drop what was not used."""
        used = slice(self._next)
        self.ms, self.rss, self.tokens = self.ms[used], self.rss[used], self.tokens[used]


def measure(engine: Engine, total: int, warm_up: int, seed: int) -> tuple[dict[str, Any], Record]:
    """Decode `total` tokens in one session, and a window in a fresh one at the time of its last window."""
    tokens = np.random.default_rng(seed).integers(0, engine.config.model.vocab_size, total).tolist()
    record = Record(total // BLOCK + 1)
    early: NDArray[np.float64] = np.zeros(WINDOW_BLOCKS)
    pairs: NDArray[np.float64] = np.zeros((WINDOW_BLOCKS, 2))
    long, fresh = engine.session(), engine.session()
    run_block(fresh, tokens[:FRESH_START])
    run_block(long, tokens[:FRESH_START])
    for index in range(WINDOW_BLOCKS):
        early[index] = run_block(long, tokens[long.tokens_seen : long.tokens_seen + BLOCK])
        record.add(long, early[index])
    window_start = total - WINDOW_BLOCKS * BLOCK
    if long.tokens_seen < warm_up:
        run_block(long, tokens[long.tokens_seen : warm_up])
    rss_warm = resident_bytes()
    while long.tokens_seen < window_start:
        record.add(long, run_block(long, tokens[long.tokens_seen : min(long.tokens_seen + BLOCK, window_start)]))
    for index in range(WINDOW_BLOCKS):
        first = FRESH_START + index * BLOCK
        # The order alternates, because the second of a pair finds warmer or colder caches.
        for which in (0, 1) if index % 2 else (1, 0):
            if which:
                pairs[index, 1] = run_block(long, tokens[long.tokens_seen : long.tokens_seen + BLOCK])
                record.add(long, pairs[index, 1])
            else:
                pairs[index, 0] = run_block(fresh, tokens[first : first + BLOCK])
    record.cut()
    rss_end = resident_bytes()
    short_ms, long_ms = (float(np.median(pairs[:, which])) for which in (0, 1))
    figures = {
        "tokens": long.tokens_seen,
        "evictions": long.evictions,
        "cache_bytes": engine.cache_bytes,
        "rss_after_warm_up_bytes": rss_warm,
        "rss_end_bytes": rss_end,
        "rss_max_bytes": int(record.rss.max()),
        "rss_growth_bytes": rss_end - rss_warm,
        "ms_per_token_first_pass_1000": float(np.median(early)),
        "ms_per_token_fresh_session": short_ms,
        "ms_per_token_at_end": long_ms,
        "slowdown_percent": (float(np.median(pairs[:, 1] / pairs[:, 0])) - 1) * 100,
    }
    return figures, record


def plot(record: Record, figures: dict[str, Any], path: Path) -> None:
    """Time per token and memory over the tokens of the conversation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fig, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.5), layout="constrained")
    upper.plot(record.tokens, record.ms, linewidth=0.6)
    upper.set_ylim(0, 2.5 * float(np.median(record.ms)))
    upper.set_ylabel("ms per token")
    upper.set_title(f"{figures['tokens']:,} tokens in one session: slowdown {figures['slowdown_percent']:+.1f}%")
    lower.plot(record.tokens, (record.rss - figures["rss_after_warm_up_bytes"]) / MB, linewidth=0.8, color="tab:green")
    lower.axhline(MAX_GROWTH_MB, color="tab:red", linewidth=0.8, linestyle="--")
    lower.set_ylabel("RSS growth, MB")
    lower.set_xlabel("tokens seen")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    """Parse the command line, measure, and exit with 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the conversation; default 100,000")
    parser.add_argument("--warm-up", type=int, default=2_600, help="tokens before memory counts; default 2,600")
    parser.add_argument("--budget", type=int, default=64, help="default 64")
    parser.add_argument("--gate", choices=("rg10", "rg"), default="rg10", help="kind of retention gate")
    parser.add_argument("--threads", type=int, help="threads of a step; default: as the runtime")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens; default 0")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write a plot")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()
    least = FRESH_START + 2 * WINDOW_BLOCKS * BLOCK
    if options.tokens < max(least, options.warm_up + WINDOW_BLOCKS * BLOCK):
        parser.error(f"--tokens must be at least {least}, and leave a window after the warm-up; got {options.tokens}")
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="constant-cost-") as folder:
        work = Path(folder)
        package = work / "package"
        # In processes of their own: torch and onnx would count as this one's memory.
        demo = [sys.executable, ROOT / "examples" / "demo_checkpoint.py", work]
        subprocess.run([*demo, "--gate", options.gate, "--seed", str(options.seed)], check=True, stdout=sys.stderr)
        build = build_command(work, package, budget=options.budget, precision="fp32")
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        with Engine.open(package, max_sessions=2, threads=options.threads) as engine:
            figures, record = measure(engine, options.tokens, options.warm_up, options.seed)
    if options.plot:
        plot(record, figures, options.plot)
    print(header(machine))
    rows = [
        ["tokens, evictions", f"{figures['tokens']:,}, {figures['evictions']:,}"],
        ["cache (2 rows)", f"{figures['cache_bytes'] / MB:.2f} MB"],
        [
            "RSS after warm-up, at the end",
            " / ".join(f"{figures[f'rss_{w}_bytes'] / MB:.2f}" for w in ("after_warm_up", "end")) + " MB",
        ],
        ["ms a token around 1,000, first pass", f"{figures['ms_per_token_first_pass_1000']:.3f}"],
        [
            "ms a token around 1,000, fresh session meanwhile",
            f"{figures['ms_per_token_fresh_session']:.3f}",
        ],
        [f"ms a token around {figures['tokens']:,}", f"{figures['ms_per_token_at_end']:.3f}"],
    ]
    print(table(("constant cost", "measured"), rows), end="\n\n")
    checks = [
        Check("memory growth after warm-up", figures["rss_growth_bytes"] / MB, MAX_GROWTH_MB, "MB"),
        Check("slowdown, median of paired blocks", figures["slowdown_percent"], MAX_SLOWDOWN_PERCENT, "%"),
    ]
    passed = print_checks(checks)
    series = {name: getattr(record, name).tolist() for name in ("tokens", "ms", "rss")}
    content = {"machine": machine, "figures": figures, "checks": [check.as_dict() for check in checks]}
    write_json(options.json, content | {"blocks": series})
    sys.exit(not passed)


if __name__ == "__main__":
    main()
