"""A package's graph as TensorRT's ONNX parser is to get it."""

from collections.abc import Collection, Set

import onnx
import onnx.inliner

from trimkv_export.graph.functions.vision_attention import ATTENTION_DOMAIN, VISION_ATTENTION
from trimkv_export.graph.ops import DOMAIN, DOMAIN_VERSION, POOL_ATTENTION, POOL_UPDATE

__all__ = ["PLUGINS", "for_tensorrt", "standard_operators"]

PLUGINS = (POOL_ATTENTION, POOL_UPDATE)


def standard_operators(model: onnx.ModelProto) -> set[str]:
    """Names of the standard operators that a model uses, in its local functions too."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return {node.op_type for node in nodes if node.domain == ""}


def for_tensorrt(model: onnx.ModelProto, unsupported: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of `model` whose PoolAttention and PoolUpdate are plugins.

    The parser takes a plugin only where the model has no local function of that name, so their bodies are left out; the
    others stay. It reads a node's domain as the plugin's namespace from TensorRT 10.10 on only, so each node also has
    the attributes that older ones look for.

    unsupported: standard operators that this parser does not know. Those that ONNX defines by others (RMSNormalization
    and RotaryEmbedding, which came to the parser after 10.13) are replaced by their definition; the rest stay.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    bodies = [function for function in out.functions if (function.domain, function.name) not in _keys(PLUGINS)]
    del out.functions[:]
    out.functions.extend(bodies)
    if unsupported:
        out = _expanded(out, set(unsupported))
    for node in out.graph.node:
        if (node.domain, node.op_type) in _keys(PLUGINS):
            for name, value in (("plugin_namespace", DOMAIN), ("plugin_version", str(DOMAIN_VERSION))):
                node.attribute.append(onnx.helper.make_attribute(name, value))
    return out


def _keys(names: Collection[str]) -> set[tuple[str, str]]:
    return {(DOMAIN, name) for name in names}


def _expanded(model: onnx.ModelProto, operators: Set[str]) -> onnx.ModelProto:
    """ONNX's definitions in place of `operators`. They depend on types, and the inliner knows those of inputs only."""
    given = len(model.graph.input)
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    functions = [("", name) for name in sorted(operators)]
    if any(node.op_type in operators for function in model.functions for node in function.node):
        functions.append((ATTENTION_DOMAIN, VISION_ATTENTION))  # in whose body the types are not known
    out: onnx.ModelProto = onnx.inliner.inline_selected_functions(model, functions, inline_schema_functions=True)
    del out.graph.input[given:]
    return out
