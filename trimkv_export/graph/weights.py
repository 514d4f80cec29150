"""Initialisers that are in the checkpoint: declared in the graph, their bytes placed later."""

from dataclasses import dataclass

import onnx
from onnx import TensorProto

__all__ = ["IR_VERSION", "TENSOR_TYPES", "ModelGraph", "Weight", "external_initializer"]

# ONNX IR version of opset 23; newer ones are refused by the TensorRT parsers in the field.
IR_VERSION = 11
TENSOR_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
}


@dataclass(frozen=True)
class Weight:
    """An initialiser: its name in the checkpoint and in the graph, shape and element type in the graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModelGraph:
    """A model, with every initialiser of `weights` declared as external data that has no place yet."""

    model: onnx.ModelProto
    weights: tuple[Weight, ...]


def external_initializer(weight: Weight) -> onnx.TensorProto:
    """The initialiser of a weight, external data without a place."""
    return onnx.TensorProto(
        name=weight.name,
        dims=weight.shape,
        data_type=TENSOR_TYPES[weight.dtype],
        data_location=TensorProto.EXTERNAL,
    )
