"""Tensors of the checkpoint in the graph: declared here, their bytes placed later."""

import math
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from trimkv_export.config import Quantization
from trimkv_export.dtypes import ITEM_BYTES

__all__ = ["IR_VERSION", "TENSOR_TYPES", "Initializer", "ModelGraph", "Weight", "external_initializer"]

# ONNX IR version of opset 23; newer ones are refused by the TensorRT parsers in the field.
IR_VERSION = 11
TENSOR_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
}


@dataclass(frozen=True)
class Initializer:
    """An initialiser of the graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        elements = math.prod(self.shape)
        return elements // 2 if self.dtype == "int4" else elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint.

    Attributes:
        name: its name there.
        shape: its shape in the graph.
        dtype: its element type in the graph; that of the scales where it is quantised.
        quantization: how it is stored; None in floats.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None

    def part(self, kind: str) -> str:
        """Name of a part of a quantised `X.weight`: X.qweight, X.scales, X.qzeros, as in GPTQ and AWQ checkpoints."""
        return f"{self.name.removesuffix('weight')}{kind}"

    @property
    def inputs(self) -> list[str]:
        """Names of the initialisers that a node reads of a quantised weight: numbers, scales, perhaps zero points."""
        return [part.name for part in self.initializers]

    @property
    def initializers(self) -> tuple[Initializer, ...]:
        """What of it is in the graph."""
        if self.quantization is None:
            return (Initializer(self.name, self.shape, self.dtype),)
        (rows, columns), bits, size = self.shape, self.quantization.bits, self.quantization.block_size
        blocks = columns // size
        if self.quantization.qdq:
            parts: dict[str, tuple[tuple[int, ...], str]] = {
                "qweight": (self.shape, f"int{bits}"),
                "scales": ((rows,) if self.quantization.per_row else (rows, blocks), self.dtype),
            }
        else:
            parts = {
                "qweight": ((rows, blocks, size * bits // 8), "uint8"),
                "scales": ((rows, blocks), self.dtype),
            }
            if not self.quantization.symmetric:
                parts["qzeros"] = (rows, -(-blocks * bits // 8)), "uint8"
        return tuple(Initializer(self.part(kind), shape, dtype) for kind, (shape, dtype) in parts.items())

    @property
    def nbytes(self) -> int:
        """Bytes in the package."""
        return sum(part.nbytes for part in self.initializers)


@dataclass(frozen=True)
class ModelGraph:
    """A model, with every initialiser of `weights` declared as external data that has no place yet."""

    model: onnx.ModelProto
    weights: tuple[Weight, ...]


def external_initializer(initializer: Initializer) -> onnx.TensorProto:
    """The initialiser, external data without a place."""
    return onnx.TensorProto(
        name=initializer.name,
        dims=initializer.shape,
        data_type=TENSOR_TYPES[initializer.dtype],
        data_location=TensorProto.EXTERNAL,
    )
