"""Locate the tensors of a torch.save file (.pth) without torch and without loading them.

The file is a zip: `NAME/data.pkl` describes the tensors, `NAME/data/K` holds the raw bytes of storage K, uncompressed,
so a tensor is a range of the zip file itself.
"""

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NoReturn

from trimkv_export.checkpoint.tensors import TensorInfo, open_weights
from trimkv_export.checkpoint.torch_pickle import PickledTensor, read_tensor_pickle
from trimkv_export.dtypes import ITEM_BYTES
from trimkv_export.errors import CheckpointError
from trimkv_export.words import shorten

__all__ = ["read_torch_file"]

MAX_PICKLE_BYTES = 64 * 2**20  # the description of a million tensors; gates have a few hundred
CHUNK_BYTES = 2**20
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before 1.6


def read_torch_file(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a torch.save file, in the order of its dict. The checksum of each storage is verified.

    Raises:
        CheckpointError: the file cannot be read, is not a zip or is cut off, is of the format before torch 1.6,
            compressed, encrypted or big-endian, fails a checksum, names anything but tensors (nothing of it is ever
            run), or holds a tensor that is not contiguous or reaches outside its storage.
    """
    with open_weights(path) as file:
        head = file.read(len(LEGACY_MAGIC))
        if head == LEGACY_MAGIC:
            raise CheckpointError(
                f"{path}: was saved in the format before torch 1.6: save it again with "
                "torch.save(torch.load(path, weights_only=True), path), or as .safetensors"
            )
        return _Archive(path, file, head).tensors()


class _Archive:
    """An open torch.save zip."""

    def __init__(self, path: Path, file: BinaryIO, head: bytes) -> None:
        self.path = path
        self.file = file
        self.file_bytes = file.seek(0, 2)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError, EOFError) as error:
            if head.startswith(b"PK"):
                self.corrupt(f"has {self.file_bytes} bytes and no readable zip directory, so its end is missing")
            raise CheckpointError(f"{path}: is not a file of torch.save: expected a zip with NAME/data.pkl") from error
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) != len(entries):
            self.corrupt("has two entries of one name")
        roots = [name.removesuffix("data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise CheckpointError(
                f"{path}: is a zip, but not one of torch.save: expected one NAME/data.pkl, found {len(roots)}"
            )
        self.root = roots[0]

    def corrupt(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {what}: the file is corrupt or cut off; fetch it again")

    def tensors(self) -> dict[str, TensorInfo]:
        """Locate every tensor that data.pkl describes."""
        if self.root + "byteorder" in self.entries and self.small("byteorder", 16) != b"little":
            raise CheckpointError(
                f"{self.path}: was saved on a big-endian machine: save it again on a little-endian one"
            )
        pickled = read_tensor_pickle(self.small("data.pkl", MAX_PICKLE_BYTES), self.path)
        starts: dict[str, int] = {}
        for tensor in pickled.values():
            key = tensor.storage.key
            if key not in starts:
                starts[key] = self.verified_start(f"data/{key}")
        return {name: self.locate(name, tensor, starts[tensor.storage.key]) for name, tensor in pickled.items()}

    def locate(self, name: str, tensor: PickledTensor, start: int) -> TensorInfo:
        """Check one tensor against its storage, which starts at byte `start` of the file."""
        storage = tensor.storage
        itemsize, stored = ITEM_BYTES[storage.dtype], self.entry(f"data/{storage.key}").file_size
        if stored != storage.numel * itemsize:
            self.corrupt(
                f"{shorten(name)} needs a storage of {storage.numel} x {storage.dtype}, and entry data/{storage.key} "
                f"has {stored} bytes"
            )
        if len(tensor.shape) > 64:
            self.corrupt(f"{shorten(name)} has {len(tensor.shape)} dimensions")
        count = math.prod(tensor.shape)
        if not _is_contiguous(tensor):
            raise CheckpointError(
                f"{self.path}: {shorten(name)} of shape {list(tensor.shape)} has the strides {list(tensor.stride)} and "
                "is not contiguous: save it again after .contiguous()"
            )
        if tensor.offset + count > storage.numel:
            self.corrupt(
                f"{shorten(name)} takes elements {tensor.offset} to {tensor.offset + count} of a storage of "
                f"{storage.numel}"
            )
        offset = start + tensor.offset * itemsize
        return TensorInfo(name, storage.dtype, tensor.shape, self.path, offset, count * itemsize)

    def entry(self, name: str) -> zipfile.ZipInfo:
        """The zip entry `NAME/{name}`, uncompressed and not encrypted."""
        entry = self.entries.get(self.root + name)
        if entry is None:
            self.corrupt(f"entry {shorten(name)} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"{self.path}: entry {shorten(name)} is compressed or encrypted, which torch.save never does: unpack "
                "it and save it again with torch.save"
            )
        return entry

    def verified_start(self, name: str) -> int:
        """Where the bytes of an entry start in the file, once it is sure that they are there and unchanged.

        The local header's extra field (torch pads with it) has another length than the central directory's.
        """
        entry = self.entry(name)
        self.file.seek(entry.header_offset)
        local = self.file.read(30)
        if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
            self.corrupt(f"entry {shorten(name)} has no local header at byte {entry.header_offset}")
        name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
        start: int = entry.header_offset + 30 + name_bytes + extra_bytes
        if entry.compress_size != entry.file_size or start + entry.file_size > self.file_bytes:
            self.corrupt(f"entry {shorten(name)} has {entry.file_size} bytes, more than the file holds")
        checksum, left = 0, entry.file_size
        self.file.seek(start)
        while left and (data := self.file.read(min(left, CHUNK_BYTES))):
            checksum, left = zlib.crc32(data, checksum), left - len(data)
        # torch.serialization.set_crc32_options(False) writes 0: nothing to compare with.
        if left or (checksum != entry.CRC and entry.CRC):
            self.corrupt(f"entry {shorten(name)} has the checksum {checksum:#010x} and not {entry.CRC:#010x}")
        return start

    def small(self, name: str, limit: int) -> bytes:
        """Read a whole entry of at most `limit` bytes."""
        entry = self.entry(name)
        if entry.file_size > limit:
            self.corrupt(f"entry {shorten(name)} has {entry.file_size} bytes, at most {limit} are sensible")
        self.file.seek(self.verified_start(name))
        return self.file.read(entry.file_size)


def _is_contiguous(tensor: PickledTensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
