"""Which files an ONNX graph on disk takes its weights from, without the package onnx.

A graph may name any file as the place of a tensor's data, and whatever loads the graph would read it. Protobuf's wire
format says what is a message and how long it is, so the graph is walked from message to message; only the few kinds
that lead to a tensor are entered. Format: https://protobuf.dev/programming-guides/encoding/, the numbers of fields:
onnx.proto of https://github.com/onnx/onnx.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from trimkv_export.files import open_regular

__all__ = ["external_files"]

# Kind of message -> number of a field -> kind of the message in it.
FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
SIZES = {FIXED64: 8, FIXED32: 4}
KEY, VALUE = 1, 2

Buffer: TypeAlias = "mmap.mmap | bytes"


def external_files(graph: Path) -> set[str]:
    """The locations of all tensors of a graph that lie outside it, as they stand there.

    Args:
        graph: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a graph.
    """
    with open_regular(graph) as file:
        if not file.seek(0, 2):
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data))


def _locations(data: Buffer) -> Iterator[str]:
    waiting = [("model", 0, len(data))]
    while waiting:
        kind, start, end = waiting.pop()
        if kind == "entry":
            entry = {number: data[first:last] for number, first, last in _messages(data, start, end)}
            if entry.get(KEY) == b"location":
                yield entry.get(VALUE, b"").decode()
            continue
        inner = FIELDS[kind]
        for number, first, last in _messages(data, start, end):
            if number in inner:
                waiting.append((inner[number], first, last))


def _messages(data: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of the fields between two places that hold bytes: messages, texts and lists of numbers."""
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == BYTES:
            size, at = _varint(data, at, end)
            if size > end - at:
                raise ValueError(f"a field of {size:,} bytes at {at:,} does not fit")
            yield number, at, at + size
            at += size
        elif wire == VARINT:
            _, at = _varint(data, at, end)
        elif wire in SIZES:
            at += SIZES[wire]
        else:
            raise ValueError(f"a field of kind {wire} at {at:,}, which no graph has")
    if at != end:
        raise ValueError(f"a field ends at {at:,} and not at {end:,}")


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"no number at {at:,}")
