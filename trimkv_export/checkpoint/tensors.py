"""Where a tensor lies: file, offset, size. Weights are never held in memory; they are read when they are needed."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from trimkv_export.errors import CheckpointError, missing
from trimkv_export.files import LFS_POINTER, open_regular

__all__ = ["TensorInfo", "numpy_dtype", "open_weights", "same_values"]

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a weight file, located but not loaded.

    Attributes:
        name: key in the checkpoint.
        dtype: "float32", "float16", "bfloat16", or another key of `dtypes.ITEM_BYTES`.
        shape: dimensions, outermost first; () is a scalar.
        file: the weight file.
        offset: absolute byte offset in `file` of the data: C-contiguous, little-endian.
        nbytes: bytes of data, prod(shape) * dtypes.ITEM_BYTES[dtype].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """Read the whole tensor into a new array (meant for small tensors and tests).

        Raises:
            CheckpointError: the file cannot be read or became shorter than it was.
            MissingDependencyError: bfloat16 or float8 without the package ml_dtypes.
        """
        dtype = numpy_dtype(self.dtype)
        with open_weights(self.file) as file:
            file.seek(self.offset)
            data = np.fromfile(file, dtype=np.uint8, count=self.nbytes)
        if len(data) != self.nbytes:
            raise CheckpointError(
                f"{self.file}: {self.name!r} has {len(data)} of its {self.nbytes} bytes: the file changed while it "
                "was in use; start again"
            )
        return data.view(dtype).reshape(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes in order, a part at a time; they end early where the file became shorter.

        Raises:
            CheckpointError: the file cannot be read.
        """
        with open_weights(self.file) as file:
            file.seek(self.offset)
            left = self.nbytes
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a `TensorInfo.dtype`; bfloat16 and float8 come from ml_dtypes, imported here.

    Raises:
        MissingDependencyError: ml_dtypes is needed and not installed.
    """
    if name != "bfloat16" and not name.startswith("float8"):
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise missing(f"reading {name} weights", "ml_dtypes", "export") from error
    dtype: np.dtype = np.dtype(getattr(ml_dtypes, name))
    return dtype


def same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same values bit for bit, in chunks; of different types or shapes they do not.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(ours == theirs for ours, theirs in zip_longest(one.chunks(), other.chunks()))


@contextmanager
def open_weights(path: Path) -> Iterator[io.BufferedReader]:
    """Open a weight file for reading.

    Raises:
        CheckpointError: the file cannot be opened or read, or is a Git LFS pointer in place of the file.
    """
    try:
        with open_regular(path) as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(
                    f"{path}: this is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
                )
            file.seek(0)
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from error
