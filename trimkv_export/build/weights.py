"""Bring a checkpoint's tensors into a package: file by file, chunk by chunk, hashed on the way.

No tensor is ever held whole, so memory does not depend on the size of the model. Every weight is looked through on its
way for values that are not finite. A safetensors file most of which is
needed as it is enters the package unchanged (copied or linked) and the graphs point into it; tensors that need
conversion, and gates, are written to a data file next to their graph (`decoder.onnx.data`).
"""

import contextlib
import errno
import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trimkv_export.checkpoint import TensorInfo
from trimkv_export.checkpoint.tensors import open_weights
from trimkv_export.config import WeightStorage
from trimkv_export.errors import CheckpointError, OutputError
from trimkv_export.files import emptied
from trimkv_export.quantization.rounding import quantize
from trimkv_export.quantization.wanted import Wanted

__all__ = ["FileRecord", "Location", "Placement", "place_weights"]

CHUNK_BYTES = 8 << 20
ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element size

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Location:
    """Where an initialiser's bytes lie in the package."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileRecord:
    """Size and hexadecimal sha256 of a file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Placement:
    """Name of an initialiser -> location, and records of the files read (by path) and written (by name)."""

    locations: Mapping[str, Location]
    inputs: Mapping[Path, FileRecord]
    outputs: Mapping[str, FileRecord]


def place_weights(
    wanted: Mapping[str, Wanted],
    whole_files: Collection[Path],
    stage: Path,
    storage: WeightStorage,
    progress: Progress = lambda _: None,
) -> Placement:
    """Write or link every tensor below `stage`.

    Args:
        wanted: the tensors, by name.
        whole_files: those that may enter the package as they are.
        stage: the folder.
        storage: how they enter it.
        progress: called with the bytes that were read since the last call.

    Raises:
        CheckpointError: a source is cut short, or a value does not fit its type.
        OutputError: a file cannot be linked.
        OSError: writing fails.
    """
    by_file: dict[Path, list[str]] = {}
    for name, tensor in wanted.items():
        by_file.setdefault(tensor.source.file, []).append(name)
    locations: dict[str, Location] = {}
    inputs: dict[Path, FileRecord] = {}
    outputs: dict[str, FileRecord] = {}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        names = sorted({tensor.data_file for tensor in wanted.values()})
        data = {name: stack.enter_context(_DataFile(stage / name, pool)) for name in names}
        for file in sorted(by_file):
            names = sorted(by_file[file], key=lambda name: wanted[name].source.offset)
            as_is = [name for name in names if wanted[name].as_is]
            whole = file in whole_files and 2 * sum(wanted[n].nbytes for n in as_is) > file.stat().st_size
            if whole:
                locations |= {n: Location(file.name, wanted[n].source.offset, wanted[n].nbytes) for n in as_is}
            if whole and storage is WeightStorage.LINK:
                _link(file, stage / file.name)
            copying = whole and storage is WeightStorage.COPY
            with _Source(file, stage / file.name if copying else None, pool, progress) as source_file:
                for name in names:
                    source, target = wanted[name].source, data[wanted[name].data_file]
                    again = source.offset < source_file.position  # a tied matrix, wanted as embedding and as head
                    if again:
                        chunks: Iterator[memoryview] = (memoryview(chunk) for chunk in source.chunks())
                    else:
                        source_file.skip_to(source.offset)
                        chunks = _finite(source_file.chunks(source.offset + source.nbytes), source)
                    if name not in locations:
                        locations |= target.append(wanted[name], chunks)
                    elif not again:
                        for _ in chunks:  # in place already, and looked through
                            pass
                source_file.skip_to(file.stat().st_size)
            inputs[file] = source_file.record()
            if whole:
                outputs[file.name] = inputs[file]
    for name, written in data.items():
        if written.position:
            outputs[name] = written.record()
        else:
            (stage / name).unlink()
    return Placement(locations, inputs, outputs)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file.resolve(), emptied(target))  # a symbolic link is refused by ONNX Runtime
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        raise OutputError(
            f"{target.parent}: cannot hard-link {file} ({error.strerror}); write the package on the checkpoint's "
            "file system, or build with --weights copy"
        ) from None


class _Hashed:
    """A running sha256 that is computed while files are read and written."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.position = 0
        self._digest = hashlib.sha256()
        self._pool = pool
        self._pending: Future[None] | None = None

    def hash(self, data: memoryview) -> None:
        """Queue `data`, which must stay unchanged until the next call returns."""
        self.wait()
        self.position += len(data)
        self._pending = self._pool.submit(self._digest.update, data)

    def wait(self) -> None:
        if self._pending:
            self._pending.result()
            self._pending = None

    def record(self) -> FileRecord:
        self.wait()
        return FileRecord(self.position, self._digest.hexdigest())


class _Source(_Hashed):
    """Reads a file once from start to end, hashing and, with a `copy` path, copying every byte."""

    def __init__(self, path: Path, copy: Path | None, pool: ThreadPoolExecutor, progress: Progress) -> None:
        super().__init__(pool)
        self._path, self._copy_path, self._progress = path, copy, progress
        self._open = contextlib.ExitStack()
        # Two buffers: one is hashed while the next is read.
        self._buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(2)]

    def __enter__(self) -> "_Source":
        self._file = self._open.enter_context(open_weights(self._path))
        self._copy: BinaryIO | None = None
        if self._copy_path:
            self._copy = emptied(self._copy_path).open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._open.close()
        if self._copy:
            self._copy.close()

    def chunks(self, end: int) -> Iterator[memoryview]:
        """What lies between here and `end`; a chunk is valid until the next but one."""
        while self.position < end:
            self._buffers.reverse()
            count = self._read(self._buffers[0][: min(CHUNK_BYTES, end - self.position)])
            if not count:
                raise CheckpointError(f"{self._path}: became shorter while it was read, at byte {self.position:,}")
            chunk = self._buffers[0][:count]
            if self._copy:
                self._copy.write(chunk)
            self.hash(chunk)
            self._progress(count)
            yield chunk

    def _read(self, buffer: memoryview) -> int:
        try:
            return self._file.readinto(buffer)
        except OSError as error:  # of the checkpoint, not of what is written
            raise CheckpointError(f"{self._path}: cannot be read ({error.strerror or error})") from None

    def skip_to(self, offset: int) -> None:
        for _ in self.chunks(offset):
            pass


def _finite(chunks: Iterator[memoryview], source: TensorInfo) -> Iterator[memoryview]:
    """The same chunks of a tensor of floats; an error in place of the first with a value that is not finite."""
    kind = _EXPONENTS.get(source.dtype)
    if kind is None:
        yield from chunks
        return
    word, mask, size = kind
    rest, wrong, infinite = b"", 0, 0
    for chunk in chunks:
        # Chunks may end within a number.
        data = memoryview(rest + bytes(chunk)) if rest else chunk
        cut = len(data) - len(data) % size
        rest, bits = bytes(data[cut:]), np.frombuffer(data[:cut], word)
        found = bits & mask == mask
        if found.any():
            wrong += int(found.sum())
            infinite += int((bits[found] << 1 == np.array(mask, word) << 1).sum())
        if not wrong:  # else the rest is counted
            yield chunk
    if wrong:
        raise CheckpointError(
            f"{source.file}: {source.name} holds {wrong - infinite:,} values that are no number (NaN) and "
            f"{infinite:,} that are infinite, of {math.prod(source.shape):,}: the file is damaged, or training went "
            "wrong; fetch it again, or take another"
        )


# Unsigned words, the bits of their exponent, and their size: all of these set is NaN or infinite.
_EXPONENTS: dict[str, tuple[np.dtype, int, int]] = {
    "float32": (np.dtype(np.uint32), 0x7F800000, 4),
    "float16": (np.dtype(np.uint16), 0x7C00, 2),
    "bfloat16": (np.dtype(np.uint16), 0x7F80, 2),
}


class _DataFile(_Hashed):
    """Writes a data file, hashing what it writes."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        super().__init__(pool)
        self._path = path

    def __enter__(self) -> "_DataFile":
        self._file = emptied(self._path).open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._file.close()

    def append(self, wanted: Wanted, chunks: Iterator[memoryview]) -> dict[str, Location]:
        """Convert one tensor to what it is in the graph and write it at the next aligned offset."""
        source, weight = wanted.source, wanted.weight
        if wanted.taken is not None:
            part = wanted.taken.convert(b"".join(chunks), source, weight)
            if part is None:
                return {}
            return {weight.part(wanted.taken.part): self._place([part.view(np.uint8).data.cast("B")])}
        if wanted.adjustment is not None and wanted.adjustment.parts is not None:
            parts = wanted.adjustment.parts
            return {weight.part(kind): self._place(_read_parts(file)) for kind, file in parts.items()}
        item, quantization, adjustment = _NUMPY[source.dtype], weight.quantization, wanted.adjustment
        if quantization is None and adjustment is None:
            converted = (_convert(np.frombuffer(c, item), weight.dtype, source) for c in _cut(chunks, item.itemsize))
            return {weight.name: self._place(converted)}
        # A scale, or a row of the embedding, needs whole rows.
        columns = weight.shape[1] if len(weight.shape) > 1 else 1

        def whole_rows() -> Iterator[NDArray[np.float32]]:
            start = 0
            for chunk in _cut(chunks, columns * item.itemsize):
                values = np.frombuffer(_convert(np.frombuffer(chunk, item), "float32", source), np.float32)
                rows = values.reshape(-1, columns)
                yield rows if adjustment is None else adjustment.apply(rows, start)
                start += len(rows)

        if quantization is None:
            floats = replace(source, dtype="float32")
            return {weight.name: self._place(_convert(r.ravel(), weight.dtype, floats) for r in whole_rows())}
        # Scales are few, and wait for the numbers.
        scale, importance = _NUMPY[weight.dtype], None if adjustment is None else adjustment.importance
        small: dict[str, list[NDArray[np.generic]]] = {}

        def numbers() -> Iterator[memoryview]:
            for rows in whole_rows():
                parts = quantize(rows, quantization, scale, importance)
                wanted.check_scales(parts["scales"], rows)
                yield parts.pop("qweight").data.cast("B")
                for kind, part in parts.items():
                    small.setdefault(kind, []).append(part)

        out = {weight.part("qweight"): self._place(numbers())}
        for kind, found in small.items():
            out[weight.part(kind)] = self._place(part.view(np.uint8).data.cast("B") for part in found)
        return out

    def _place(self, parts: Iterable[memoryview]) -> Location:
        """Write bytes at the next aligned offset."""
        self._write(memoryview(bytes(-self.position % ALIGNMENT)))
        start = self.position
        for part in parts:
            self._write(part)
        return Location(self._path.name, start, self.position - start)

    def _write(self, data: memoryview) -> None:
        self._file.write(data)
        self.hash(data)


def _read_parts(path: Path) -> Iterator[memoryview]:
    """The bytes of a file; those of a chunk stay as they are."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield memoryview(chunk)


def _cut(chunks: Iterable[memoryview], size: int) -> Iterator[memoryview]:
    """The same bytes, each part a multiple of `size`; a part is valid until the next but one."""
    rest = b""
    for chunk in chunks:
        whole = chunk if not rest else memoryview(rest + bytes(chunk))
        cut = len(whole) - len(whole) % size
        rest = bytes(whole[cut:])
        yield whole[:cut]


_NUMPY = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def _convert(values: NDArray[np.generic], dtype: str, source: TensorInfo) -> memoryview:
    """Elements in another type, rounded to nearest even; the result does not share memory with `values`."""
    if source.dtype == "bfloat16" and dtype == "float32":
        # bfloat16 is the upper half of float32; ml_dtypes goes through a scalar loop that is slower.
        converted: NDArray[np.generic] = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):
            converted = values.astype(_NUMPY[dtype])
        if dtype == "float16" and source.dtype != "float16" and not np.isfinite(converted).all():
            worst = np.abs(values.astype(np.float32)).max()
            raise CheckpointError(
                f"{source.file}: {source.name} holds {worst:g}, which float16 (at most 65504) cannot represent; "
                "build with --precision bf16 or fp32"
            )
    return converted.view(np.uint8).data
