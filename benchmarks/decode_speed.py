"""Decode speed, prefill speed and memory over the length of the context, on the CPU.

    python benchmarks/decode_speed.py [--shapes qwen3-0.6b] [--precision fp32 int4] [--contexts 128,2048,8192] [--peers]
                                      [--profile]

Builds packages of a random checkpoint. Random tokens are fed in chunks of 256 up to each context, then some are decoded
one by one; each engine runs in a process of its own. Memory is what is resident then, mapped weights included. With
`--profile` ONNX Runtime says, for the last precision, where the time of the decode steps goes. There are no limits: the
figures depend on the machine.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import (
    GB,
    ROOT,
    add_checkpoint_options,
    build_command,
    describe_machine,
    header,
    make_checkpoint,
    peer_build_command,
    peer_python,
    resident_bytes,
    run_child,
    table,
    work_folder,
    write_json,
)

SHAPES = ("qwen3-0.6b", "qwen3-4b")
CHUNK = 256  # tokens a prefill step
VOCAB_SIZE = 151936
# Profile groups, by the names that ONNX Runtime gives to nodes of inlined functions; the first match counts.
GROUPS = (
    ("PoolAttention", re.compile(r"_inlfunc_PoolAttention|\.pool_attention")),
    ("PoolUpdate", re.compile(r"_inlfunc_PoolUpdate|(choose|fill|then|else)_")),
    ("RetentionGate", re.compile(r"_inlfunc_RetentionGate|\.retention_gate")),
    ("linear layers", re.compile(r"_proj$|^lm_head$")),
)
CONTROL_FLOW = {"If", "Loop"}  # their time is that of the nodes inside

Feed = Callable[[Sequence[int]], object]
Step = Callable[[int], object]


def random_tokens(count: int, seed: int) -> list[int]:
    """Token ids."""
    import numpy as np

    tokens: list[int] = np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()
    return tokens


def measure(feed: Feed, step: Step, contexts: Sequence[int], steps: int) -> list[dict[str, float]]:
    """Time and memory at each context. `feed` takes up to CHUNK tokens, `step` one."""
    out = []
    seen = 0
    tokens = random_tokens(max(contexts) + (steps + 1) * len(contexts), seed=0)
    for context in contexts:
        start, first = time.perf_counter(), seen
        while seen < context:
            count = min(CHUNK, context - seen)
            feed(tokens[seen : seen + count])
            seen += count
        prefill_s = time.perf_counter() - start
        times = []
        step(tokens[seen])  # the first has buffers to make
        for token in tokens[seen + 1 : seen + 1 + steps]:
            start = time.perf_counter()
            step(token)
            times.append((time.perf_counter() - start) * 1e3)
        out.append(
            {
                "context": context,
                "prefill_tokens": context - first,
                "prefill_tokens_per_s": (context - first) / prefill_s,
                "decode_ms": statistics.median(times),
                "decode_ms_mean": statistics.fmean(times),
                "rss_bytes": resident_bytes(),
            }
        )
        seen += 1 + steps
    return out


def child_ours(package: str, contexts: Sequence[int], steps: int, profile: str | None) -> dict[str, Any]:
    """Measure a package; with `profile`, the folder for it, also where the time of the last steps goes."""
    import onnxruntime

    if profile:
        make_options = onnxruntime.SessionOptions

        def profiled() -> Any:
            options = make_options()
            options.enable_profiling = True
            options.profile_file_prefix = f"{profile}/profile"
            return options

        # The engine has no option for this, and needs none.
        onnxruntime.SessionOptions = profiled
    from trimkv_export.runtime import Engine

    with Engine.open(package) as engine:
        session = engine.session()
        rows = measure(session.step, lambda token: session.step([token]), contexts, steps)
        if not profile:
            return {"rows": rows}
        return {"rows": rows, "profile": summarise(Path(engine.backend.end_profiling()), steps)}


def child_genai(model: str, contexts: Sequence[int], steps: int) -> dict[str, Any]:
    """Measure a model of onnxruntime-genai. It samples for itself (greedily), so `step` ignores its token."""
    import numpy as np
    import onnxruntime_genai as og

    genai = og.Model(model)
    parameters = og.GeneratorParams(genai)
    parameters.set_search_options(max_length=max(contexts) + (steps + 1) * len(contexts) + CHUNK, do_sample=False)
    generator = og.Generator(genai, parameters)
    feed: Feed = lambda tokens: generator.append_tokens(np.asarray(tokens, np.int32))  # noqa: E731
    return {"rows": measure(feed, lambda _: generator.generate_next_token(), contexts, steps)}


def summarise(file: Path, steps: int) -> dict[str, Any]:
    """Milliseconds a decode step by group and by node, over the last `steps` runs of a profile."""
    events = json.loads(file.read_text())
    runs = [event for event in events if event["name"] == "model_run"][-steps:]
    first, last = runs[0]["ts"], runs[-1]["ts"] + runs[-1]["dur"]
    total = sum(run["dur"] for run in runs)
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    nodes: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    kernels = 0.0
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name == event["name"] or not first <= event["ts"] <= last or event["args"]["op_name"] in CONTROL_FLOW:
            continue
        group = next((label for label, pattern in GROUPS if pattern.search(name)), "other nodes")
        node = f"{group}: {event['args']['op_name']}"
        kernels += event["dur"]
        for sums, key in ((groups, group), (nodes, node)):
            sums[key][0] += event["dur"]
            sums[key][1] += 1
    groups["between nodes"] = [total - kernels, 0.0]

    def per_step(sums: dict[str, list[float]]) -> list[dict[str, Any]]:
        rows = [
            {"name": name, "ms": dur / steps / 1e3, "nodes": count / steps, "share": dur / total}
            for name, (dur, count) in sums.items()
        ]
        return sorted(rows, key=lambda row: -row["ms"])

    return {"ms": total / steps / 1e3, "groups": per_step(groups), "nodes": per_step(nodes)[:24]}


def run_engine(python: str | Path, kind: str, model: Path, options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Measure one engine in a process of its own."""
    command = [python, Path(__file__), "--child", kind, "--model", model, "--steps", str(options.steps)]
    command += ["--contexts", ",".join(map(str, options.contexts))]
    if kind == "profile":
        command += ["--profile-folder", log.parent]
    run = run_child(command, log, cwd=ROOT)
    result: dict[str, Any] = json.loads(run.output.strip().splitlines()[-1])
    return result | {"peak_rss_bytes": run.peak_rss_bytes, "wall_s": run.wall_s, "other_cpu_s": run.other_cpu_s}


def run_all(work: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Build and measure: engine -> its figures."""
    checkpoint, log = make_checkpoint(work, options), work / "log"
    results: dict[str, dict[str, Any]] = {}
    turns: list[tuple[str, str | Path, str, Path]] = []
    for precision in options.precision:
        package = work / f"package-{precision}"
        run_child(build_command(checkpoint, package, budget=options.budget, precision=precision), log)
        if options.peers:
            peer = peer_python(options.work or work)
            model = work / f"genai-{precision}"
            run_child(peer_build_command(peer, checkpoint, model, precision=precision, cache=work / "cache"), log)
            shutil.rmtree(work / "cache", ignore_errors=True)
            turns.append((f"onnxruntime-genai 0.18 {precision}", peer, "genai", model))
        turns.append((f"trimkv-export {precision}", sys.executable, "ours", package))
    # In turns, and the better figure counts, so that a busy moment does not decide.
    for _ in range(options.rounds):
        for name, python, kind, model in turns:
            results[name] = better(results.get(name), run_engine(python, kind, model, options, log))
    if options.profile:
        results["profile"] = run_engine(sys.executable, "profile", package, options, log)
    return results


def better(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The better time of two runs at each context; memory of the later one."""
    if old:
        for before, row in zip(old["rows"], new["rows"], strict=True):
            row["prefill_tokens_per_s"] = max(row["prefill_tokens_per_s"], before["prefill_tokens_per_s"])
            for key in ("decode_ms", "decode_ms_mean"):
                row[key] = min(row[key], before[key])
    return new


def report(results: dict[str, dict[str, Any]], contexts: Sequence[int]) -> str:
    """Markdown tables."""
    parts = []
    rows = []
    for name, result in results.items():
        if name != "profile":
            cells = result["rows"]
            rows += [
                [f"{name}: decode, ms a token, median (mean)"]
                + [f"{cell['decode_ms']:.1f} ({cell['decode_ms_mean']:.1f})" for cell in cells],
                [f"{name}: prefill up to there, tokens/s"] + [f"{cell['prefill_tokens_per_s']:.0f}" for cell in cells],
                [f"{name}: resident, GB"] + [f"{cell['rss_bytes'] / GB:.2f}" for cell in cells],
            ]
            rows.append(
                [f"{name}: CPU s of other processes in the last run of {result['wall_s']:.0f} s"]
                + [f"{result['other_cpu_s']:.0f} in all"]
                + [""] * (len(cells) - 1)
            )
    parts.append(table(["at a context of", *(f"{context:,}" for context in contexts)], rows))
    if "profile" in results:
        profile = results["profile"]["profile"]
        rows = [
            [row["name"], f"{row['ms']:.2f}", f"{row['nodes']:.0f}", f"{row['share']:.1%}"]
            for row in [*profile["groups"], *profile["nodes"]]
        ]
        head = (f"decode step at {contexts[-1]:,}, profiled: {profile['ms']:.1f} ms", "ms", "nodes", "share")
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def parse_contexts(text: str) -> list[int]:
    """Increasing context lengths from "128,2048"."""
    contexts = [int(part) for part in text.split(",")]
    if not contexts or contexts[0] < 1 or contexts != sorted(set(contexts)):
        raise argparse.ArgumentTypeError(f"contexts must increase from at least 1, got {text!r}")
    return contexts


def main() -> None:
    """Parse the command line and measure; a hidden option makes this process the measured one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser, SHAPES, "qwen3-0.6b")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "int4"), default=["fp32"], help="default fp32")
    parser.add_argument("--contexts", type=parse_contexts, default="128,2048,8192", help="default 128,2048,8192")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed at each context; default 32")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each engine; the better counts; default 2")
    parser.add_argument("--peers", action="store_true", help="also onnxruntime-genai 0.18 (installs it)")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    for hidden in ("child", "model", "profile-folder"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if options.child == "genai":
            result = child_genai(options.model, options.contexts, options.steps)
        else:
            result = child_ours(options.model, options.contexts, options.steps, options.profile_folder)
        print(json.dumps(result))
        return
    with work_folder("decode-speed-", options) as work:
        results = run_all(work, options)
    machine = describe_machine()
    print(header(machine))
    print(report(results, options.contexts))
    write_json(
        options.json, {"machine": machine, "shapes": options.shapes, "budget": options.budget, "engines": results}
    )


if __name__ == "__main__":
    main()
