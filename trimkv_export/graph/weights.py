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
}


@dataclass(frozen=True)
class Initializer:
    """An initialiser of the graph. stored: the name that its bytes go by; two may show the same in two shapes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint: its name there, its shape and element type in the graph.

    quantization: how it is stored in place of that; `dtype` is then that of the scales. as_blocks, as_rows: whether
    nodes read the quantised tensor as a matrix of blocks, and whether they read single rows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None
    as_blocks: bool = False
    as_rows: bool = False

    def part(self, kind: str) -> str:
        """Name of a part of a quantised `X.weight`: X.qweight, X.scales, X.qzeros, as in GPTQ and AWQ checkpoints."""
        return f"{self.name.removesuffix('weight')}{kind}"

    def inputs(self, numbers: str) -> list[str]:
        """Names of the initialisers that a node reads: `numbers` ("qweight" or "qweight_rows"), scales, zero points."""
        return [self.part(kind) for kind in (numbers, "scales", "qzeros") if kind != "qzeros" or self._has_zeros]

    @property
    def _has_zeros(self) -> bool:
        return self.quantization is not None and not self.quantization.symmetric

    @property
    def initializers(self) -> tuple[Initializer, ...]:
        """What of it is in the graph."""
        if self.quantization is None:
            return (Initializer(self.name, self.shape, self.dtype, self.name),)
        (rows, columns), bits, size = self.shape, self.quantization.bits, self.quantization.block_size
        blocks = columns // size
        shapes: dict[str, tuple[tuple[int, ...], str]] = {"scales": ((rows, blocks), self.dtype)}
        if self.as_blocks:
            shapes["qweight"] = (rows, blocks, size * bits // 8), "uint8"
        if self.as_rows:
            shapes["qweight_rows"] = (rows, columns * bits // 8), "uint8"
        if self._has_zeros:
            shapes["qzeros"] = (rows, -(-blocks * bits // 8)), "uint8"
        return tuple(
            Initializer(self.part(kind), shape, dtype, self.part(kind.removesuffix("_rows")))
            for kind, (shape, dtype) in shapes.items()
        )

    @property
    def nbytes(self) -> int:
        """Bytes in the package; what two initialisers show counts once."""
        return sum({part.stored: part.nbytes for part in self.initializers}.values())


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
