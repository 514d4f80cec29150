"""The operators for quantised weights: kernels, the bodies, and the formula agree."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from trimkv_export.backends.native import QUANTIZED_LINEAR_ENTRY, find_library
from trimkv_export.config import FLOATS, EvictionConfig, Policy, Precision, Quantization
from trimkv_export.errors import OptionError
from trimkv_export.graph import GateSpec, ModelGraph, build_decoder
from trimkv_export.graph.builder import OPSET
from trimkv_export.graph.check import check_graph
from trimkv_export.graph.functions import (
    MATMUL_BLOCKS,
    QUANTIZED_DOMAIN,
    QUANTIZED_EMBEDDING,
    QUANTIZED_LINEAR,
    quantized_functions,
)
from trimkv_export.graph.ops import DOMAIN
from trimkv_export.graph.weights import Weight
from trimkv_export.models import decoder_spec
from trimkv_export.quantization.rounding import quantize

FORMATS = [
    Quantization(4, 32), Quantization(4, 64, symmetric=False), Quantization(4, 32, symmetric=False),
    Quantization(8, 32, per_row=True), Quantization(8, 64, symmetric=False),
]  # fmt: skip
FLOAT = TensorProto.FLOAT
ROWS, COLUMNS = 10, 192  # six blocks of 32; three of 64, whose zero points leave half a byte


def matrix(form: Quantization, count: int = 1, scales: str = "float32") -> tuple[list[str], list[onnx.TensorProto]]:
    """A node's inputs of `count` random matrices, and their parts."""
    names, parts = [], []
    for number in range(count):
        values = np.random.default_rng(number).standard_normal((ROWS + number, COLUMNS)).astype(np.float32)
        stored = quantize(values, form, np.dtype(scales))
        weight = Weight(f"m{number}.weight", values.shape, scales, form)
        names += weight.inputs
        for part in weight.initializers:
            found = stored[part.name.removeprefix(f"m{number}.")].reshape(part.shape)
            parts.append(onnx.numpy_helper.from_array(found, part.name))
    return names, parts


def numbers(form: Quantization, scales: str = "float32") -> np.ndarray:
    """What the parts of the first matrix stand for, by the formula."""
    found = {part.name: onnx.numpy_helper.to_array(part) for part in matrix(form, scales=scales)[1]}
    packed, blocks = found["m0.qweight"], COLUMNS // form.block_size

    def each(values: np.ndarray) -> np.ndarray:
        values = values.reshape(ROWS, -1)
        return values if form.bits == 8 else np.stack([values & 15, values >> 4], axis=-1).reshape(ROWS, -1)

    zero = each(found["m0.qzeros"])[:, :blocks, None].astype(int) if "m0.qzeros" in found else 1 << (form.bits - 1)
    scale = found["m0.scales"].astype(np.float64)[..., None]
    return ((each(packed).reshape(ROWS, blocks, -1).astype(int) - zero) * scale).reshape(ROWS, COLUMNS)


def run(
    node: onnx.NodeProto,
    parts: list[onnx.TensorProto],
    functions: list[onnx.FunctionProto],
    x: np.ndarray,
    library: Path | None = None,
) -> list[np.ndarray]:
    """One node of input x."""
    info = onnx.helper.make_tensor_value_info
    element = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    outputs = [info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = onnx.helper.make_graph([node], "g", [info("x", element, [None] * x.ndim)], outputs, initializer=parts)
    opsets = [
        onnx.helper.make_opsetid(name, version) for name, version in (("", OPSET), (QUANTIZED_DOMAIN, 1), (DOMAIN, 1))
    ]
    model = onnx.helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.add_session_config_entry(QUANTIZED_LINEAR_ENTRY, "1")
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found: list[np.ndarray] = session.run(None, {"x": x})
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_products(form: Quantization) -> None:
    """ONNX Runtime's kernel for MatMulNBits and the body under another name."""
    x = np.random.default_rng(1).standard_normal((3, COLUMNS)).astype(np.float32)
    names, parts = matrix(form)
    body = next(f for f in quantized_functions(form, form, FLOAT, FLOAT) if f.name == MATMUL_BLOCKS)
    body.name += "Body"
    sizes: dict[str, Any] = {"bits": form.bits, "block_size": form.block_size, "K": COLUMNS, "N": ROWS}
    kernel, by_body = (
        run(
            onnx.helper.make_node(name, ["x", *names], ["y"], domain=QUANTIZED_DOMAIN, accuracy_level=0, **sizes),
            parts, functions, x,
        )[0]
        for name, functions in ((MATMUL_BLOCKS, []), (body.name, [body]))
    )  # fmt: skip
    np.testing.assert_allclose(by_body, kernel, atol=2e-5)
    np.testing.assert_allclose(by_body, x @ numbers(form).T, atol=2e-5)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scales", ["float32", "float16"])
@pytest.mark.parametrize("native", [False, True])
def test_linear(form: Quantization, count: int, scales: str, native: bool) -> None:
    """With inputs that rounding to int8 leaves alone."""
    library = find_library() if native else None
    if native and library is None:
        pytest.skip("the native library was not built")
    x = np.random.default_rng(1).integers(-127, 128, (5, COLUMNS)).astype(np.float32)
    x[:, ::32] = 127
    names, parts = matrix(form, count, scales)
    sizes: dict[str, Any] = {f"N_{number}": ROWS + number for number in range(count)}
    node = onnx.helper.make_node(
        QUANTIZED_LINEAR[count - 1], ["x", *names], [f"y{number}" for number in range(count)], domain=DOMAIN,
        K=COLUMNS, bits=form.bits, block_size=form.block_size, **sizes,
    )  # fmt: skip
    stored = TensorProto.FLOAT16 if scales == "float16" else FLOAT
    found = run(node, parts, quantized_functions(form, form, FLOAT, stored), x, library)
    assert [part.shape for part in found] == [(5, ROWS + number) for number in range(count)]
    np.testing.assert_allclose(found[0], x @ numbers(form, scales).T, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scales", ["float32", "float16"])
def test_rows(form: Quantization, scales: str) -> None:
    names, parts = matrix(form, scales=scales)
    index = np.array([7, 0, 7])
    stored = TensorProto.FLOAT16 if scales == "float16" else FLOAT
    node = onnx.helper.make_node(QUANTIZED_EMBEDDING, ["x", *names], ["y"], domain=DOMAIN)
    found = run(node, parts, quantized_functions(form, form, FLOAT, stored), index)[0]
    np.testing.assert_allclose(found, numbers(form, scales)[index], rtol=1e-6, atol=1e-7)


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
    ours = {QUANTIZED_EMBEDDING, *QUANTIZED_LINEAR}
    kinds = {node.op_type for node in graph.model.graph.node} & ours
    assert kinds == (ours if head else ours - {QUANTIZED_EMBEDDING})
    # Bodies are there of what is used, and of what these use.
    assert {f.name for f in graph.model.functions} & {*ours, MATMUL_BLOCKS} == kinds | {MATMUL_BLOCKS}


def test_a_tied_matrix_is_stored_once() -> None:
    graph = decoder(Quantization(4, 32))
    embedding = next(weight for weight in graph.weights if weight.name == "model.embed_tokens.weight")
    assert embedding.inputs == ["model.embed_tokens.qweight", "model.embed_tokens.scales"]
    assert embedding.nbytes == 50 * 64 // 2 + 50 * 2 * 4


def test_columns_that_do_not_divide_into_blocks() -> None:
    said = r"model.layers.0.self_attn.q_proj.weight has 48 columns, which do not divide into blocks of 32"
    with pytest.raises(OptionError, match=said):
        decoder(Quantization(4, 32, head=False), hidden=48)
