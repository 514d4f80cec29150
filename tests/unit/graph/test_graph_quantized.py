"""The contributed operators for quantised weights: ONNX Runtime's kernels, the bodies, and the formula agree."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from trimkv_export.config import FLOATS, EvictionConfig, Policy, Precision, Quantization
from trimkv_export.engine.quantize import quantize
from trimkv_export.errors import OptionError
from trimkv_export.graph import GateSpec, ModelGraph, build_decoder
from trimkv_export.graph.builder import OPSET
from trimkv_export.graph.check import check_graph
from trimkv_export.graph.functions import GATHER_BLOCKS, MATMUL_BLOCKS, QUANTIZED_DOMAIN, quantized_functions
from trimkv_export.graph.weights import Weight
from trimkv_export.models import decoder_spec

FORMATS = [
    Quantization(4, 32), Quantization(4, 64, symmetric=False), Quantization(4, 32, symmetric=False),
    Quantization(8, 32, per_row=True), Quantization(8, 64, symmetric=False),
]  # fmt: skip
ROWS, COLUMNS = 10, 192  # six blocks of 32; three of 64, whose zero points leave half a byte


def run(kind: str, form: Quantization, inputs: dict[str, Any], *, own_kernel: bool) -> np.ndarray:
    """One node on a quantised matrix, by ONNX Runtime's kernel or by the body under another name."""
    matrix = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    parts = quantize(matrix, form, np.dtype(np.float32))
    blocks = kind == MATMUL_BLOCKS
    weight = Weight("m.weight", matrix.shape, "float32", form, as_blocks=blocks, as_rows=not blocks)
    function = next(f for f in quantized_functions(form, TensorProto.FLOAT) if f.name == kind)
    attributes: dict[str, Any] = {"bits": form.bits, "block_size": form.block_size}
    if kind == MATMUL_BLOCKS:
        names = ["x", *weight.inputs("qweight")]
        attributes |= {"K": COLUMNS, "N": ROWS, "accuracy_level": 0}
    else:
        numbers, *small = weight.inputs("qweight_rows")
        names = [numbers, "x", *small]
        attributes |= {"gather_axis": 0, "quantize_axis": 1}
    if not own_kernel:
        function.name += "Body"
    node = onnx.helper.make_node(function.name, names, ["y"], domain=QUANTIZED_DOMAIN, **attributes)
    initializers = [
        onnx.numpy_helper.from_array(parts[part.stored.removeprefix("m.")].reshape(part.shape), part.name)
        for part in weight.initializers
    ]
    element = TensorProto.FLOAT if kind == MATMUL_BLOCKS else TensorProto.INT64
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [info("x", element, None)], [info("y", TensorProto.FLOAT, None)], initializer=initializers
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(QUANTIZED_DOMAIN, 1)]
    model = onnx.helper.make_model(
        graph, functions=[] if own_kernel else [function], opset_imports=opsets, ir_version=11
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found: np.ndarray = session.run(None, inputs)[0]
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_products(form: Quantization) -> None:
    x = np.random.default_rng(1).standard_normal((3, COLUMNS)).astype(np.float32)
    kernel = run(MATMUL_BLOCKS, form, {"x": x}, own_kernel=True)
    np.testing.assert_allclose(run(MATMUL_BLOCKS, form, {"x": x}, own_kernel=False), kernel, atol=2e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_rows(form: Quantization) -> None:
    index = np.array([7, 0, 7])
    kernel = run(GATHER_BLOCKS, form, {"x": index}, own_kernel=True)
    np.testing.assert_allclose(run(GATHER_BLOCKS, form, {"x": index}, own_kernel=False), kernel, atol=1e-6)
    identity = np.eye(COLUMNS, dtype=np.float32)
    matrix = run(MATMUL_BLOCKS, form, {"x": identity}, own_kernel=True).T
    np.testing.assert_allclose(kernel, matrix[index], atol=1e-6)


def decoder(form: Quantization | None, *, hidden: int = 64, tied: bool = True, dtype: str = "fp32") -> ModelGraph:
    config = {
        "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": hidden, "intermediate_size": 192,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 50, "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }  # fmt: skip
    spec = decoder_spec(config, Path("config.json"))
    return build_decoder(spec, GateSpec("rg10", 24), EvictionConfig(Policy.GLOBAL, 8), Precision(dtype), form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tied", [True, False])
def test_graphs_are_valid(form: Quantization, dtype: str, tied: bool) -> None:
    check_graph(decoder(form, tied=tied, dtype=dtype).model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_what_is_quantised(tied: bool, head: bool) -> None:
    graph = decoder(Quantization(4, 32, head=head), tied=tied)
    plain = {weight.name for weight in graph.weights if weight.quantization is None}
    floats = {weight.name for weight in decoder(None, tied=tied).weights}
    assert floats == {weight.name for weight in graph.weights}
    ends = {"model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])}
    linear = {name for name in floats if name.endswith("_proj.weight")} | (ends if head else set())
    assert floats - plain == linear
    assert {node.op_type for node in graph.model.graph.node if node.domain == QUANTIZED_DOMAIN} == (
        {MATMUL_BLOCKS, GATHER_BLOCKS} if head else {MATMUL_BLOCKS}
    )


def test_a_tied_matrix_is_stored_once() -> None:
    graph = decoder(Quantization(4, 32))
    embedding = next(weight for weight in graph.weights if weight.name == "model.embed_tokens.weight")
    assert {part.name: part.stored for part in embedding.initializers} == {
        "model.embed_tokens.qweight": "model.embed_tokens.qweight",
        "model.embed_tokens.qweight_rows": "model.embed_tokens.qweight",
        "model.embed_tokens.scales": "model.embed_tokens.scales",
    }
    assert embedding.nbytes == 50 * 64 // 2 + 50 * 2 * 4


def test_columns_that_do_not_divide_into_blocks() -> None:
    said = r"model.layers.0.self_attn.q_proj.weight has 48 columns, which do not divide into blocks of 32"
    with pytest.raises(OptionError, match=said):
        decoder(Quantization(4, 32, head=False), hidden=48)
