"""A session on disk.

8 bytes   magic "TRIMKV" and two version bytes
8 bytes   length of the header, little-endian
header    JSON: package (digest of its config), budget, tokens_seen, next_position, pending
history   a uint32 for each token of the vocabulary, as TokenHistory has them
payload   the ten state tensors of the row, one after the other, in the order of STATE_TENSORS
32 bytes  sha256 of everything before

The sha256 has no key: it tells a damaged file, not a forged one. So everything is looked at before a row is written.
"""

import hashlib
import json
import stat
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
from trimkv_export.runtime.cache_memory import numpy_dtype
from trimkv_export.words import shorten

__all__ = ["Snapshot", "check_package", "check_snapshot", "read_snapshot", "write_snapshot"]

MAGIC, VERSION = b"TRIMKV\x00", 2
MAX_HEADER_BYTES = 1 << 16
DIGEST_BYTES = 32
KEYS = {"package", "budget", "tokens_seen", "next_position", "pending"}
MAX_POSITION = 2**31 - 1
MAX_PENDING = 1
DAMAGED = "the session file is damaged; save it again"


@dataclass(frozen=True)
class Snapshot:
    """The state of a session.

    Attributes:
        package: digest of the package's config.
        budget: kept entries per stream on average.
        tokens_seen: tokens fed.
        next_position: position of the next token; with M-RoPE not `tokens_seen`.
        pending: tokens of the last answer that were not fed, one at most.
        history: the words of the session's TokenHistory.
        payload: the ten state tensors of the row, one after the other.
    """

    package: str
    budget: int
    tokens_seen: int
    next_position: int
    pending: tuple[int, ...]
    history: bytes
    payload: bytes


def check_package(snapshot: Snapshot, config: PackageConfig, where: str) -> None:
    """Check that a snapshot says that it is of this package.

    Raises:
        PackageError: it does not; the message begins with `where`.
    """
    if snapshot.package != config.digest:
        raise PackageError(
            f"{where}: the session was saved with another package; open that one, or prefill the conversation again"
        )


def check_snapshot(snapshot: Snapshot, config: PackageConfig, where: str) -> None:
    """Check that sessions of this package can have made a snapshot.

    Kernels take slots and counts as they find them, so nothing of a file may be written to a row before this.

    Raises:
        PackageError: they cannot; the message begins with `where`.
    """
    check_package(snapshot, config, where)
    eviction, cache = config.eviction, config.cache
    numbers = (snapshot.budget, snapshot.tokens_seen, snapshot.next_position)
    fault = None
    if any(type(number) is not int for number in numbers):
        fault = f"its header has {shorten(numbers)} where whole numbers belong"
    elif not max(1, eviction.min_tokens_per_head) <= snapshot.budget <= eviction.budget:
        fault = f"budget {shorten(snapshot.budget)} is outside what the package was built for"
    elif not _pending_is_sound(snapshot.pending, config.model.vocab_size):
        fault = f"pending {shorten(snapshot.pending)} is not at most {MAX_PENDING} token"
    elif len(snapshot.payload) != cache.nbytes():
        fault = f"it has {len(snapshot.payload):,} bytes of state, and the package {cache.nbytes():,}"
    elif len(snapshot.history) != _history_nbytes(config):  # any words will do: they change only what is chosen
        fault = f"it has {len(snapshot.history):,} bytes of history, and the package {_history_nbytes(config):,}"
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
        dtype = np.dtype(numpy_dtype(tensor.dtype))
        flat = np.frombuffer(payload, dtype, tensor.nbytes // dtype.itemsize, offset)
        yield tensor.name, flat.reshape(tensor.shape[1:])
        offset += tensor.nbytes


def _pending_is_sound(pending: Any, vocab_size: int) -> bool:
    return (
        isinstance(pending, tuple)
        and len(pending) <= MAX_PENDING
        and all(type(token) is int and 0 <= token < vocab_size for token in pending)
    )


def _history_nbytes(config: PackageConfig) -> int:
    return config.model.vocab_size * np.dtype(np.uint32).itemsize


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a session file; an older one is replaced only once the new one is whole.

    Raises:
        OutputError: it cannot be written, or something that is not a file has this name.
    """
    header = {
        "package": snapshot.package,
        "budget": snapshot.budget,
        "tokens_seen": snapshot.tokens_seen,
        "next_position": snapshot.next_position,
        "pending": snapshot.pending,
    }
    text = json.dumps(header).encode()
    parts = (MAGIC, bytes([VERSION]), struct.pack("<Q", len(text)), text, snapshot.history, snapshot.payload)
    digest = hashlib.sha256()
    with writable(path, "the session cannot be saved", mode=0o600) as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.write(digest.digest())


def read_snapshot(path: Path, config: PackageConfig) -> Snapshot:
    """Read a session file of this package.

    Raises:
        PackageError: it cannot be read, is damaged or forged, or is of another package or version.
    """
    sizes = _history_nbytes(config), config.cache.nbytes()
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe might never end
            raise PackageError(f"{path}: is not a file; give what Session.save wrote")
        with path.open("rb") as file:
            beginning = file.read(len(MAGIC) + 1 + 8)
            magic, version = beginning[: len(MAGIC)], beginning[len(MAGIC) : len(MAGIC) + 1]
            if magic != MAGIC or version != bytes([VERSION]):
                earlier = magic == MAGIC and b"\0" < version < bytes([VERSION])
                raise PackageError(
                    f"{path}: this is not a session file of this version of trimkv-export"
                    + ("; an earlier one wrote it: prefill the conversation again" if earlier else "")
                )
            size = int.from_bytes(beginning[len(MAGIC) + 1 :], "little")
            if size > MAX_HEADER_BYTES:
                raise PackageError(f"{path}: {DAMAGED}")
            text, rest = file.read(size), file.read(sum(sizes) + DIGEST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        raise PackageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise PackageError(f"{path}: {DAMAGED}") from None
    if not isinstance(header, dict) or header.keys() != KEYS or not isinstance(header["pending"], list):
        raise PackageError(f"{path}: {DAMAGED}")
    content, digest = rest[:-DIGEST_BYTES], rest[-DIGEST_BYTES:]
    # Before its hash: a session of another package has another size.
    if header["package"] == config.digest and (
        len(content) != sum(sizes) or hashlib.sha256(beginning + text + content).digest() != digest
    ):
        raise PackageError(f"{path}: {DAMAGED}")
    header["pending"] = tuple(header["pending"])
    snapshot = Snapshot(**header, history=content[: sizes[0]], payload=content[sizes[0] :])
    check_snapshot(snapshot, config, str(path))
    return snapshot
