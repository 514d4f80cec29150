"""The native kernels: where the library is, and what it needs."""

from pathlib import Path

__all__ = ["LIBRARY", "find_library"]

LIBRARY = "libtrimkv_onnxruntime.so"
FOLDER = Path(__file__).resolve().parent.parent / "native"


def find_library() -> Path | None:
    """The custom-operator library of this installation, None where it was not built."""
    library = FOLDER / LIBRARY
    return library if library.is_file() else None
