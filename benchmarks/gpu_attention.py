"""Attention and cache update on one GPU, in one run: these kernels, PyTorch over the whole context, the official cache.

    python benchmarks/gpu_attention.py [--kernels PROGRAM] [--context 32768] [--json FILE]

- kernels: `bench_cuda_kernels`, which `tests/gpu/run.sh` builds; its shapes are those of Qwen3-4B;
- sdpa: PyTorch's, of one new token over a full fp16 cache of --context tokens in all layers, by the fastest of its
  backends and of two ways to write grouped queries;
- official: the paged cache of PyPI's `trimkv` 0.1.5, fed and compressed as its decode loop does
  (`pip install --no-deps trimkv==0.1.5`, `pip install einops transformers`);
- copy, the yardstick: 1 GiB copied within the device, bytes read and written per second.

What cannot run says why, and the rest goes on. Exit status 1 if a limit is missed or the kernels did not run.
"""

import argparse
import contextlib
import ctypes
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import GB, ROOT, describe_machine, header, table, write_json

WEIGHT_BYTES = 8.04e9  # Qwen3-4B in fp16: what a decode step reads besides the cache
LIMIT_BATCH, LEAST_SHARE, MOST_UPDATE = 64, 0.75, 0.01
PROGRAM = ROOT / "build" / "plugins" / "tests" / "cuda" / "bench_cuda_kernels"
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
COPY_BYTES = 1 << 30
WARM_UP, REPEATS, CYCLES = 3, 20, 4

# Tables: heading and format of each column.
ATTENTION = {
    "decode attention": "{who}", "batch": "{batch}", "entries a head": "{entries:,}",
    "µs a layer": "{us_per_layer:.1f}", "GB/s": "{gb_s:,.0f}", "of the copy": "{share_of_copy:.0%}",
}  # fmt: skip
UPDATE = {
    "cache update, all layers": "{who}", "batch": "{batch}", "evicting, µs": "{evicting_us:,.1f}",
    "other steps, µs": "{quiet_us:,.1f}", "average step, µs": "{average_us:,.1f}",
}  # fmt: skip
PREFILL = {
    "prefill tokens": "{tokens}", "attention, µs a layer": "{us_per_layer:.1f}", "TFLOP/s": "{tflop_s:.1f}",
    "evicting update, µs": "{evicting_us:.1f}",
}  # fmt: skip

Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Shapes of the decoder and of the caches: Qwen3-4B's, as in bench_cuda_kernels."""

    layers: int = 36
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    budget: int = 256
    evict_every: int = 32
    context: int = 32768

    def full_cache_bytes(self, batch: int) -> int:
        """Keys and values of the whole context in fp16."""
        return batch * self.layers * self.kv_heads * self.context * self.head_dim * 2 * 2


class Machine:
    """torch, and where it computes."""

    def __init__(self, device: str) -> None:
        self.torch = importlib.import_module("torch")
        self.device = device
        self.halves = {"dtype": self.torch.float16, "device": device}

    def wait(self) -> None:
        """For what was launched."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, on average; all are launched before the first is waited for."""
        for _ in range(WARM_UP):
            work()
        self.wait()
        start = time.perf_counter()
        for _ in range(REPEATS):
            work()
        self.wait()
        return (time.perf_counter() - start) / REPEATS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=Path, default=PROGRAM, help=f"default: {PROGRAM.relative_to(ROOT)}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, LIMIT_BATCH], help="rows for the kernels")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    a = parser.parse_args()
    if a.device == "cuda" and not has_gpu():
        sys.exit("error: no NVIDIA GPU here; run this where there is one (--device cpu only tries the script)")
    sizes = Sizes(**{name: getattr(a, name) for name in vars(Sizes())})
    results, not_run = Record(), dict[str, str]()
    parts: dict[str, Callable[[], Any]] = {
        "kernels": lambda: run_kernels(a.kernels, a.batch),
        "copy": lambda: measure_copy(Machine(a.device)),
        "sdpa": lambda: measure_sdpa(Machine(a.device), sizes),
        "official": lambda: measure_official(Machine(a.device), sizes),
    }
    for name, measure in parts.items():
        try:
            results[name] = measure()
        except Exception as error:  # each part is on its own
            not_run[name] = f"{type(error).__name__}: {error}"
    machine, checks = describe_machine(), limits(results.get("kernels", []))
    print(header(machine), render(sizes, results), "", sep="\n")
    for check in checks:
        verdict = "passed" if check["passed"] else "**FAILED**"
        print(f"- {check['what']} {check['limit']:.0%}: {check['value']:.2%}, {verdict}")
    for name, why in not_run.items():
        print(f"- {name}: not run. {why}")
    write_json(a.json, {"machine": machine, "sizes": vars(sizes), **results, "limits": checks, "not_run": not_run})
    sys.exit(not checks or not all(check["passed"] for check in checks))


def has_gpu() -> bool:
    """Whether CUDA's driver finds a device."""
    with contextlib.suppress(OSError):
        cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def run_kernels(program: Path, batches: Iterable[int]) -> list[Record]:
    """What bench_cuda_kernels prints: records told apart by `what`."""
    if not program.is_file():
        raise FileNotFoundError(f"{program} is not there: run tests/gpu/run.sh, or name it with --kernels")
    done = subprocess.run([program, *map(str, batches)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{program} ended with status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure_copy(machine: Machine) -> float:
    """GB read and written per second."""
    source = machine.torch.ones(COPY_BYTES, dtype=machine.torch.uint8, device=machine.device)
    target = machine.torch.empty_like(source)
    return 2 * COPY_BYTES / machine.seconds(lambda: target.copy_(source)) / GB


def measure_sdpa(machine: Machine, sizes: Sizes) -> list[Record]:
    """One new token over a full cache, batch 1 and the largest power of two that fits."""
    free = 0.9 * machine.torch.cuda.mem_get_info()[0] if machine.device == "cuda" else GB
    fits = int(free) // sizes.full_cache_bytes(1)
    if fits == 0:
        raise MemoryError(f"a cache of {sizes.context:,} tokens is {sizes.full_cache_bytes(1) / GB:.1f} GB")
    most = 1 << fits.bit_length() - 1
    return [_sdpa(machine, sizes, batch) for batch in sorted({1, min(most, LIMIT_BATCH)})]


def _sdpa(machine: Machine, sizes: Sizes, batch: int) -> Record:
    torch, sdpa = machine.torch, importlib.import_module("torch.nn.attention")
    attend = torch.nn.functional.scaled_dot_product_attention
    shape = (batch, sizes.kv_heads, sizes.context, sizes.head_dim)
    caches = [tuple(torch.empty(shape, **machine.halves).normal_() for _ in range(2)) for _ in range(sizes.layers)]
    heads = torch.randn(batch, sizes.kv_heads * sizes.group, 1, sizes.head_dim, **machine.halves)
    rows = heads.view(batch, sizes.kv_heads, sizes.group, sizes.head_dim)  # a group's queries see the same entries
    times, failures = dict[str, float](), list[str]()
    for backend, query in itertools.product(BACKENDS, (heads, rows)):
        if backend == "MATH" and times:  # it copies the cache: for want of others only
            break
        label = f"{backend}, {'enable_gqa' if query is heads else 'group as rows'}"

        def step(query: Any = query) -> None:
            for key, value in caches:
                attend(query, key, value, enable_gqa=query is heads)

        try:
            with torch.inference_mode(), sdpa.sdpa_kernel(getattr(sdpa.SDPBackend, backend)):
                times[label] = machine.seconds(step)
        except RuntimeError as error:  # this backend does not take these shapes
            failures.append(f"{label}: {str(error).splitlines()[0]}")
    best = min(times, key=lambda label: times[label], default="")
    if not best:
        raise RuntimeError("; ".join(failures))
    rate = sizes.full_cache_bytes(batch) / times[best] / GB
    us = {name: seconds * 1e6 / sizes.layers for name, seconds in times.items()}
    return {"who": f"PyTorch ({best})", "batch": batch, "us_per_layer": us[best], "gb_s": rate, "all_us_per_layer": us}


def official_cache() -> Any:
    """The official PagedTrimKVCache, without its package's __init__, whose models import flash-attn."""
    spec = find_spec("trimkv")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("trimkv: pip install --no-deps trimkv==0.1.5, pip install einops transformers")
    sys.modules["trimkv"] = package = types.ModuleType("trimkv")
    package.__path__ = list(spec.submodule_search_locations)
    return importlib.import_module("trimkv.cache_utils").PagedTrimKVCache


def measure_official(machine: Machine, sizes: Sizes) -> list[Record]:
    """The official cache, batch 1: `update` in every layer, then `compress`, for each token; both synchronise."""
    torch, streams = machine.torch, sizes.layers * sizes.kv_heads
    cache = official_cache()(
        num_layers=sizes.layers,
        num_heads=sizes.kv_heads,
        max_seq_len=sizes.context,
        memory_size=sizes.budget,
        buffer_size=sizes.evict_every,
        device=machine.device,
    )

    def feed(first: int, tokens: int) -> tuple[float, float, bool]:
        """Seconds of all updates and of compress, and whether that evicted."""
        shape = (sizes.layers, 1, sizes.kv_heads, tokens, sizes.head_dim)
        keys, values = (torch.randn(shape, **machine.halves) for _ in range(2))
        gates = -torch.exp(torch.rand(shape[:-1], **machine.halves) * 10 - 8)
        position = torch.arange(first, first + tokens, device=machine.device)
        machine.wait()
        start = time.perf_counter()
        for layer in range(sizes.layers):
            extra = {"cache_position": position, "retention_weights": gates[layer]}
            cache.update(keys[layer], values[layer], layer, extra)
        machine.wait()
        updated = time.perf_counter()
        cache.compress()
        machine.wait()
        compressed = time.perf_counter()
        evicted = int(cache.paged_cache.cache_seqlens.sum()) == streams * sizes.budget
        return updated - start, compressed - updated, evicted

    with torch.inference_mode():
        feed(0, sizes.budget)
        steps = [feed(sizes.budget + i, 1) for i in range((CYCLES + 1) * sizes.evict_every)][sizes.evict_every :]
    if sum(evicted for *_, evicted in steps) != CYCLES:
        raise RuntimeError(f"the official cache did not evict every {sizes.evict_every} tokens")
    return [
        {
            "who": f"official cache: {who}",
            "batch": 1,
            "evicting_us": 1e6 * statistics.median(step[part] for step in steps if step[2]),
            "quiet_us": 1e6 * statistics.median(step[part] for step in steps if not step[2]),
            "average_us": 1e6 * statistics.fmean(step[part] for step in steps),
        }
        for part, who in enumerate(("update", "compress"))
    ]


def limits(kernels: Iterable[Record]) -> list[Record]:
    """What the kernels are held to: {what, value, limit, passed}, shares of 1.

    A decode step: attention and update, measured in one CUDA graph, and reading the weights at the copy's rate.
    """
    checks = []
    for line in (line for line in kernels if line["what"] == "decode"):
        case = f"batch {line['batch']}, {line['heads']} heads"
        if line["batch"] == LIMIT_BATCH:
            what, share = f"decode attention, {case}: share of the copy's rate, at least", line["share_of_copy"]
            checks.append({"what": what, "value": share, "limit": LEAST_SHARE, "passed": share >= LEAST_SHARE})
        weights_us = WEIGHT_BYTES / (line["gb_s"] / line["share_of_copy"] * GB) * 1e6
        share = line["average_us"] / (line["step_us"] + weights_us)
        what = f"PoolUpdate, {case}: share of a decode step, at most"
        checks.append({"what": what, "value": share, "limit": MOST_UPDATE, "passed": share <= MOST_UPDATE})
    return checks


def render(sizes: Sizes, results: Mapping[str, Any]) -> str:
    """All results as Markdown."""
    kernels = results.get("kernels", [])
    who = "this cache, {heads} heads".format_map
    decode = [x | {"who": who(x), "entries": sizes.budget} for x in kernels if x["what"] == "decode"]
    rates = {line["name"]: line["copy_gb_s"] for line in kernels if line["what"] == "device"}
    rates |= {"PyTorch": results["copy"]} if "copy" in results else {}
    rate = next(iter(rates.values()), float("nan"))
    sdpa = [x | {"entries": sizes.context, "share_of_copy": x["gb_s"] / rate} for x in results.get("sdpa", [])]
    copies = ", ".join(f"{value:,.0f} ({name})" for name, value in rates.items())
    parts = [f"{sizes}, fp16. Copies within the device, GB/s read and written: {copies}."]
    for columns, records in (
        (ATTENTION, decode + sdpa),
        (UPDATE, decode + results.get("official", [])),
        (PREFILL, [line for line in kernels if line["what"] == "prefill"]),
    ):
        if records:
            rows = [[form.format(**record) for form in columns.values()] for record in records]
            parts.append(table(list(columns), rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
