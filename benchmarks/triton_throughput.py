"""A package served by Triton: tokens a second at 1, 4 and 16 streams, what a long prompt costs the others, and turns.

    make test-triton      # once: makes build/triton
    PYTHONPATH=. build/triton/client/bin/python benchmarks/triton_throughput.py [--folder build/triton] [--rounds 3]

Load comes from NVIDIA's perf_analyzer over gRPC, all on this machine: it, the server and the model share the cores.
Throughput is the best of some rounds. Prints Markdown, and ends with 1 if a limit does not hold:

- 16 streams give at least 3 times the tokens a second of one;
- while a prompt of 10,000 tokens is read, tokens of another stream wait for one prefill chunk at most (median gap);
- the second turn of a conversation of 5,000 tokens has at most 2 times the time to first token of a first turn.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serving"))
from triton_server import MODEL, GrpcStream, TritonServer, write_model

PROMPT, NEW_TOKENS = "to be continued " * 4, 256
STREAMS = (1, 4, 16)
LEAST_GAIN, MOST_TURN = 3.0, 2.0
LONG, HISTORY = 10_000, 5_000
TURNS = 30


def load(server: TritonServer, folder: Path, streams: int, work: Path) -> dict[str, Any]:
    """perf_analyzer with so many requests under way at any time, until 8 for each have ended."""
    data, export = work / "input.json", work / "export.json"
    export.unlink(missing_ok=True)
    entry = {"text_input": [PROMPT], "max_tokens": [NEW_TOKENS], "end_id": [-1], "stream": [True]}
    data.write_text(json.dumps({"data": [entry | {"return_num_output_tokens": [True]}]}))
    command = [str(folder / "client" / "bin" / "perf_analyzer"), "-m", MODEL, "-u", f"127.0.0.1:{server.grpc}"]
    command += ["-i", "grpc", "--async", "--streaming", "--input-data", str(data), "--concurrency-range", str(streams)]
    command += ["--request-count", str(8 * streams), "--profile-export-file", str(export)]
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder / "libraries")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not export.exists():  # its exit status is not 0 where windows differ much, too
        raise RuntimeError(f"perf_analyzer failed: {done.stdout} {done.stderr}")
    (experiment,) = json.loads(export.read_text())["experiments"]
    arrivals = [np.array([each["timestamp"], *each["response_timestamps"]]) / 1e9 for each in experiment["requests"]]
    span = max(times[-1] for times in arrivals) - min(times[0] for times in arrivals)
    return {
        "tokens_per_second": NEW_TOKENS * len(arrivals) / span,
        "first": np.array([times[1] - times[0] for times in arrivals]),
        # A response may carry several tokens: gaps are between responses, as they come to a user.
        "gaps": np.concatenate([np.diff(times[1:]) for times in arrivals]),
    }


def throughput(server: TritonServer, folder: Path, rounds: int) -> float:
    """Print a table; returns how many times the tokens a second of one stream 16 give."""
    print("| streams | tokens/s | time to first token, p50 / p99 | between responses, p50 / p99 |")
    print("|---|---|---|---|")
    best = {}
    with tempfile.TemporaryDirectory() as work:
        for streams in STREAMS:
            found = [load(server, folder, streams, Path(work)) for _ in range(rounds)]
            best[streams] = chosen = max(found, key=lambda each: float(each["tokens_per_second"]))
            first, gaps = (" / ".join(f"{t:.1f}" for t in milliseconds(chosen[key])) for key in ("first", "gaps"))
            print(f"| {streams} | {chosen['tokens_per_second']:,.0f} | {first} ms | {gaps} ms |", flush=True)
    return float(best[16]["tokens_per_second"] / best[1]["tokens_per_second"])


def milliseconds(seconds: NDArray[np.float64]) -> tuple[float, float]:
    """p50 and p99."""
    return float(np.percentile(seconds, 50) * 1e3), float(np.percentile(seconds, 99) * 1e3)


def long_prompt(server: TritonServer, chunk: int) -> tuple[float, float]:
    """Print how a stream fares while another's prompt is read -> (its median gap meanwhile, one chunk), in seconds."""
    arrivals: list[float] = []
    with GrpcStream(server.grpc) as running, GrpcStream(server.grpc) as late:
        running.send("running", max_tokens=20_000, end_id=-1)
        responses = running.responses()
        reader = threading.Thread(target=lambda: arrivals.extend(at for at, _ in responses))
        reader.start()
        time.sleep(1.0)
        started = time.perf_counter()
        late.send("x" * LONG, max_tokens=1, end_id=-1)
        ended, _ = next(late.responses())
        running.cancel()
        reader.join()
    times = np.array(arrivals)
    one_chunk = (ended - started) / math.ceil(LONG / chunk)
    before = np.diff(times[times < started])
    during = np.diff(times[(times >= started) & (times <= ended)])
    (p50, p99), (quiet_p50, quiet_p99) = milliseconds(during), milliseconds(before)
    print(
        f"A prompt of {LONG:,} tokens is read in {(ended - started) * 1e3:.0f} ms: {one_chunk * 1e3:.1f} ms for each "
        f"round of one chunk ({chunk} tokens) and a decode step. Meanwhile the responses of a running stream come "
        f"{p50:.1f} ms apart (p99 {p99:.1f}, longest {during.max() * 1e3:.1f}); before, {quiet_p50:.1f} ms "
        f"(p99 {quiet_p99:.1f}).\n"
    )
    return float(np.median(during)), one_chunk


def first_token(stream: GrpcStream, text: str, **fields: Any) -> float:
    """Seconds to the first token."""
    started = time.perf_counter()
    stream.send(text, max_tokens=4, end_id=-1, **fields)
    arrivals = [at for at, _ in stream.responses()]
    return arrivals[0] - started


def second_turns(server: TritonServer) -> tuple[float, float]:
    """Print time to first token of turns after a long history, and of first turns -> their medians in seconds."""
    turn = "and what happened then? "
    with GrpcStream(server.grpc) as stream:
        history = first_token(stream, "y" * HISTORY, session_id="bench", session_start=True)
        later, fresh = [], []
        for _ in range(TURNS):
            later.append(first_token(stream, turn, session_id="bench"))
            fresh.append(first_token(stream, turn))
        first_token(stream, turn, session_id="bench", session_end=True)
    print(
        f"A turn of {len(turn)} tokens after {HISTORY:,}: first token after {np.median(later) * 1e3:.1f} ms (median of "
        f"{TURNS}); as a first turn {np.median(fresh) * 1e3:.1f} ms; the {HISTORY:,} took {history * 1e3:.0f} ms."
    )
    return float(np.median(later)), float(np.median(fresh))


def main() -> None:
    """Measure, print, and hold the figures against the limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/triton"), help="what tests/serving/make_env.sh made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of a step")
    options = parser.parse_args()
    folder = options.folder.absolute()
    package = folder / "demo" / "package"
    chunk = json.loads((package / "config.json").read_text())["prefill_chunk"]
    with tempfile.TemporaryDirectory() as work:
        repository = Path(work) / "repository"
        write_model(repository, package, folder / "model", threads=options.threads)
        with TritonServer(folder, repository) as server:
            gain = throughput(server, folder, options.rounds)
            print(f"\n16 streams give {gain:.1f} times the tokens a second of one.\n", flush=True)
            gap, one_chunk = long_prompt(server, chunk)
            later, fresh = second_turns(server)
    broken = [
        text
        for text, holds in (
            (f"16 streams give {gain:.2f} times the tokens of one", gain >= LEAST_GAIN),
            (f"tokens wait {gap * 1e3:.1f} ms, and a chunk takes {one_chunk * 1e3:.1f}", gap <= 1.2 * one_chunk),
            (f"a second turn takes {later / fresh:.2f} times a first one", later <= MOST_TURN * fresh),
        )
        if not holds
    ]
    if broken:
        sys.exit("limits that do not hold: " + "; ".join(broken))


if __name__ == "__main__":
    main()
