"""Read the header of a safetensors file: which tensors it holds and where. The data are not touched.

Layout: 8 bytes, the header's length N, little-endian; N bytes of JSON; then the data, tensor after tensor, no holes.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from pathlib import Path
from typing import Any

from trimkv_export.checkpoint.tensors import TensorInfo, open_weights
from trimkv_export.dtypes import ITEM_BYTES
from trimkv_export.errors import CheckpointError
from trimkv_export.words import first_line, shorten

__all__ = ["read_header"]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64  # NumPy's limit
MAX_DIMENSION = 2**63 - 1

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, in the order of their data.

    Raises:
        CheckpointError: the file cannot be read, or breaks the format in any way: length, JSON, dtype, shape, offsets
            (out of order, overlap, hole, size), or a file that is shorter or longer than its header promises.
    """
    with open_weights(path) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        if file_bytes < 8:
            raise CheckpointError(
                f"{path}: {file_bytes} bytes are too few for a safetensors file: the download was cut off; "
                "fetch it again"
            )
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: its header would have {header_bytes} bytes, more than the format's {MAX_HEADER_BYTES}: this "
                "is not a safetensors file; fetch it again"
            )
        if 8 + header_bytes > file_bytes:
            raise CheckpointError(_cut_off(path, file_bytes, 8 + header_bytes))
        header = _parse(path, file.read(header_bytes))
    data_start = 8 + header_bytes
    tensors = [_tensor(path, data_start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: {shorten(tensor.name)} starts at byte {tensor.offset - data_start} of the data and not at "
                f"{end - data_start}, so it {fault}: the file is corrupt; fetch it again"
            )
        end += tensor.nbytes
    if file_bytes < end:
        raise CheckpointError(_cut_off(path, file_bytes, end))
    if file_bytes > end:
        raise CheckpointError(
            f"{path}: has {file_bytes - end} bytes after its last tensor: the file is corrupt; fetch it again"
        )
    return {tensor.name: tensor for tensor in tensors}


def _cut_off(path: Path, found: int, promised: int) -> str:
    return f"{path}: has {found} bytes, its header promises {promised}: the download was cut off; fetch it again"


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    """Parse the header's JSON into name -> entry, without `__metadata__`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(
                    f"{path}: its header names {shorten(name)} twice: the file is corrupt; fetch it again"
                )
            found[name] = value
        return found

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # covers invalid UTF-8 and invalid JSON
        raise CheckpointError(
            f"{path}: its header is not JSON ({first_line(error)}): this is not a safetensors file, or it is corrupt; "
            "fetch it again"
        ) from error
    if not isinstance(header, dict) or not data.startswith(b"{"):
        raise CheckpointError(f"{path}: its header is not a JSON object: the file is corrupt; fetch it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"{path}: '__metadata__' is not a map from text to text: the file is corrupt; fetch it again"
        )
    return header


def _tensor(path: Path, data_start: int, name: str, entry: object) -> TensorInfo:
    """Check one header entry by itself and return it."""

    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {shorten(name)} has {what}: the file is corrupt; fetch it again")

    if not isinstance(entry, dict):
        raise fault("no object as its description")
    code: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{path}: {shorten(name)} has the dtype {shorten(code)}, and this version knows {', '.join(DTYPES)}: use "
            "weights in one of those"
        )
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise fault(f"the shape {shorten(shape)}, not a list of at most {MAX_DIMENSIONS} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault(f"the data_offsets {shorten(offsets)}, not [begin, end]")
    dtype, nbytes = DTYPES[code], offsets[1] - offsets[0]
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if nbytes != wanted:
        raise fault(f"{nbytes} bytes of data, but dtype {code} and shape {shape} take {wanted}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in value)
