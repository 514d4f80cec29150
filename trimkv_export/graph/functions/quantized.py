"""Quantised weights: QuantizedLinear and QuantizedEmbedding.

QuantizedLinear is ONNX Runtime's contributed operator MatMulNBits, unless the native library serves it (plugins/, some
CPUs). ONNX Runtime has kernels for MatMulNBits; any other runtime takes its body here, which makes the float matrix
first. Both kernels for CPUs round the input to int8 by blocks (`accuracy_level` 4) and read the matrix as it is.

Formats: whole numbers without sign, 4 bits two to a byte, the even column in the low half; zero points the same, 8 or
128 where there are none; value = (number - zero point) * scale of its block.
"""

from collections.abc import Sequence

import numpy as np
import onnx

from trimkv_export.config import Quantization
from trimkv_export.graph.builder import GraphBuilder
from trimkv_export.graph.ops import DOMAIN

__all__ = [
    "MATMUL_BLOCKS",
    "QUANTIZED_DOMAIN",
    "QUANTIZED_EMBEDDING",
    "QUANTIZED_LINEAR",
    "quantized_functions",
]

# By the number of matrices, which have one input: a step of one token is otherwise many short nodes.
QUANTIZED_LINEAR = ("QuantizedLinear", "QuantizedLinear2", "QuantizedLinear3")
QUANTIZED_EMBEDDING = "QuantizedEmbedding"
QUANTIZED_DOMAIN = "com.microsoft"
MATMUL_BLOCKS = "MatMulNBits"
ACCURACY_LEVEL = 4


def quantized_functions(
    quantization: Quantization, head: Quantization, float_type: int, scale_type: int, *, mixed: bool = False
) -> list[onnx.FunctionProto]:
    """All bodies, for one element type of x and of scales.

    Args:
        quantization: the format of matrices.
        head: that of the embedding.
        float_type, scale_type: ONNX's numbers of the types.
        mixed: matrices of 4 and of 8 bits have the same body.

    QuantizedLinear(x [rows, K], qweight [N, blocks, bytes], scales [N, blocks](, qzeros)) -> [rows, N]; the same with
        two or three matrices, their inputs one after the other, and an output of each.
    MatMulNBits(x [rows, K], qweight [N, blocks, bytes], scales [N, blocks](, qzeros)) -> [rows, N], without a bias.
    QuantizedEmbedding(index [rows], qweight, scales(, qzeros)) -> those rows of the matrix, [rows, K].
    """
    zeros = [] if quantization.symmetric else ["qzeros"]
    b = GraphBuilder()
    bits = None if mixed else quantization.bits
    matrix = _values(b, bits, float_type, *("qweight", "scales", *zeros))
    b.op("Gemm", "x", b.op("Flatten", matrix), transB=1, output="y")
    sizes = ["K", "N", "bits", "block_size", "accuracy_level"]
    matmul = b.function(QUANTIZED_DOMAIN, MATMUL_BLOCKS, ["x", "qweight", "scales", *zeros], ["y"], sizes)
    b = GraphBuilder()
    rows, scales, *more = (b.op("Gather", name, "index") for name in ("qweight", "scales", *zeros))
    if scale_type != float_type:
        scales = b.cast(scales, float_type)
    b.op("Flatten", _values(b, head.bits, float_type, rows, scales, *more), output="y")
    embedding = b.function(DOMAIN, QUANTIZED_EMBEDDING, ["index", "qweight", "scales", *zeros], ["y"])
    to = None if scale_type == float_type else float_type
    linear = [_linear(count, ["qweight", "scales", *zeros], to) for count, _ in enumerate(QUANTIZED_LINEAR, 1)]
    return [*linear, matmul, embedding]


def _linear(count: int, parts: Sequence[str], scales_to: int | None) -> onnx.FunctionProto:
    """QuantizedLinear of `count` matrices; N_0, N_1, … are their rows. MatMulNBits wants scales of the type of x."""
    b, inputs = GraphBuilder(), ["x"]
    shared, rows = ["K", "bits", "block_size"], [f"N_{number}" for number in range(count)]
    for number, size in enumerate(rows):
        matrix = [f"{part}_{number}" for part in parts]
        inputs += matrix
        if scales_to is not None:
            matrix[1] = b.cast(matrix[1], scales_to)
        b.op(
            MATMUL_BLOCKS, "x", *matrix,
            domain=QUANTIZED_DOMAIN, accuracy_level=ACCURACY_LEVEL, output=f"y_{number}",
        )  # fmt: skip
        for name, given in (("N", size), *zip(shared, shared, strict=True)):
            b.nodes[-1].attribute.append(
                onnx.AttributeProto(name=name, ref_attr_name=given, type=onnx.AttributeProto.INT)
            )
    outputs = [f"y_{number}" for number in range(count)]
    name, attributes = QUANTIZED_LINEAR[count - 1], [*shared, *rows]
    return b.function(DOMAIN, name, inputs, outputs, attributes, uses=[QUANTIZED_DOMAIN])


def _values(b: GraphBuilder, bits: int | None, float_type: int, *parts: str) -> str:
    """What quantised numbers [rows, blocks, bytes] stand for: [rows, blocks, block_size].

    With `bits` None they are the node's: of 4 bits each byte has two numbers, of 8 bits the second is dropped.
    """
    numbers, scales, *zeros = parts
    if bits is None:
        return _values_of_any_bits(b, float_type, numbers, scales, *zeros)
    zero = b.cast(b.const(1 << (bits - 1), np.uint8), float_type)
    if zeros:  # an odd number of blocks leaves half a byte
        found = b.slice(_unpacked(b, zeros[0], bits, [0, -1]), 0, b.dim(scales, 1), 1)
        zero = b.cast(b.unsqueeze(found, 2), float_type)
    whole = b.cast(_unpacked(b, numbers, bits, [0, 0, -1]), float_type)
    return b.op("Mul", b.op("Sub", whole, zero), b.unsqueeze(scales, 2))


def _values_of_any_bits(b: GraphBuilder, float_type: int, numbers: str, scales: str, *zeros: str) -> str:
    """`_values`, by the attribute `bits`, 4 or 8."""
    bits = b.attribute("bits", onnx.AttributeProto.INT, [1])
    base = b.cast(b.op("Pow", b.const([2]), bits), onnx.TensorProto.INT32)
    each = b.op("Div", b.const([8]), bits)  # numbers of a byte

    def unpacked(packed: str, axis: int, shape: list[int]) -> str:
        wide = b.unsqueeze(b.cast(packed, onnx.TensorProto.INT32), axis)
        halves = b.op("Concat", b.op("Mod", wide, base), b.op("Div", wide, base), axis=axis)
        return b.op("Reshape", b.slice(halves, 0, each, axis), b.const(shape))

    zero = b.cast(b.op("Div", base, b.const([2], np.int32)), float_type)
    if zeros:
        found = b.slice(unpacked(zeros[0], 2, [0, -1]), 0, b.dim(scales, 1), 1)
        zero = b.cast(b.unsqueeze(found, 2), float_type)
    whole = b.cast(unpacked(numbers, 3, [0, 0, -1]), float_type)
    return b.op("Mul", b.op("Sub", whole, zero), b.unsqueeze(scales, 2))


def _unpacked(b: GraphBuilder, packed: str, bits: int, shape: list[int]) -> str:
    """Numbers, one to a byte; by arithmetic, since some runtimes have no operations on bits."""
    if bits == 8:
        return packed
    base = b.const(16, np.uint8)
    halves = (b.unsqueeze(b.op(kind, packed, base), len(shape)) for kind in ("Mod", "Div"))
    return b.op("Reshape", b.op("Concat", *halves, axis=len(shape)), b.const(shape))
