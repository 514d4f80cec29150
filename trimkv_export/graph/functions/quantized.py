"""The bodies of MatMulNBits and GatherBlockQuantized, contributed operators of ONNX Runtime for quantised weights.

ONNX Runtime takes its own kernels: on a CPU a matrix of int4 is read as it lies, and the input is rounded to int8 by
blocks (`accuracy_level` 4), which takes 0.14 ms where float32 takes 2 to 3 (1 x 2,560 x 9,728, two cores). Any other
runtime takes these bodies, which make the float matrix first.

Formats: whole numbers without sign, 4 bits two to a byte, the even column in the low half; zero points the same, 8 or
128 where there are none; value = (number - zero point) * scale of its block.
"""

import numpy as np
import onnx

from trimkv_export.config import Quantization
from trimkv_export.graph.builder import OPSET, GraphBuilder

__all__ = ["ACCURACY_LEVEL", "GATHER_BLOCKS", "MATMUL_BLOCKS", "QUANTIZED_DOMAIN", "quantized_functions"]

QUANTIZED_DOMAIN = "com.microsoft"
MATMUL_BLOCKS = "MatMulNBits"
GATHER_BLOCKS = "GatherBlockQuantized"
ACCURACY_LEVEL = 4


def quantized_functions(quantization: Quantization, float_type: int) -> list[onnx.FunctionProto]:
    """Both bodies, for one format and one element type of scales.

    MatMulNBits(x [rows, K], qweight [N, blocks, bytes], scales [N, blocks](, qzeros)) -> [rows, N], without a bias.
    GatherBlockQuantized(qweight [N, bytes], index [rows], scales [N, blocks](, qzeros)) -> [rows, K].
    """
    zeros = [] if quantization.symmetric else ["qzeros"]
    b = GraphBuilder()
    matrix = _values(b, quantization, float_type, *("qweight", "scales", *zeros))
    b.op("Gemm", "x", b.op("Flatten", matrix), transB=1, output="y")
    matmul = _function(
        MATMUL_BLOCKS, ["x", "qweight", "scales", *zeros], b, ["K", "N", "bits", "block_size", "accuracy_level"]
    )
    b = GraphBuilder()
    rows, *small = (b.op("Gather", name, "index") for name in ("qweight", "scales", *zeros))
    blocks = b.op("Reshape", rows, b.const([0, -1, quantization.block_size * quantization.bits // 8]))
    b.op("Flatten", _values(b, quantization, float_type, blocks, *small), output="y")
    gather = _function(
        GATHER_BLOCKS,
        ["qweight", "index", "scales", *zeros],
        b,
        ["bits", "block_size", "gather_axis", "quantize_axis"],
    )
    return [matmul, gather]


def _values(b: GraphBuilder, quantization: Quantization, float_type: int, *parts: str) -> str:
    """What quantised numbers [rows, blocks, bytes] stand for: [rows, blocks, block_size]."""
    numbers, scales, *zeros = parts
    bits = quantization.bits
    zero = b.cast(b.const(1 << (bits - 1), np.uint8), float_type)
    if zeros:  # an odd number of blocks leaves half a byte
        found = b.slice(_unpacked(b, zeros[0], bits, [0, -1]), 0, b.dim(scales, 1), 1)
        zero = b.cast(b.unsqueeze(found, 2), float_type)
    whole = b.cast(_unpacked(b, numbers, bits, [0, 0, -1]), float_type)
    return b.op("Mul", b.op("Sub", whole, zero), b.unsqueeze(scales, 2))


def _unpacked(b: GraphBuilder, packed: str, bits: int, shape: list[int]) -> str:
    """Numbers, one to a byte; by arithmetic, since some runtimes have no operations on bits."""
    if bits == 8:
        return packed
    base = b.const(16, np.uint8)
    halves = (b.unsqueeze(b.op(kind, packed, base), len(shape)) for kind in ("Mod", "Div"))
    return b.op("Reshape", b.op("Concat", *halves, axis=len(shape)), b.const(shape))


def _function(name: str, inputs: list[str], b: GraphBuilder, attributes: list[str]) -> onnx.FunctionProto:
    opset = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_function(QUANTIZED_DOMAIN, name, inputs, ["y"], b.nodes, opset, attributes)
