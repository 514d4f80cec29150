"""Speed of the two operators at a model's shapes: native kernels against portable bodies, in one run.

    python benchmarks/operators.py [--library FILE] [--layers 36] [--kv-heads 8] [--group 4] [--head-dim 128]
                                   [--budget 256] [--evict-every 32] [--json]

PoolAttention: one decode token through all layers, each reading its own part of a full pool, with the pool spread
evenly over the heads and with most of it in a few heads; as a share of the rate at which BLAS reads as many bytes
in order (sdot, a part on each core). PoolUpdate: one token with and without an eviction.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from common import median_seconds, read_rate
from onnx import TensorProto, helper

from trimkv_export.backends.native import find_library
from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.graph.builder import OPSET
from trimkv_export.graph.functions import pool_attention_function, pool_update_function
from trimkv_export.graph.ops import (
    DOMAIN,
    DOMAIN_VERSION,
    POOL_ATTENTION,
    POOL_ATTENTION_STATE,
    POOL_UPDATE,
    PoolAttentionAttributes,
    PoolUpdateAttributes,
    pool_update_inputs,
)
from trimkv_export.policy import STATE_TENSORS, CacheSpec

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
LIMITS = {"update_ms": 5.0, "read_share": 0.6}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=find_library(), help="default: where `make plugins` puts it")
    for name, value in (("layers", 36), ("kv-heads", 8), ("group", 4), ("head-dim", 128), ("budget", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--evict-every", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    if a.library is None:
        parser.error("no native library: run `make plugins`, or name one with --library")
    eviction = EvictionConfig(Policy.GLOBAL, a.budget, a.evict_every)
    spec = CacheSpec(a.layers, a.kv_heads, a.head_dim, a.budget, a.evict_every)
    pool_bytes = spec.num_slots * 2 * spec.head_dim * 4  # keys and values
    report: dict[str, Any] = {"shapes": vars(spec) | {"group": a.group}, "read_gb_s": read_rate(pool_bytes, a.repeat)}
    for skew in (False, True):
        state = _full_state(spec, skew)
        for kind, library in (("native", a.library), ("portable", None)):
            seconds = _time(_attention_model(spec, a.group), state, spec, a.group, library, a.repeat)
            name = f"attention_{kind}{'_skewed' if skew else ''}"
            rate = pool_bytes / seconds / 1e9
            report[name] = {"ms_per_layer": 1e3 * seconds / a.layers, "gb_s": rate, "share": rate / report["read_gb_s"]}
    for kind, library in (("native", a.library), ("portable", None)):
        model = _update_model(spec, eviction, a.group)
        for name, recent in (("append", 0), ("evict", a.evict_every - 1)):
            state = _full_state(spec, False)
            state["counters"][0, 2] = recent
            seconds = _time(model, state, spec, a.group, library, a.repeat, reset=recent)
            report[f"update_{kind}_{name}_ms"] = 1e3 * seconds
    report["passed"] = (
        report["update_native_evict_ms"] <= LIMITS["update_ms"]
        and report["attention_native"]["share"] >= LIMITS["read_share"]
        and report["attention_native"]["ms_per_layer"] < report["attention_portable"]["ms_per_layer"]
        and report["update_native_evict_ms"] < report["update_portable_evict_ms"]
    )
    print(json.dumps(report, indent=2) if a.json else _text(report))


def _text(report: dict[str, Any]) -> str:
    lines = [f"sequential read (sdot on each core): {report['read_gb_s']:.1f} GB/s"]
    for name, value in report.items():
        if name.startswith("attention"):
            lines.append(
                f"{name}: {value['ms_per_layer']:.3f} ms a layer, {value['gb_s']:.1f} GB/s, {value['share']:.0%} of it"
            )
        elif name.startswith("update"):
            lines.append(f"{name}: {value:.2f}")
    return "\n".join([*lines, f"limits {LIMITS}: {'passed' if report['passed'] else 'FAILED'}"])


def _full_state(spec: CacheSpec, skew: bool) -> dict[str, np.ndarray]:
    """A full pool; with `skew`, half of it in a twentieth of the heads."""
    rng = np.random.default_rng(0)
    share = np.ones(spec.num_streams)
    if skew:
        share[rng.permutation(spec.num_streams)[: max(1, spec.num_streams // 20)]] *= 20
    owner = rng.choice(spec.num_streams, spec.num_slots, p=share / share.sum())
    state: dict[str, np.ndarray] = {}
    for tensor in spec.tensors():
        if tensor.dtype == "int32":
            state[tensor.name] = np.zeros(tensor.shape, np.int32)
        else:
            state[tensor.name] = rng.standard_normal(tensor.shape, np.float32)
    for name in ("pool_log_beta", "recent_log_beta"):
        state[name] = -np.exp(state[name]).astype(np.float32)
    state["pool_position"][0] = rng.permutation(spec.num_slots) // spec.num_streams
    state["slot_index"][0] = np.argsort(owner, kind="stable")
    state["stream_start"][0] = np.searchsorted(np.sort(owner), np.arange(spec.num_streams + 1))
    state["counters"][0] = (10_000, spec.num_slots, 0, 3)
    return state


def _infos(spec: CacheSpec, prefix: str) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(f"{prefix}.{t.name}", TYPES[t.dtype], ["b", *t.shape[1:]]) for t in spec.tensors()
    ]


def _tokens(spec: CacheSpec, group: int) -> list[onnx.ValueInfoProto]:
    shape: list[str | int | None] = ["b", "s", spec.num_kv_heads, spec.head_dim]
    wide: list[str | int | None] = ["b", "s", spec.num_kv_heads * group, spec.head_dim]
    make = helper.make_tensor_value_info
    return [
        make("query", TensorProto.FLOAT, wide),
        make("key", TensorProto.FLOAT, shape),
        make("value", TensorProto.FLOAT, shape),
        make("log_beta", TensorProto.FLOAT, shape[:3]),
        make("step_tokens", TensorProto.INT32, ["b"]),
        make("budget", TensorProto.INT32, ["b"]),
    ]


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    function: onnx.FunctionProto,
) -> bytes:
    graph = helper.make_graph(nodes, "operators", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(graph, functions=[function], ir_version=11, opset_imports=opsets)
    return bytes(model.SerializeToString())


def _attention_model(spec: CacheSpec, group: int) -> bytes:
    nodes = [
        helper.make_node(
            POOL_ATTENTION,
            ["query", "key", "value", *(f"past.{name}" for name in POOL_ATTENTION_STATE), "step_tokens"],
            [f"attended_{layer}"],
            domain=DOMAIN,
            **PoolAttentionAttributes(layer, spec.num_layers, spec.num_kv_heads, spec.head_dim**-0.5).as_dict(),
        )
        for layer in range(spec.num_layers)
    ]
    nodes.append(helper.make_node("Sum", [f"attended_{layer}" for layer in range(spec.num_layers)], ["out"]))
    wide: list[str | int | None] = ["b", "s", spec.num_kv_heads * group, spec.head_dim]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, wide)
    return _model(nodes, [*_tokens(spec, group), *_infos(spec, "past")], [out], pool_attention_function())


def _update_model(spec: CacheSpec, eviction: EvictionConfig, group: int) -> bytes:
    attributes = PoolUpdateAttributes(spec.num_layers, spec.num_kv_heads, eviction)
    names = {"attended": "query", "step_tokens": "step_tokens", "budget": "budget"}
    inputs = [
        f"past.{name}" if name in STATE_TENSORS else names.get(name, name.rsplit("_", 1)[0])
        for name in pool_update_inputs(spec.num_layers)
    ]
    outputs = [f"present.{name}" for name in STATE_TENSORS]
    node = helper.make_node(POOL_UPDATE, inputs, outputs, domain=DOMAIN, **attributes.as_dict())
    function = pool_update_function(attributes)
    return _model([node], [*_tokens(spec, group), *_infos(spec, "past")], _infos(spec, "present"), function)


def _time(
    model: bytes,
    state: dict[str, np.ndarray],
    spec: CacheSpec,
    group: int,
    library: Path | None,
    repeat: int,
    reset: int | None = None,
) -> float:
    """Median seconds of a run of one token, state bound in place; `reset`: recent tokens to go back to each time."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    feeds: dict[str, np.ndarray] = {
        "query": rng.standard_normal((1, 1, spec.num_kv_heads * group, spec.head_dim), np.float32),
        "key": rng.standard_normal((1, 1, spec.num_kv_heads, spec.head_dim), np.float32),
        "value": rng.standard_normal((1, 1, spec.num_kv_heads, spec.head_dim), np.float32),
        "log_beta": -np.exp(rng.standard_normal((1, 1, spec.num_kv_heads))).astype(np.float32),
        "step_tokens": np.ones(1, np.int32),
        "budget": np.full(1, spec.budget, np.int32),
    }
    binding = session.io_binding()
    arrays = feeds | {f"past.{name}": array for name, array in state.items()}
    for argument in session.get_inputs():
        array = arrays[argument.name]
        binding.bind_input(argument.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for argument in session.get_outputs():
        if argument.name == "out":
            binding.bind_output("out")
            continue
        array = state[argument.name.removeprefix("present.")]
        binding.bind_output(argument.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def work() -> None:
        if reset is not None:
            state["counters"][0, 2] = reset
        session.run_with_iobinding(binding)

    return median_seconds(work, repeat)


if __name__ == "__main__":
    main()
