"""A session on disk.

8 bytes   magic "TRIMKV" and two version bytes
8 bytes   length of the header, little-endian
header    JSON: package (digest of its config), budget, tokens_seen, next_position
payload   the ten state tensors of the row, one after the other, in the order of STATE_TENSORS
32 bytes  sha256 of everything before
"""

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trimkv_export.errors import OutputError, PackageError
from trimkv_export.package import PackageConfig

__all__ = ["Snapshot", "read_snapshot", "write_snapshot"]

MAGIC = b"TRIMKV\x00\x01"
MAX_HEADER_BYTES = 1 << 16
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Snapshot:
    """The state of a session.

    Attributes:
        budget: kept entries per stream on average.
        tokens_seen: tokens fed so far.
        next_position: of the next token; with M-RoPE not `tokens_seen`.
        payload: the ten state tensors.
    """

    budget: int
    tokens_seen: int
    next_position: int
    payload: bytes


def write_snapshot(path: Path, config: PackageConfig, snapshot: Snapshot) -> None:
    """Write a session file; an older one is replaced only once the new one is whole.

    Raises:
        OutputError: it cannot be written.
    """
    header = {
        "package": config.digest,
        "budget": snapshot.budget,
        "tokens_seen": snapshot.tokens_seen,
        "next_position": snapshot.next_position,
    }
    text = json.dumps(header).encode()
    content = MAGIC + struct.pack("<Q", len(text)) + text + snapshot.payload
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content + hashlib.sha256(content).digest())
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise
    except OSError as error:
        raise OutputError(f"{path}: the session cannot be saved: {error.strerror or error}") from None


def read_snapshot(path: Path, config: PackageConfig) -> Snapshot:
    """Read a session file of this package.

    Raises:
        PackageError: it cannot be read, is damaged, or is of another package.
    """
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
    if not isinstance(header, dict) or header.get("package") != config.digest:
        raise PackageError(
            f"{path}: the session was saved with another package; open that one, or prefill the conversation again"
        )
    payload, digest = rest[:-DIGEST_BYTES], rest[-DIGEST_BYTES:]
    if len(payload) != config.cache.nbytes() or hashlib.sha256(magic + length + text + payload).digest() != digest:
        raise PackageError(f"{path}: the session file is damaged; save it again")
    return Snapshot(header["budget"], header["tokens_seen"], header["next_position"], payload)
