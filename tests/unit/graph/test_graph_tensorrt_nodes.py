"""The decoder's plugin nodes as TensorRT's ONNX parser sees them: attributes become fields, inputs plugin inputs.

With `make plugins-test TENSORRT_INCLUDE_DIR=…` each node is also given to the plugin library's own creators.
"""

import subprocess
from pathlib import Path

import onnx
import pytest
from support import ROOT
from visual_harness import visual_graph

from trimkv_export.config import EvictionConfig, Policy, Precision
from trimkv_export.graph import GateSpec, build_decoder
from trimkv_export.graph.ops import DOMAIN, DOMAIN_VERSION, POOL_ATTENTION, POOL_UPDATE
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
    """The nodes for plugins. All others of our domain must have a body that the parser can take."""
    bodies = {(function.domain, function.name) for function in model.functions}
    own = [node for node in model.graph.node if node.domain == DOMAIN]
    plugins = [node for node in own if node.op_type in (POOL_ATTENTION, POOL_UPDATE)]
    assert {(node.domain, node.op_type) for node in own if node not in plugins} <= bodies
    return plugins


def line(node: onnx.NodeProto) -> str:
    """What the probe reads for one node."""
    parts = [node.op_type, node.domain, str(DOMAIN_VERSION), str(len(node.input)), str(len(node.output))]
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        text = value.decode() if isinstance(value, bytes) else repr(value)
        parts.append(f"{attribute.name}={KINDS[attribute.type]}:{text}")
    return "\t".join(parts)


def probe(path: Path, nodes: list[onnx.NodeProto]) -> list[str]:
    library = next(path.parent / name for name in LIBRARIES if (path.parent / name).exists())
    lines = "".join(line(node) + "\n" for node in nodes)
    run = subprocess.run([path, library], input=lines, capture_output=True, text=True, check=False)
    return run.stdout.splitlines()


@pytest.fixture(params=EVICTIONS)
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return text_model(EVICTIONS[request.param])


def test_only_what_the_parser_turns_into_fields_and_inputs(model: onnx.ModelProto) -> None:
    nodes = custom_nodes(model)
    assert [node.op_type for node in nodes] == [POOL_ATTENTION] * LAYERS + [POOL_UPDATE]
    for node in nodes:
        assert all(node.input)  # no optional ones: the parser would pass null pointers
        assert all(node.output)
        assert all(attribute.type in KINDS for attribute in node.attribute)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.INT:
                assert -(2**31) <= attribute.i < 2**31  # fields are INT32
    assert {(entry.domain, entry.version) for entry in model.opset_import} >= {(DOMAIN, DOMAIN_VERSION)}


def test_no_int64_reaches_a_plugin(model: onnx.ModelProto) -> None:
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, data_prop=True)
    tensors = [*typed.graph.value_info, *typed.graph.input, *typed.graph.output]
    types = {tensor.name: tensor.type.tensor_type.elem_type for tensor in tensors}
    taken = {types.get(name) for node in custom_nodes(model) for name in node.input}
    assert taken <= {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT32}


@pytest.mark.skipif(not PROBES, reason="not built: make plugins-test TENSORRT_INCLUDE_DIR=…")
@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.parent.name)
class TestPluginLibrary:
    def test_takes_every_node(self, path: Path, model: onnx.ModelProto) -> None:
        nodes = custom_nodes(model)
        assert probe(path, nodes) == ["ok"] * len(nodes)

    def test_takes_the_nodes_of_a_model_that_sees(self, path: Path) -> None:
        nodes = custom_nodes(visual_graph().model)
        assert probe(path, nodes) == ["ok"] * len(nodes)

    def test_refuses_what_the_contract_does_not_have(self, path: Path) -> None:
        attention, *_, update = custom_nodes(text_model(EVICTIONS["global"]))
        del attention.attribute[0]
        del update.input[-1]
        extra = custom_nodes(text_model(EVICTIONS["global"]))[0]
        extra.attribute.append(onnx.helper.make_attribute("window", 3))
        renamed = custom_nodes(text_model(EVICTIONS["global"]))[0]
        renamed.domain = "other"
        found = probe(path, [attention, update, extra, renamed])
        for text, part in zip(found, ["is missing", "inputs, expected", "no field", "no creator"], strict=True):
            assert part in text
