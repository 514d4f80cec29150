import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from trimkv_export.graph.builder import OPSET
from trimkv_export.graph.functions import (
    GATE_FUNCTIONS,
    GATE_WEIGHTS,
    LOG_SIGMOID,
    log_sigmoid_function,
    retention_gate_function,
)
from trimkv_export.graph.ops import DOMAIN

Array = NDArray[np.float32]
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


def run_gate(kind: str, act: str, x: Array, weights: dict[str, Array], dtype: str = "float32") -> Array:
    """log_beta [rows, H] of ONNX Runtime; the gate's own bias stays float32."""
    types = {name: "float32" if name == "bias" else dtype for name in GATE_WEIGHTS[kind]}
    feed = {name.replace(".", "_"): weights[name].astype(types[name]) for name in GATE_WEIGHTS[kind]}
    feed = {"x": x.astype(dtype)} | feed
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feed.items()
    ]
    output = helper.make_tensor_value_info("log_beta", onnx.TensorProto.FLOAT, ["rows", "heads"])
    nodes = [
        helper.make_node(GATE_FUNCTIONS[kind], list(feed), ["z"], domain=DOMAIN),
        helper.make_node(LOG_SIGMOID, ["z"], ["log_beta"], domain=DOMAIN),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "gate", inputs, [output]),
        functions=[retention_gate_function(kind, act), log_sigmoid_function()],
        ir_version=11,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
    )
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, feed)[0]
    return found


def test_small_and_large_logits_keep_their_precision() -> None:
    z = np.concatenate([np.linspace(-60, 60, 24001), [-88.0, -0.0, 0.0, 1e-7, 80.0]]).astype(np.float32)
    # relu(z) - relu(-z) is z, without rounding.
    weights: dict[str, Array] = {
        "linear1.weight": np.array([[1], [-1]], np.float32),
        "linear1.bias": np.zeros(2, np.float32),
        "linear2.weight": np.array([[1, -1]], np.float32),
        "bias": np.zeros(1, np.float32),
    }
    log_beta = run_gate("rg", "relu", z[:, None], weights)[:, 0]
    exact = -np.logaddexp(0, -z.astype(np.float64))
    matters = abs(exact) > 1e-30
    assert (abs(log_beta[matters] / exact[matters] - 1) < 3e-6).all()
    assert (log_beta <= 0).all()
    assert (np.diff(log_beta[:24001]) >= 0).all()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("kind", GATE_WEIGHTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float16", 4e-3)])
def test_equals_torch(kind: str, act: str, dtype: str, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, inner, heads = 12, 8, 3
    shapes = {"linear1.weight": (inner, hidden), "linear1.bias": (inner,), "bias": (heads,)}
    if kind == "rg":
        shapes["linear2.weight"] = (heads, inner)
    else:
        shapes |= {"linear2.weight": (inner, inner), "linear2.bias": (inner,), "linear3.weight": (heads, inner)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    x = torch.randn(20, hidden, generator=generator)
    linear, activate = torch.nn.functional.linear, ACTIVATIONS[act]
    value = activate(linear(x, weights["linear1.weight"], weights["linear1.bias"]))
    if kind == "rg10":
        value = activate(linear(value, weights["linear2.weight"], weights["linear2.bias"]))
    last = weights["linear2.weight" if kind == "rg" else "linear3.weight"]
    expected = torch.nn.functional.logsigmoid(linear(value, last) + weights["bias"]).numpy()
    found = run_gate(kind, act, x.numpy(), {name: weight.numpy() for name, weight in weights.items()}, dtype)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=tolerance * 5, atol=tolerance * max(1, abs(expected).max()))
