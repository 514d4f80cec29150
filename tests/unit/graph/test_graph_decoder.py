"""The decoder graph: valid, and named after the checkpoint."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from support import shipped_config
from visual_harness import visual_graph

from trimkv_export.checkpoint import ALIASES, read_gate_config
from trimkv_export.config import FLOATS, EvictionConfig, Policy, Precision
from trimkv_export.graph import GateSpec, ModelGraph, build_decoder, cache_spec
from trimkv_export.graph.check import check_graph
from trimkv_export.models import DecoderSpec, decoder_spec
from trimkv_export.policy import STATE_TENSORS

EVICTION = EvictionConfig(Policy.GLOBAL, 8, 4)
TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
LAYERS, INNER = 3, 6
PARTS = {
    "rg": {"bias", "linear1.weight", "linear1.bias", "linear2.weight"},
    "rg10": {"bias", "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"},
}


def spec(*, tied: bool = False, bias: bool = False) -> DecoderSpec:
    config = {
        "model_type": "qwen3", "num_hidden_layers": LAYERS, "hidden_size": 24, "intermediate_size": 40,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "vocab_size": 50, "hidden_act": "silu",
        "tie_word_embeddings": tied, "attention_bias": bias,
    }  # fmt: skip
    return decoder_spec(config, Path("config.json"))


def decoder(kind: str = "rg10", precision: str = "fp32", *, tied: bool = False, bias: bool = False) -> ModelGraph:
    return build_decoder(spec(tied=tied, bias=bias), GateSpec(kind, INNER), EVICTION, Precision(precision))


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("tied", [True, False])
def test_checker_and_strict_shape_inference_pass(kind: str, precision: str, tied: bool) -> None:
    graph = decoder(kind, precision, tied=tied, bias=tied)
    check_graph(graph.model)
    model = onnx.shape_inference.infer_shapes(graph.model, check_type=True, strict_mode=True, data_prop=True)
    stored = {tensor.data_type for tensor in model.graph.initializer if not tensor.name.endswith("retention_gate.bias")}
    assert stored == {TYPES[precision]}


def test_check_graph_refuses_a_bad_graph() -> None:
    model = decoder().model
    model.graph.node[-1].input[0] = "nothing"
    with pytest.raises(onnx.checker.ValidationError, match="nothing"):
        check_graph(model)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_initialisers_are_the_checkpoint(kind: str, tied: bool, bias: bool) -> None:
    graph, model = decoder(kind, tied=tied, bias=bias), spec(tied=tied, bias=bias)
    gates = {f"model.layers.{n}.self_attn.retention_gate.{part}" for n in range(LAYERS) for part in PARTS[kind]}
    if kind == "rg10":
        gates.add(f"model.layers.{LAYERS - 1}.self_attn.retention_gate.linear3.weight")
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}
    assert set(found) == set(model.tensors()) | gates
    assert {name: found[name] for name in model.tensors()} == model.tensors()
    assert {weight.name: weight.shape for weight in graph.weights} == found
    for tensor in graph.model.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.EXTERNAL
        assert not tensor.raw_data
    assert graph.model.ByteSize() < 200_000


def test_a_tied_head_is_the_embedding() -> None:
    nodes = {node.name: node for node in decoder(tied=True).model.graph.node}
    assert nodes["lm_head"].input[1] == nodes["model.embed_tokens"].input[0] == "model.embed_tokens.weight"
    assert {node.op_type for node in nodes.values() if "model.embed_tokens.weight" in node.input} == {"Gather", "Gemm"}
    assert nodes["lm_head"].attribute[0].name == "transB"


def test_all_rg10_gates_share_linear3() -> None:
    gates = [node for node in decoder("rg10").model.graph.node if node.op_type == "RetentionGate10"]
    assert len(gates) == LAYERS
    assert {node.input[5] for node in gates} == {"model.layers.2.self_attn.retention_gate.linear3.weight"}
    assert len({node.input[1] for node in gates}) == LAYERS


def test_nodes_are_named_after_modules() -> None:
    graph = decoder(bias=True).model.graph
    names = {node.name for node in graph.node}
    assert len(names) == len(graph.node)
    modules = {"model.embed_tokens", "model.norm", "lm_head", "pool_update"}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        modules |= {f"{path}.{name}" for name in ("input_layernorm", "post_attention_layernorm")}
        modules |= {f"{path}.mlp.{name}_proj" for name in ("gate", "up", "down")}
        modules |= {f"{path}.self_attn.{name}" for name in ("q_norm", "k_norm", "retention_gate", "pool_attention")}
        modules |= {f"{path}.self_attn.{name}_proj" for name in "qkvo"}
    assert modules <= names
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for name in weights & set(node.input):
            owner = name.rsplit(".", 2 if "linear" in name else 1)[0]
            shared = "linear3" in name and node.name.endswith("retention_gate")
            assert shared or node.name == owner


@pytest.mark.parametrize("precision", FLOATS)
def test_inputs_and_outputs(precision: str) -> None:
    graph = decoder(precision=precision).model.graph
    cache = cache_spec(spec(), EVICTION, Precision(precision))
    kinds = {"float32": 1, "float16": 10, "bfloat16": 16, "int32": 6}

    def describe(value: onnx.ValueInfoProto) -> tuple[str, int, list[object]]:
        kind = value.type.tensor_type
        return value.name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]

    state = [(tensor.name, kinds[tensor.dtype], ["batch", *tensor.shape[1:]]) for tensor in cache.tensors()]
    assert [describe(value) for value in graph.input] == [
        ("input_ids", 7, ["batch", "step"]),
        ("position_ids", 7, ["batch", "step"]),
        ("step_tokens", 6, ["batch"]),
        ("budget", 6, ["batch"]),
        *((f"past.{name}", kind, shape) for name, kind, shape in state),
    ]
    assert [describe(value) for value in graph.output] == [
        ("logits", 1, ["batch", 50]),
        *((f"present.{name}", kind, shape) for name, kind, shape in state),
    ]


def test_the_state_has_one_writer_that_depends_on_the_last_reader() -> None:
    graph = decoder().model.graph
    readers = [node for node in graph.node if any(name.startswith("past.") for name in node.input)]
    assert Counter(node.op_type for node in readers) == {"PoolAttention": LAYERS, "PoolUpdate": 1}
    writer = graph.node[-1]
    assert list(writer.output) == [f"present.{name}" for name in STATE_TENSORS]
    assert readers[LAYERS - 1].output[0] in writer.input


@pytest.mark.parametrize(
    ("eviction", "expected"),
    [
        (EvictionConfig(Policy.GLOBAL, 8, 4, 2, 5), (4, "global", 2, 5)),
        (EvictionConfig(Policy.PER_HEAD, 8, 1), (1, "per_head", 0, 1)),
    ],
)
def test_the_policy_is_in_the_graph(eviction: EvictionConfig, expected: tuple[object, ...]) -> None:
    model = build_decoder(spec(), GateSpec("rg", INNER), eviction, Precision.FP32).model
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[-1].attribute}
    names = ("evict_every", "policy", "min_tokens_per_head", "lookahead_steps")
    found = [attributes[name] for name in names]
    assert [value.decode() if isinstance(value, bytes) else value for value in found] == list(expected)
    assert (attributes["num_layers"], attributes["num_kv_heads"]) == (3, 3)


def test_versions_that_engines_read() -> None:
    model = decoder().model
    assert model.ir_version == 11
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 23), ("trimkv", 1)}


# Operators whose CUDA kernels take these inputs on the host.
HOST_INPUTS = {"Reshape": {1}, "Range": {0, 1, 2}, "Expand": {1}}


@pytest.mark.parametrize("build", [decoder, visual_graph], ids=["text", "visual"])
@pytest.mark.parametrize("kind", PARTS)
def test_no_dimension_is_copied_to_the_device(kind: str, build: Callable[[str], ModelGraph]) -> None:
    """A CUDA graph holds no such copy: what comes from Shape stays on the host, or goes where kernels read it there."""
    graph = build(kind).model.graph
    fixed = {tensor.name for tensor in graph.initializer}
    fixed |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    host: set[str] = set()
    for node in graph.node:
        if node.op_type == "Shape":
            host.update(node.output)
            continue
        read_on_host = HOST_INPUTS.get(node.op_type, set())
        from_host = {index for index, name in enumerate(node.input) if name in host}
        if from_host <= read_on_host:
            continue
        # Arithmetic on dimensions alone; ONNX Runtime leaves it on the host.
        assert all(name in host or name in fixed for name in node.input), node
        host.update(node.output)
    assert host


@pytest.mark.parametrize("name", ALIASES)
def test_full_size_graph_of_an_alias(name: str) -> None:
    backbone, gates = shipped_config(name)
    gate, model = read_gate_config(Path(name), gates, 512), decoder_spec(backbone, Path(name))
    eviction = EvictionConfig(Policy(gate.policy), 1, 32)
    graph = build_decoder(model, GateSpec(gate.kind, gate.intermediate_size), eviction, Precision.FP16)
    check_graph(graph.model)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}
    assert shapes == {weight.name: weight.shape for weight in graph.weights}
    assert model.tensors().items() <= shapes.items()
    assert graph.model.ByteSize() < 400_000
