"""A package's graph in the form that TensorRT's ONNX parser takes."""

import copy
from collections.abc import Collection, Set
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from trimkv_export.graph.builder import GraphBuilder
from trimkv_export.graph.functions.vision_attention import ATTENTION_DOMAIN, VISION_ATTENTION
from trimkv_export.graph.ops import DOMAIN, DOMAIN_VERSION, POOL_ATTENTION, POOL_UPDATE

__all__ = ["PLUGINS", "for_tensorrt", "standard_operators"]

PLUGINS = (POOL_ATTENTION, POOL_UPDATE)
ATTENTION, RMS_NORM = "Attention", "RMSNormalization"


def standard_operators(model: onnx.ModelProto) -> set[str]:
    """Names of the standard operators that a model uses, in its local functions too."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return {node.op_type for node in nodes if node.domain == ""}


def for_tensorrt(model: onnx.ModelProto, unsupported: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of `model` whose PoolAttention and PoolUpdate are plugins.

    The parser takes a plugin only where the model has no local function of that name, so their bodies are left out; the
    others stay. It reads a node's domain as the plugin's namespace from TensorRT 10.10 on only, so each node also has
    the attributes that older ones look for.

    Attention within windows, which has a mask, becomes MatMul and Softmax: there is no kernel for it (TensorRT-RTX
    1.7.1 builds no engine then).

    Args:
        model: the package's graph.
        unsupported: standard operators that this parser does not know. Those that ONNX defines by others (of opset 23,
            that is newer than TensorRT 10.3: RMSNormalization, RotaryEmbedding, Attention) are replaced by their
            definition; the rest stay.
    """
    out = copy.deepcopy(model)
    bodies = [function for function in out.functions if (function.domain, function.name) not in _keys(PLUGINS)]
    del out.functions[:]
    out.functions.extend(bodies)
    if RMS_NORM in unsupported:
        _expand_rms_norms(out)
    operators = set(unsupported) - {RMS_NORM}
    if operators or any(node.op_type == ATTENTION for node in out.graph.node):
        out = _expanded(out, operators)
    for node in out.graph.node:
        if (node.domain, node.op_type) in _keys(PLUGINS):
            for name, value in (("plugin_namespace", DOMAIN), ("plugin_version", str(DOMAIN_VERSION))):
                node.attribute.append(onnx.helper.make_attribute(name, value))
    return out


def _keys(names: Collection[str]) -> set[tuple[str, str]]:
    return {(DOMAIN, name) for name in names}


def _expand_rms_norms(model: onnx.ModelProto) -> None:
    """RMSNormalization over the last axis, in float32. ONNX's definition computes the axes, which parsers refuse."""
    nodes = []
    for node in model.graph.node:
        if node.op_type != RMS_NORM:
            nodes.append(node)
            continue
        values: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        b = GraphBuilder(f"{node.output[0]}.")
        x = b.cast(node.input[0], onnx.TensorProto.FLOAT)
        mean = b.op("ReduceMean", b.op("Mul", x, x), b.const([-1]), keepdims=1)
        root = b.op("Sqrt", b.op("Add", mean, b.const(values["epsilon"], np.float32)))
        normed = b.op("CastLike", b.op("Div", x, root), node.input[0])
        b.op("Mul", normed, node.input[1], output=node.output[0], name=node.name)
        nodes += b.nodes
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _expanded(model: onnx.ModelProto, operators: Set[str]) -> onnx.ModelProto:
    """ONNX's definitions in place of `operators`, and of Attention outside of local functions.

    They depend on types, and the inliner knows those of inputs only, in the main graph.
    """
    given = len(model.graph.input)
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    functions = [("", name) for name in sorted(operators | {ATTENTION})]
    bodies = {}
    if ATTENTION in operators:
        functions.append((ATTENTION_DOMAIN, VISION_ATTENTION))
    else:  # it stays: meanwhile its body is what has the same output, but for the values
        for function in model.functions:
            if function.name == VISION_ATTENTION:
                bodies[function.name] = copy.deepcopy(list(function.node))
                del function.node[:]
                function.node.append(onnx.helper.make_node("Identity", function.input[:1], function.output))
    out: onnx.ModelProto = onnx.inliner.inline_selected_functions(model, functions, inline_schema_functions=True)
    del out.graph.input[given:]
    for function in out.functions:
        if function.name in bodies:
            del function.node[:]
            function.node.extend(bodies[function.name])
    return out
