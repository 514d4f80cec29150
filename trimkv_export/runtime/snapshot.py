"""A session on disk.

8 bytes   magic "TRIMKV" and two version bytes
8 bytes   length of the header, little-endian
header    JSON: package (digest of its config), budget, tokens_seen, next_position
payload   the ten state tensors of the row, one after the other, in the order of STATE_TENSORS
32 bytes  sha256 of everything before

The sha256 has no key: it tells a damaged file, not a forged one. So everything is looked at before a row is written.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import PackageError
from trimkv_export.files import writable
from trimkv_export.package import PackageConfig
from trimkv_export.policy.invariants import state_fault
from trimkv_export.words import shorten

__all__ = ["Snapshot", "check_package", "check_snapshot", "read_snapshot", "write_snapshot"]

MAGIC = b"TRIMKV\x00\x01"
MAX_HEADER_BYTES = 1 << 16
DIGEST_BYTES = 32
KEYS = {"package", "budget", "tokens_seen", "next_position"}
MAX_POSITION = 2**31 - 1


@dataclass(frozen=True)
class Snapshot:
    """The state of a session.

    Attributes:
        package: digest of the package's config.
        budget: kept entries per stream on average.
        tokens_seen: tokens fed.
        next_position: position of the next token; with M-RoPE not `tokens_seen`.
        payload: the ten state tensors of the row, one after the other.
    """

    package: str
    budget: int
    tokens_seen: int
    next_position: int
    payload: bytes


def check_package(snapshot: Snapshot, config: PackageConfig, where: str) -> None:
    """Raise PackageError, which names `where`, unless the snapshot says that it is of this package."""
    if snapshot.package != config.digest:
        raise PackageError(
            f"{where}: the session was saved with another package; open that one, or prefill the conversation again"
        )


def check_snapshot(snapshot: Snapshot, config: PackageConfig, where: str) -> None:
    """Raise PackageError, which names `where`, unless sessions of this package can have made the snapshot.

    Kernels take slots and counts as they find them, so nothing of a file may be written to a row before this.
    """
    check_package(snapshot, config, where)
    eviction, cache = config.eviction, config.cache
    numbers = (snapshot.budget, snapshot.tokens_seen, snapshot.next_position)
    fault = None
    if any(type(number) is not int for number in numbers):
        fault = f"its header has {shorten(numbers)} where whole numbers belong"
    elif not max(1, eviction.min_tokens_per_head) <= snapshot.budget <= eviction.budget:
        fault = f"budget {shorten(snapshot.budget)} is outside what the package was built for"
    elif len(snapshot.payload) != cache.nbytes():
        fault = f"it has {len(snapshot.payload):,} bytes of state, and the package {cache.nbytes():,}"
    else:
        state = dict(_tensors(snapshot.payload, config))
        seen = int(state["counters"][0])
        moves = config.model.rope.axes is not None  # with M-RoPE an image takes fewer or more positions than tokens
        if snapshot.tokens_seen != seen:
            fault = f"its header says {shorten(snapshot.tokens_seen)} tokens, its state {seen}"
        elif not (0 <= snapshot.next_position <= MAX_POSITION if moves else snapshot.next_position == seen):
            fault = f"next position {shorten(snapshot.next_position)} cannot follow {seen} tokens"
        else:
            fault = state_fault(state, cache)
    if fault:
        raise PackageError(f"{where}: the session is damaged or forged: {fault}; save it again")


def _tensors(payload: bytes, config: PackageConfig) -> Iterator[tuple[str, NDArray[Any]]]:
    """The state tensors without the batch dimension: views; bfloat16 as uint16."""
    offset = 0
    for tensor in config.cache.tensors():
        dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
        flat = np.frombuffer(payload, dtype, tensor.nbytes // dtype.itemsize, offset)
        yield tensor.name, flat.reshape(tensor.shape[1:])
        offset += tensor.nbytes


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a session file; an older one is replaced only once the new one is whole. Raises OutputError."""
    header = {
        "package": snapshot.package,
        "budget": snapshot.budget,
        "tokens_seen": snapshot.tokens_seen,
        "next_position": snapshot.next_position,
    }
    text = json.dumps(header).encode()
    content = MAGIC + struct.pack("<Q", len(text)) + text + snapshot.payload
    with writable(path, "the session cannot be saved", mode=0o600) as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def read_snapshot(path: Path, config: PackageConfig) -> Snapshot:
    """Read a session file of this package. Raises PackageError when it is damaged or of another package."""
    try:
        with path.open("rb") as file:
            magic, length = file.read(8), file.read(8)
            if magic != MAGIC or len(length) != 8 or (size := struct.unpack("<Q", length)[0]) > MAX_HEADER_BYTES:
                raise PackageError(f"{path}: this is not a session file of this version of trimkv-export")
            text = file.read(size)
            header = json.loads(text)
            rest = file.read(config.cache.nbytes() + DIGEST_BYTES + 1)
    except OSError as error:
        raise PackageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise PackageError(f"{path}: the session file is damaged; save it again") from None
    payload, digest = rest[:-DIGEST_BYTES], rest[-DIGEST_BYTES:]
    if not isinstance(header, dict) or header.keys() != KEYS:
        raise PackageError(f"{path}: the session file is damaged; save it again")
    # Before its hash: a session of another package has another size.
    if header["package"] == config.digest and (
        len(payload) != config.cache.nbytes() or hashlib.sha256(magic + length + text + payload).digest() != digest
    ):
        raise PackageError(f"{path}: the session file is damaged; save it again")
    snapshot = Snapshot(**header, payload=payload)
    check_snapshot(snapshot, config, str(path))
    return snapshot
