"""Quantised decoders as TensorRT's ONNX parser walks them: what each node reads, its axis, blocks and types."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from trimkv_export.config import EvictionConfig, Policy, Precision, Quantization
from trimkv_export.graph import GateSpec, ModelGraph, build_decoder
from trimkv_export.graph.check import check_graph
from trimkv_export.graph.ops import DOMAIN
from trimkv_export.graph.tensorrt import PLUGINS, for_tensorrt
from trimkv_export.graph.weights import TENSOR_TYPES
from trimkv_export.models import decoder_spec

FORMATS = [Quantization(4, 64, qdq=True), Quantization(4, 128, head=False, qdq=True),
           Quantization(8, 32, per_row=True, qdq=True)]  # fmt: skip
WEIGHT_TYPE = {4: TensorProto.INT4, 8: TensorProto.INT8}
LAYERS = 2


def decoder(form: Quantization, family: str, *, tied: bool, precision: Precision = Precision.FP16) -> ModelGraph:
    config = {
        "model_type": family, "num_hidden_layers": LAYERS, "hidden_size": 128, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 50, "hidden_act": "silu",
        "tie_word_embeddings": tied, "attention_bias": False,
    }  # fmt: skip
    spec = decoder_spec(config, Path("config.json"))
    return build_decoder(spec, GateSpec("rg10", 24), EvictionConfig(Policy.GLOBAL, 8), precision, form)


def walk(model: onnx.ModelProto, form: Quantization, precision: Precision) -> set[str]:
    """Check all that TensorRT asks of weight-only quantisation; returns the names of the quantised weights.

    IDequantizeLayer (NvInfer.h): numbers are constants, scales positive (checked where they are made), of one dimension
    for a row's, and for blocks shaped like the numbers but for the one dimension, the last or the one before; a zero
    point is not needed. ONNX makes the scales' type the output's, and Gemm has one type, strongly typed.
    """
    schemas = {schema.name for schema in onnx.defs.get_all_schemas()}
    bodies = {(function.domain, function.name) for function in model.functions}
    assert {domain for domain, _ in bodies} <= {DOMAIN}
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        if node.domain == "":
            assert node.op_type in schemas
        else:
            assert node.domain == DOMAIN
            assert node.op_type in PLUGINS or (node.domain, node.op_type) in bodies
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {name for name, tensor in constants.items() if tensor.data_type in WEIGHT_TYPE.values()}
    for name in found:
        numbers = constants[name]
        assert numbers.data_type == WEIGHT_TYPE[form.bits]
        assert numbers.data_location == TensorProto.EXTERNAL
        (node,) = readers[name]
        assert (node.op_type, node.input[0], len(node.input)) == ("DequantizeLinear", name, 2)
        scales = constants[node.input[1]]
        assert scales.data_type == TENSOR_TYPES[precision.dtype]
        rows, columns = numbers.dims
        values = {attribute.name: attribute.i for attribute in node.attribute}
        if form.bits == 4:
            assert values == {"axis": 1, "block_size": form.block_size}
            assert values["block_size"] in (64, 128)
            assert list(scales.dims) == [rows, columns // form.block_size]
        else:
            assert values == {"axis": 0}
            assert list(scales.dims) == [rows]
        (product,) = readers[node.output[0]]
        assert (product.op_type, product.input[1], len(product.input)) == ("Gemm", node.output[0], 2)
        assert {attribute.name: attribute.i for attribute in product.attribute} == {"transB": 1}
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) == len(found)
    return found


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.FP32])
@pytest.mark.parametrize("unsupported", [(), ("RMSNormalization", "RotaryEmbedding")])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight(form: Quantization, precision: Precision, unsupported: tuple[str, ...], tied: bool) -> None:
    graph = decoder(form, "qwen2", tied=tied, precision=precision)
    check_graph(graph.model)
    found = walk(for_tensorrt(graph.model, unsupported), form, precision)
    assert "lm_head.qweight" in found if form.head else "lm_head.qweight" not in found
    assert len(found) == 7 * LAYERS + form.head


def test_one_matrix_for_several_projections() -> None:
    graph = decoder(FORMATS[0], "phi3", tied=False)
    assert len(walk(for_tensorrt(graph.model), FORMATS[0], Precision.FP16)) == 4 * LAYERS + 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_stays_in_float(tied: bool) -> None:
    """A lookup reads its rows alone, so nothing dequantises the table; a tied head lies beside it."""
    graph = decoder(FORMATS[0], "qwen2", tied=tied)
    (gather,) = (node for node in graph.model.graph.node if node.input[:1] == ["model.embed_tokens.weight"])
    assert gather.op_type == "Gather"
    sizes = {weight.name: weight.nbytes for weight in graph.weights}
    assert sizes["model.embed_tokens.weight"] == 50 * 128 * 2
    assert sizes["lm_head.weight"] == 50 * 128 // 2 + 50 * 2 * 2
    stored = [part for weight in graph.weights for part in weight.initializers]
    assert {part.name for part in stored} == {tensor.name for tensor in graph.model.graph.initializer}
    assert np.unique([part.name for part in stored]).size == len(stored)
