"""An existing decoder graph under another eviction policy, or with other kernels."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from trimkv_export.config import EvictionConfig
from trimkv_export.graph.functions import pool_update_function
from trimkv_export.graph.functions.quantized import MATMUL_BLOCKS, QUANTIZED_DOMAIN, QUANTIZED_LINEAR
from trimkv_export.graph.ops import DOMAIN, POOL_UPDATE, PoolUpdateAttributes
from trimkv_export.policy import CacheSpec

__all__ = ["decoder_with_eviction", "decoder_with_exact_inputs"]


def decoder_with_eviction(
    file: Path,
    cache: CacheSpec,
    eviction: EvictionConfig,
    metadata: Mapping[str, str],
    log_betas: NDArray[np.float32] | None = None,
    *,
    by_axis: bool = False,
) -> bytes:
    """The serialised decoder graph of `file` with another eviction policy; its weights stay where they are.

    Args:
        file: the graph.
        cache: the cache that the new policy needs.
        eviction: the new policy.
        metadata: the graph's properties, in place of those it has.
        log_betas: log-retentions [L·H, positions] in place of those of the gates; None keeps the gates.
        by_axis: whether positions have three axes, all the same for text.
    """
    model = onnx.load(str(file), load_external_data=False)
    onnx.helper.set_model_props(model, dict(metadata))
    _resize_state(model.graph, cache)
    attributes = PoolUpdateAttributes(cache.num_layers, cache.num_kv_heads, eviction)
    (body,) = (body for body in model.functions if (body.domain, body.name) == (DOMAIN, POOL_UPDATE))
    body.CopyFrom(pool_update_function(attributes))
    (update,) = (node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, POOL_UPDATE))
    del update.attribute[:]
    update.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.as_dict().items())
    if log_betas is not None:
        tables = log_betas.reshape(cache.num_layers, cache.num_kv_heads, -1)
        nodes = _look_up(model.graph, tables, by_axis=by_axis)
        del update.input[-len(tables) :]
        update.input.extend(node.output[0] for node in nodes[-len(tables) :])
        # Before what reads them.
        following = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *following])
    return bytes(model.SerializeToString(deterministic=True))


def decoder_with_exact_inputs(file: Path) -> bytes:
    """The serialised decoder graph of `file`, whose quantised matrices take their inputs as they are.

    Else kernels for CPUs round them to int8. ONNX Runtime's does not at the accuracy level 0, and the native library
    does not know the function by its new name. Weights stay where they are.
    """
    model = onnx.load(str(file), load_external_data=False)
    for function in model.functions:
        for node in function.node:
            if (node.domain, node.op_type) == (QUANTIZED_DOMAIN, MATMUL_BLOCKS):
                for attribute in node.attribute:
                    if attribute.name == "accuracy_level":
                        attribute.i = 0
        if (function.domain, function.name) in _ROUNDING:
            function.name = f"Exact{function.name}"
    for node in model.graph.node:
        if (node.domain, node.op_type) in _ROUNDING:
            node.op_type = f"Exact{node.op_type}"
    return bytes(model.SerializeToString(deterministic=True))


_ROUNDING = frozenset((DOMAIN, name) for name in QUANTIZED_LINEAR)


def _resize_state(graph: onnx.GraphProto, cache: CacheSpec) -> None:
    shapes = {tensor.name: tensor.shape for tensor in cache.tensors()}
    for value in (*graph.input, *graph.output):
        name = value.name.removeprefix("past.").removeprefix("present.")
        if name in shapes:
            for dim, size in zip(value.type.tensor_type.shape.dim[1:], shapes[name][1:], strict=True):
                dim.dim_value = size


def _look_up(graph: onnx.GraphProto, tables: NDArray[np.float32], *, by_axis: bool) -> list[onnx.NodeProto]:
    """Nodes, the last L one for each layer, that read tables [L, H, positions] at the step's positions: [B, S, H]."""
    position, nodes = "position_ids", []
    if by_axis:
        position, first = "eval.position", "eval.first_axis"
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), first))
        nodes.append(onnx.helper.make_node("Gather", ["position_ids", first], [position], name=position, axis=0))
    for layer, table in enumerate(tables):
        stored, found = f"eval.log_beta_table_{layer}", f"eval.log_beta_{layer}"
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(table.T), stored))
        nodes.append(onnx.helper.make_node("Gather", [stored, position], [found], name=found, axis=0))
    return nodes
