"""The retention gates as model-local functions: rg (TrimKV) and rg10 (DBTrimKV), and the log-sigmoid that ends them."""

import numpy as np
import onnx
from onnx import TensorProto

from trimkv_export.graph.builder import GraphBuilder
from trimkv_export.graph.ops import DOMAIN

__all__ = ["GATE_FUNCTIONS", "GATE_WEIGHTS", "LOG_SIGMOID", "log_sigmoid_function", "retention_gate_function"]

GATE_FUNCTIONS = {"rg": "RetentionGate", "rg10": "RetentionGate10"}
GATE_WEIGHTS = {
    "rg": ("linear1.weight", "linear1.bias", "linear2.weight", "bias"),
    "rg10": ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "linear3.weight", "bias"),
}
# Of all layers together: a step of one token is otherwise a dozen tiny nodes for each layer.
LOG_SIGMOID = "LogSigmoid"


def retention_gate_function(kind: str, hidden_act: str) -> onnx.FunctionProto:
    """x [rows, d] and the gate's weights -> z [rows, H] float32, of which log β is the log-sigmoid.

    The formula is in docs/design.md, section 3. The last addition is float32.
    """
    b = GraphBuilder()
    names = {weight: weight.replace(".", "_") for weight in GATE_WEIGHTS[kind]}
    hidden = b.activation(b.linear("x", names["linear1.weight"], names["linear1.bias"]), hidden_act)
    if kind == "rg10":
        hidden = b.activation(b.linear(hidden, names["linear2.weight"], names["linear2.bias"]), hidden_act)
    last = names["linear3.weight" if kind == "rg10" else "linear2.weight"]
    b.op("Add", b.cast(b.linear(hidden, last), TensorProto.FLOAT), names["bias"], output="z")
    return b.function(DOMAIN, GATE_FUNCTIONS[kind], ["x", *names.values()], ["z"])


def log_sigmoid_function() -> onnx.FunctionProto:
    """z -> log_beta, both float32 of any one shape; at most 0.

    logsigmoid(z) = min(z, 0) − log1p(e), e = exp(−|z|). ONNX has no log1p, and does not promise that Softplus is exact
    for the small values that good gates give (log β around −1e-6), so log1p(e) is taken as e · log(u) / (u − 1) with
    u = 1 + e rounded (Kahan), and as e where u is 1: the same on every runtime.
    """
    b = GraphBuilder()
    zero, one = b.const(0, np.float32), b.const(1, np.float32)
    e = b.op("Exp", b.op("Neg", b.op("Abs", "z")))
    u = b.op("Add", one, e)
    excess = b.op("Sub", u, one)
    rounded_away = b.op("Equal", excess, zero)
    ratio = b.op("Div", b.op("Log", u), b.op("Where", rounded_away, one, excess))
    log1p = b.op("Where", rounded_away, e, b.op("Mul", e, ratio))
    b.op("Sub", b.op("Min", "z", zero), log1p, output="log_beta")
    return b.function(DOMAIN, LOG_SIGMOID, ["z"], ["log_beta"])
