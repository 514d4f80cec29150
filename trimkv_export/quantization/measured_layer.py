"""What calibration runs: one decoder layer by itself, which also gives the inputs of its matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto

from trimkv_export.config import EvictionConfig, Policy, Precision
from trimkv_export.graph.decoder import GateSpec, build_decoder, cache_spec
from trimkv_export.models import DecoderSpec

__all__ = ["MeasuredLayer", "measured_layer"]


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer as a float32 graph. Its weights are inputs, since all layers have the same; its cache is empty.

    The graph also has the decoder's inputs `input_ids`, `position_ids` and `step_tokens`. Its outputs: what the layer
    makes of `hidden`, and for each of `matrices` its input [S, K].

    Attributes:
        model: the graph.
        hidden: name of the input [S, d].
        weights: names of the inputs that are weights, in layer 0.
        matrices: of those with the same input, the first.
    """

    model: onnx.ModelProto
    hidden: str
    weights: Sequence[str]
    matrices: Sequence[str]


def measured_layer(spec: DecoderSpec) -> MeasuredLayer:
    """The layer of a decoder graph that has one, cut out of it, for text alone."""
    alone = replace(spec, num_layers=1, takes_visual_inputs=False, deepstack_layers=0)
    # Of no consequence: gates and eviction are cut off.
    gate, eviction = GateSpec("rg", 1), EvictionConfig(Policy.GLOBAL, 1, 1)
    model = build_decoder(alone, gate, eviction, Precision.FP32).model
    named = {node.name: node for node in model.graph.node}
    made_by = {output: node for node in model.graph.node for output in node.output}
    hidden = named[f"{spec.layer(0)}.input_layernorm"].input[0]
    last_row = made_by[named[f"{spec.prefix}norm"].input[0]]
    inputs: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.name.startswith(f"{spec.layer(0)}."):
            inputs.setdefault(node.input[0], node.input[1])
    outputs = [last_row.input[0], *inputs]

    needed, nodes = set(outputs), []
    for node in reversed(model.graph.node):
        if hidden not in node.output and needed & set(node.output):
            needed |= set(node.input)
            nodes.append(node)
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes[::-1],
        "layer",
        [
            info(hidden, TensorProto.FLOAT, ["tokens", spec.hidden_size]),
            *(value for value in model.graph.input if value.name in needed and not value.name.startswith("past.")),
            *(info(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in weights),
        ],
        [
            info(outputs[0], TensorProto.FLOAT, ["tokens", spec.hidden_size]),
            *(info(name, TensorProto.FLOAT, ["tokens", None]) for name in outputs[1:]),
        ],
        initializer=[
            onnx.numpy_helper.from_array(np.zeros(tensor.shape, tensor.dtype), f"past.{tensor.name}")
            for tensor in cache_spec(alone, eviction, Precision.FP32).tensors()
            if f"past.{tensor.name}" in needed
        ],
    )
    model.graph.CopyFrom(graph)
    return MeasuredLayer(model, hidden, [tensor.name for tensor in weights], list(inputs.values()))
