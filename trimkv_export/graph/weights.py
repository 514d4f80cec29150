"""Tensors of the checkpoint in the graph: declared here, their bytes placed later."""

from dataclasses import dataclass

import onnx
from onnx import TensorProto

from trimkv_export.config import Quantization

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

    @property
    def initializers(self) -> tuple[Initializer, ...]:
        """What of it is in the graph."""
        if self.quantization is None:
            return (Initializer(self.name, self.shape, self.dtype, self.name),)
        (rows, columns), bits, size = self.shape, self.quantization.bits, self.quantization.block_size
        blocks, numbers = columns // size, self.part("qweight")
        parts = []
        if self.as_blocks:
            parts.append(Initializer(numbers, (rows, blocks, size * bits // 8), "uint8", numbers))
        if self.as_rows:
            parts.append(Initializer(f"{numbers}_rows", (rows, columns * bits // 8), "uint8", numbers))
        small = {"scales": ((rows, blocks), self.dtype)}
        if not self.quantization.symmetric:
            small["qzeros"] = (rows, -(-blocks * bits // 8)), "uint8"
        parts += [Initializer(self.part(kind), *found, self.part(kind)) for kind, found in small.items()]
        return tuple(parts)


@dataclass(frozen=True)
class ModelGraph:
    """A model, with every initialiser of `weights` declared as external data that has no place yet."""

    model: onnx.ModelProto
    weights: tuple[Weight, ...]

    def stored(self) -> dict[str, Initializer]:
        """Its initialisers by the name of their bytes, each once."""
        return {part.stored: part for weight in self.weights for part in weight.initializers}


def external_initializer(initializer: Initializer) -> onnx.TensorProto:
    """The initialiser, external data without a place."""
    return onnx.TensorProto(
        name=initializer.name,
        dims=initializer.shape,
        data_type=TENSOR_TYPES[initializer.dtype],
        data_location=TensorProto.EXTERNAL,
    )
