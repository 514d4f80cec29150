"""The native kernels: where the library is, and what it needs."""

import ctypes
from pathlib import Path

__all__ = ["LIBRARY", "built_with_cuda", "find_library"]

LIBRARY = "libtrimkv_onnxruntime.so"
FOLDER = Path(__file__).resolve().parent.parent / "native"


def find_library() -> Path | None:
    """The custom-operator library of this installation, None where it was not built."""
    library = FOLDER / LIBRARY
    return library if library.is_file() else None


def built_with_cuda(library: Path | None) -> bool:
    """Whether a library has CUDA kernels; False where there is none or it cannot be loaded."""
    try:
        return library is not None and bool(ctypes.CDLL(str(library)).TrimkvBuiltWithCuda())
    except (OSError, AttributeError):
        return False
