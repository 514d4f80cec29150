"""Read a GGUF file: its fields, and its tensors as float32.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Of the quantised types only those
that the file of `fetch.py` has are read.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GgufFile"]

MAGIC = b"GGUF"
# Types of fields: those of fixed size with their struct format.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Types of tensors -> bytes of a block, values of a block.
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCKS = {F32: (4, 1), F16: (2, 1), Q4_1: (20, 32), Q8_0: (34, 32)}


class GgufFile:
    """An opened file.

    Attributes:
        fields: its metadata.
        names: of its tensors.
    """

    def __init__(self, path: Path) -> None:
        self._data = np.memmap(path, np.uint8, "r")
        self._at = 0
        magic, version, tensors, fields = self._unpack("4sIQQ")
        if magic != MAGIC or version not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        self.fields: dict[str, Any] = {self._string(): self._value(*self._unpack("I")) for _ in range(fields)}
        self._tensors = {}
        for _ in range(tensors):
            name, (rank,) = self._string(), self._unpack("I")
            shape = self._unpack(f"{rank}Q")[::-1]  # the file has the fastest dimension first
            kind, offset = self._unpack("IQ")
            if kind not in BLOCKS:
                raise ValueError(f"{path}: the tensor {name} has the type {kind}; {sorted(BLOCKS)} can be read")
            self._tensors[name] = (shape, kind, offset)
        alignment = self.fields.get("general.alignment", 32)
        self._start = -(-self._at // alignment) * alignment
        self.names = tuple(self._tensors)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor's values, dequantised."""
        shape, kind, offset = self._tensors[name]
        size, values = BLOCKS[kind]
        begin = self._start + offset
        count = int(np.prod(shape)) // values
        blocks = np.asarray(self._data[begin : begin + count * size]).reshape(count, size)
        return _dequantize(kind, blocks).reshape(shape)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        values = struct.unpack_from(layout, self._data.data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        self._at += length
        return bytes(self._data[self._at - length : self._at]).decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._unpack("IQ")
            if inner in NUMBERS:
                return list(self._unpack(f"{count}{NUMBERS[inner]}"))
            return [self._value(inner) for _ in range(count)]
        (value,) = self._unpack(NUMBERS[kind])
        return value


def _dequantize(kind: int, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Blocks [count, bytes] -> values [count, values of a block]."""

    def half(begin: int) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(blocks[:, begin : begin + 2]).view(np.float16).astype(np.float32)

    if kind == F32:
        return np.ascontiguousarray(blocks).view(np.float32)
    if kind == F16:
        return half(0)
    if kind == Q8_0:
        return half(0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    # Q4_1: scale, minimum, and 32 numbers of 4 bits, of which the first 16 are in the low halves.
    quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return half(0) * quants.astype(np.float32) + half(2)
