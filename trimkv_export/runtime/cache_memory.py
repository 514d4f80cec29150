"""The one allocation that holds the cache of all rows, on the host or on a GPU."""

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trimkv_export.policy import Slab

__all__ = ["CacheMemory", "DeviceMemory", "HostMemory", "bind_array", "bind_state", "numpy_dtype"]

# onnx.TensorProto.BFLOAT16; ONNX Runtime takes it where NumPy has no such type.
BFLOAT16 = 16
SMALL = ("counters", "stream_start")  # what a reset clears


def numpy_dtype(dtype: str) -> str:
    """NumPy's name of an element type: uint16 for bfloat16, which it lacks."""
    return "uint16" if dtype == "bfloat16" else dtype


def _element_type(dtype: str) -> Any:
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type


def bind_array(bind: Any, name: str, array: NDArray[Any], dtype: str, shape: Sequence[int] | None = None) -> None:
    """Bind a host array by `bind`, the `bind_input` or `bind_output` of a binding.

    Args:
        bind: what binds.
        name: the input or output.
        array: its memory.
        dtype: its element type, which NumPy may not have (bfloat16).
        shape: by default the array's own.
    """
    bind(name, "cpu", 0, _element_type(dtype), array.shape if shape is None else shape, array.ctypes.data)


class CacheMemory(Protocol):
    """State tensors of all rows, at fixed addresses."""

    device: str
    """ONNX Runtime's name of the device, for binding."""

    def address(self, name: str, row: int) -> int:
        """Where a row's part of a state tensor begins."""

    def read(self, row: int, *names: str) -> dict[str, NDArray[Any]]:
        """State tensors of a row, all by default, without the batch dimension; bfloat16 as uint16.

        Views on the host, copies from a device.
        """

    def write(self, row: int, payload: bytes) -> None:
        """Fill a row with the bytes of its ten tensors, one after the other."""

    def reset(self, row: int) -> None:
        """Empty a row."""


def bind_state(binding: Any, memory: CacheMemory, slab: Slab, first: int, end: int) -> None:
    """Bind rows [first, end) of the state as past and as present, in one place: it is updated where it lies."""
    for entry in slab.entries:
        place = (
            memory.device,
            0,
            _element_type(entry.dtype),
            (end - first, *entry.shape[1:]),
            memory.address(entry.name, first),
        )
        binding.bind_input(f"past.{entry.name}", *place)
        binding.bind_output(f"present.{entry.name}", *place)


class HostMemory:
    """Zeroed memory, page-aligned and present: no step meets a page for the first time.

    Huge pages where the system gives them: attention gathers rows from all over the pool, and took a quarter longer on
    small pages (2-core Xeon, Qwen3-4B shapes).
    """

    device = "cpu"

    def __init__(self, slab: Slab) -> None:
        region = mmap.mmap(-1, slab.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                region.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(region, np.uint8)
        memory.fill(0)
        self._rows = {
            entry.name: memory[entry.offset : entry.offset + entry.nbytes]
            .view(numpy_dtype(entry.dtype))
            .reshape(entry.shape)
            for entry in slab.entries
        }

    def address(self, name: str, row: int) -> int:
        """See CacheMemory."""
        return int(self._rows[name][row:].ctypes.data)

    def read(self, row: int, *names: str) -> dict[str, NDArray[Any]]:
        """See CacheMemory; views, which stay valid."""
        return {name: self._rows[name][row] for name in names or self._rows}

    def write(self, row: int, payload: bytes) -> None:
        """See CacheMemory."""
        offset = 0
        for array in self.read(row).values():
            raw = array.reshape(-1).view(np.uint8)
            raw[:] = np.frombuffer(payload, np.uint8, raw.size, offset)
            offset += raw.size

    def reset(self, row: int) -> None:
        """See CacheMemory."""
        for name in SMALL:
            self._rows[name][row].fill(0)


class DeviceMemory:
    """Memory of ONNX Runtime's allocator for a device, one block of bytes for each state tensor of all rows.

    Reading and writing copy whole blocks through the host; nothing on the path of a step does either.
    """

    def __init__(self, slab: Slab, device: str, backend: Any) -> None:
        self.device = device
        self._entries = {entry.name: entry for entry in slab.entries}
        zeros = {name: np.zeros(entry.nbytes, np.uint8) for name, entry in self._entries.items()}
        self._blocks = {name: backend.OrtValue.ortvalue_from_numpy(zeros[name], device, 0) for name in zeros}

    def address(self, name: str, row: int) -> int:
        """See CacheMemory."""
        return int(self._blocks[name].data_ptr()) + row * self._entries[name].row_bytes

    def _block(self, name: str) -> NDArray[np.uint8]:
        return np.array(self._blocks[name].numpy())

    def read(self, row: int, *names: str) -> dict[str, NDArray[Any]]:
        """See CacheMemory; copies."""
        out = {}
        for name in names or self._entries:
            entry = self._entries[name]
            raw = self._block(name)[row * entry.row_bytes : (row + 1) * entry.row_bytes]
            out[name] = raw.view(numpy_dtype(entry.dtype)).reshape(entry.shape[1:])
        return out

    def write(self, row: int, payload: bytes) -> None:
        """See CacheMemory."""
        offset = 0
        for name, entry in self._entries.items():
            block = self._block(name)
            part = np.frombuffer(payload, np.uint8, entry.row_bytes, offset)
            block[row * entry.row_bytes : (row + 1) * entry.row_bytes] = part
            self._blocks[name].update_inplace(block)
            offset += entry.row_bytes

    def reset(self, row: int) -> None:
        """See CacheMemory."""
        for name in SMALL:
            block, size = self._block(name), self._entries[name].row_bytes
            block[row * size : (row + 1) * size] = 0
            self._blocks[name].update_inplace(block)
