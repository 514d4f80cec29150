"""The native kernels: where the library is, and what it needs."""

import ctypes
from pathlib import Path

from trimkv_export.config import Precision, Quantization

__all__ = [
    "LIBRARY",
    "QUANTIZED_LINEAR_ENTRY",
    "built_with_cuda",
    "find_library",
    "has_quantized_kernels",
    "serves_quantized",
]

LIBRARY = "libtrimkv_onnxruntime.so"
# In a session's configuration, before the library is registered: asks for its QuantizedLinear, where the processor can.
# For ONNX Runtime's CPU provider alone, since it has no kernel for a GPU.
QUANTIZED_LINEAR_ENTRY = "trimkv.quantized_linear"
SMALLEST_BLOCK = 32
FOLDER = Path(__file__).resolve().parent.parent / "native"


def find_library() -> Path | None:
    """The custom-operator library of this installation, None where it was not built."""
    library = FOLDER / LIBRARY
    return library if library.is_file() else None


def built_with_cuda(library: Path | None) -> bool:
    """Whether a library has CUDA kernels; False where there is none or it cannot be loaded."""
    return _answers(library, "TrimkvBuiltWithCuda")


def has_quantized_kernels(library: Path | None) -> bool:
    """Whether a library has QuantizedLinear for this processor; False where there is none or it cannot be loaded."""
    return _answers(library, "TrimkvHasQuantizedKernels")


def serves_quantized(quantization: Quantization | None, precision: Precision) -> bool:
    """Whether the library's QuantizedLinear can take such weights, with inputs of this precision."""
    return quantization is not None and quantization.block_size >= SMALLEST_BLOCK and precision is Precision.FP32


def _answers(library: Path | None, question: str) -> bool:
    try:
        return library is not None and bool(getattr(ctypes.CDLL(str(library)), question)())
    except (OSError, AttributeError):
        return False
