"""The decoder's plugin nodes as TensorRT's ONNX parser sees them: attributes become fields, inputs plugin inputs.

With `make plugins-test TENSORRT_INCLUDE_DIR=…` each node is also given to the plugin library's own creators.
"""

import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
from support import ROOT
from visual_harness import visual_graph

from trimkv_export.config import EvictionConfig, Policy, Precision
from trimkv_export.graph import GateSpec, build_decoder
from trimkv_export.graph.ops import DOMAIN, DOMAIN_VERSION, POOL_ATTENTION, POOL_UPDATE
from trimkv_export.graph.tensorrt import for_tensorrt
from trimkv_export.models import decoder_spec

# Builds of the plugins: a probe, and the library beside it.
PROBES = sorted((ROOT / "build").glob("*/trimkv_plugin_probe"))
LIBRARIES = ("libtrimkv_plugin_emulated.so", "libtrimkv_plugin.so")
LAYERS = 3
KINDS = {onnx.AttributeProto.INT: "i", onnx.AttributeProto.FLOAT: "f", onnx.AttributeProto.STRING: "s"}
EVICTIONS = {
    "global": EvictionConfig(Policy.GLOBAL, 8, 4),
    "per_head": EvictionConfig(Policy.PER_HEAD, 8, 4),
    "all options": EvictionConfig(Policy.GLOBAL, 8, 4, 2, 5),
}


def text_model(eviction: EvictionConfig) -> onnx.ModelProto:
    config = {
        "model_type": "qwen3", "num_hidden_layers": LAYERS, "hidden_size": 24, "intermediate_size": 40,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "vocab_size": 50, "hidden_act": "silu",
        "tie_word_embeddings": True, "attention_bias": False,
    }  # fmt: skip
    spec = decoder_spec(config, Path("config.json"))
    return build_decoder(spec, GateSpec("rg10", 6), eviction, Precision.FP16).model


def custom_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that the parser makes plugins of: neither standard operators nor local functions of the model."""
    bodies = {(function.domain, function.name) for function in model.functions}
    for function in model.functions:  # which the parser puts in place of its nodes
        assert all(node.domain == "" for node in function.node)
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    return [
        node
        for node in model.graph.node
        if (node.domain, node.op_type) not in bodies and not (node.domain == "" and node.op_type in known)
    ]


def fields(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes by name, as Python's values."""
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def line(node: onnx.NodeProto) -> str:
    """What the probe reads for one node: as TensorRT 10.3, which looks at the domain not at all."""
    values = fields(node)
    name, version = values["plugin_namespace"], values["plugin_version"]
    parts = [node.op_type, name, version, str(len(node.input)), str(len(node.output))]
    for attribute in node.attribute:
        if attribute.name not in ("plugin_namespace", "plugin_version"):
            value = values[attribute.name]
            text = value if isinstance(value, str) else repr(value)
            parts.append(f"{attribute.name}={KINDS[attribute.type]}:{text}")
    return "\t".join(parts)


def probe(path: Path, nodes: list[onnx.NodeProto]) -> list[str]:
    library = next(path.parent / name for name in LIBRARIES if (path.parent / name).exists())
    lines = "".join(line(node) + "\n" for node in nodes)
    run = subprocess.run([path, library], input=lines, capture_output=True, text=True, check=False)
    return run.stdout.splitlines()


@pytest.fixture(params=EVICTIONS)
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return for_tensorrt(text_model(EVICTIONS[request.param]))


def test_the_graph_itself_stays_as_it_is() -> None:
    whole = visual_graph().model
    before = whole.SerializeToString(deterministic=True)
    for_tensorrt(whole, {"RMSNormalization"})
    assert whole.SerializeToString(deterministic=True) == before


def test_only_what_the_parser_turns_into_fields_and_inputs(model: onnx.ModelProto) -> None:
    nodes = custom_nodes(model)
    assert [node.op_type for node in nodes] == [POOL_ATTENTION] * LAYERS + [POOL_UPDATE]
    for node in nodes:
        assert all(node.input)  # no optional ones: the parser would pass null pointers
        assert all(node.output)
        assert all(attribute.type in KINDS for attribute in node.attribute)
        assert node.domain == fields(node)["plugin_namespace"]  # newer parsers take the one, older the other
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.INT:
                assert -(2**31) <= attribute.i < 2**31  # fields are INT32
    assert {(entry.domain, entry.version) for entry in model.opset_import} >= {(DOMAIN, DOMAIN_VERSION)}


def test_no_int64_reaches_a_plugin() -> None:
    whole = text_model(EVICTIONS["global"])
    typed = onnx.shape_inference.infer_shapes(whole, check_type=True, data_prop=True)
    tensors = [*typed.graph.value_info, *typed.graph.input, *typed.graph.output]
    types = {tensor.name: tensor.type.tensor_type.elem_type for tensor in tensors}
    taken = {types.get(name) for node in custom_nodes(for_tensorrt(whole)) for name in node.input}
    assert taken <= {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT32}


@pytest.mark.skipif(not PROBES, reason="not built: make plugins-test TENSORRT_INCLUDE_DIR=…")
@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.parent.name)
class TestPluginLibrary:
    def test_takes_every_node(self, path: Path, model: onnx.ModelProto) -> None:
        nodes = custom_nodes(model)
        assert probe(path, nodes) == ["ok"] * len(nodes)

    def test_takes_the_nodes_of_a_model_that_sees(self, path: Path) -> None:
        nodes = custom_nodes(for_tensorrt(visual_graph().model, {"RMSNormalization", "RotaryEmbedding"}))
        assert probe(path, nodes) == ["ok"] * len(nodes)

    def test_refuses_what_the_contract_does_not_have(self, path: Path) -> None:
        attention, *_, update = custom_nodes(for_tensorrt(text_model(EVICTIONS["global"])))
        del attention.attribute[0]
        del update.input[-1]
        extra = custom_nodes(for_tensorrt(text_model(EVICTIONS["global"])))[0]
        extra.attribute.append(onnx.helper.make_attribute("window", 3))
        renamed = custom_nodes(for_tensorrt(text_model(EVICTIONS["global"])))[0]
        renamed.op_type = "PoolDetention"
        found = probe(path, [attention, update, extra, renamed])
        for text, part in zip(found, ["is missing", "inputs, expected", "no field", "no creator"], strict=True):
            assert part in text
