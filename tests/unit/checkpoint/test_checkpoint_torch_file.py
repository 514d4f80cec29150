import io
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_export.checkpoint.torch_file import read_torch_file
from trimkv_export.errors import CheckpointError


def compare(path: Path) -> None:
    reference = torch.load(path, weights_only=False)  # saved by the test itself; True knows protocol 2 only
    found = read_torch_file(path)
    assert list(found) == list(reference)
    for name, tensor in reference.items():
        info = found[name]
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(info.read().astype(np.float64), tensor.detach().double().numpy())


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def rezip(content: bytes, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Write the zip again with some entries (named without their folder) replaced, added or, for None, dropped."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", compression) as target:
        entries: dict[str, bytes | None] = {name: source.read(name) for name in source.namelist()}
        root = next(iter(entries)).partition("/")[0]
        for name, data in (entries | {f"{root}/{name}": data for name, data in changes.items()}).items():
            if data is not None:
                target.writestr(name, data)
    return buffer.getvalue()


SMALL = saved({"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)})


def refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trimkv_weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)


def test_equals_torch_load(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = OrderedDict(
        (str(dtype), (torch.randn(3, 5) * 3).to(dtype))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
    )
    tensors |= {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "int8": torch.tensor([-3], dtype=torch.int8),
        "int16": torch.tensor([-300], dtype=torch.int16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "tied": base,
        "view": base[8:20].reshape(3, 4),
        "row": base.reshape(1, 24).t().t(),  # odd strides in a dimension of size 1
    }
    for protocol in (2, 3, 4, 5):
        torch.save(tensors, tmp_path / "a.pth", pickle_protocol=protocol)
        compare(tmp_path / "a.pth")


def test_reads_with_the_warnings_module_of_python_3_10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "f.pth")
    real = warnings.catch_warnings
    # 3.11 added parameters.
    monkeypatch.setattr(warnings, "catch_warnings", lambda *, record=False: real(record=record))
    assert list(read_torch_file(tmp_path / "f.pth")) == ["a"]


def test_state_dict_of_a_module_with_metadata(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict(), tmp_path / "a.pth")
    compare(tmp_path / "a.pth")


def test_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    compare(tmp_path / "a.pth")


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "victim"
    for evil, name in [
        (Call(os.system, f"touch {victim}"), "posix.system"),
        (Call(eval, f"open({str(victim)!r}, 'w')"), "eval"),
        (Call(os.mkdir, str(victim)), "posix.mkdir"),
    ]:
        data = pickle.dumps({"a": evil}, protocol=protocol)
        message = "opcode" if protocol == 0 else f"{name}'; pickles can run code, and only tensors are accepted"
        refused(tmp_path, rezip(SMALL, {"data.pkl": data}), message)
        assert not victim.exists()


def test_torch_objects_other_than_tensors_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, saved(torch.nn.Linear(2, 2)), r"'torch\.nn\.modules\.linear\.Linear'; pickles can run code")
    refused(tmp_path, saved({"a": torch.zeros(2, dtype=torch.uint16)}), "'torch._utils._rebuild_tensor_v3'")
    refused(tmp_path, saved({"a": torch.zeros(2, dtype=torch.complex64)}), "'torch.ComplexFloatStorage'")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "holds a tensor, not a dict"),
        ([torch.ones(2)], "holds a list, not a dict"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict' is a dict, and only tensors are accepted"),
        ({"epoch": 3}, "'epoch' is a int, and only tensors"),
        ({3: torch.ones(2)}, "a key is a int, and only names"),
        ({"a": torch.ones(2, 3).t()}, r"'a' of shape \[3, 2\] has the strides \[1, 3\] and is not contiguous"),
        ({"a": torch.ones(1).expand(4)}, r"strides \[0\] and is not contiguous"),
    ],
)
def test_values_that_are_not_plain_tensors(tmp_path: Path, value: object, message: str) -> None:
    refused(tmp_path, saved(value), message)


def test_legacy_and_foreign_files(tmp_path: Path) -> None:
    legacy = saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    refused(tmp_path, legacy, "before torch 1.6: save it again")
    refused(tmp_path, b"", "is not a file of torch.save")
    refused(tmp_path, b"<html>not found</html>", "is not a file of torch.save")
    refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer")
    refused(tmp_path, rezip(SMALL, {"data.pkl": None}), "expected one NAME/data.pkl, found 0")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for size in range(2, len(SMALL), 97):
        refused(tmp_path, SMALL[:size], rf"has {size} bytes and no readable zip directory")


def test_damaged_zips(tmp_path: Path) -> None:
    refused(tmp_path, rezip(SMALL, {}, zipfile.ZIP_DEFLATED), "is compressed or encrypted")
    refused(tmp_path, rezip(SMALL, {"byteorder": b"big"}), "big-endian machine")
    refused(tmp_path, rezip(SMALL, {"byteorder": b"x" * 17}), "entry 'byteorder' has 17 bytes, at most 16")
    refused(tmp_path, rezip(SMALL, {"data/1": None}), "entry 'data/1' is missing")
    refused(tmp_path, rezip(SMALL, {"data/1": b"xx"}), "'b' needs a storage of 4 x bfloat16, and .* has 2 bytes")
    place = SMALL.index(torch.arange(4.0).numpy().tobytes())
    refused(tmp_path, SMALL[:place] + b"\x01" + SMALL[place + 1 :], "entry 'data/0' has the checksum")
    refused(tmp_path, SMALL.replace(b"PK\x03\x04", b"PK\x03\x05", 1), "'data.pkl' has no local header at byte 0")
    two = rezip(SMALL, {"data/2": b"x"}).replace(b"archive/data/2", b"archive/data/1")
    refused(tmp_path, two, "two entries of one name")


def test_storage_offset_out_of_range(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(SMALL)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        data = archive.read(name)
    moved = data.replace(b"QK\x00K\x04\x85", b"QK\x01K\x04\x85", 1)  # storage_offset 0 -> 1 of a tensor of shape (4,)
    assert moved != data
    refused(tmp_path, rezip(SMALL, {"data.pkl": moved}), "'a' takes elements 1 to 5 of a storage of 4")


# A tuple of 8 times a tuple of 8 times ..., 40 deep: small in memory, endless to print, compare or hash.
BOMB = b"\x80\x02)q\x00" + (b"(" + b"h\x00" * 8 + b"tq\x00") * 40


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a valid pickle"),
        (b".", "not a valid pickle"),
        (b"\x80\x02}", "not a valid pickle"),
        (b"\x80\x02h\x07.", "not a valid pickle"),
        (b"\x80\x02)K\x01s.", "not a valid pickle"),
        (b"\x80\x02}(X\x01\x00\x00\x00au.", "not a valid pickle"),
        (b"\x80\x02K\x01Q.", "not a valid pickle"),
        (b"\x80\x02ca\\u\nb\n.", "pickles can run code"),
        (b"\x80\x02K\x01)R.", "not a valid pickle"),
        (b"\x80\x02K\x01K\x02\x93.", "not a valid pickle"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR.", "not a valid pickle"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),  # the largest memo index; pickle.loads would allocate 64 GB
        (b"\x80\x02c__builtin__\neval\n\x81.", "'__builtin__.eval'"),
        (b"(i__builtin__\neval\n.", "'__builtin__.eval'"),
        (b"\x80\x02))\x81.", "opcode NEWOBJ; pickles can run code"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (BOMB + b".", "holds a tuple"),
        (BOMB + b"}h\x00K\x01s.", "a key is a tuple"),
        (BOMB + b"h\x00\x93.", "not a valid pickle"),
        (BOMB + b"Q.", "not a valid pickle"),
    ],
)
def test_odd_pickles(tmp_path: Path, data: bytes, message: str | None) -> None:
    content = rezip(SMALL, {"data.pkl": data})
    if message is None:
        (tmp_path / "a.pth").write_bytes(content)
        assert read_torch_file(tmp_path / "a.pth") == {}
    else:
        refused(tmp_path, content, message)


def read_fuzzed(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            for info in read_torch_file(Path(file.name)).values():
                assert info.read().shape == info.shape
        except CheckpointError:
            pass


def mutated(content: bytes, edits: list[tuple[float, int]], cut: float) -> bytes:
    changed = bytearray(content)
    for place, value in edits:
        changed[int(place * len(changed))] = value
    return bytes(changed[: int(cut * len(changed))] if cut < 0.5 else changed)


EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)
TIGHT = rezip(
    saved(OrderedDict(a=torch.ones(3), b=torch.nn.Parameter(torch.ones(2, 2)))), {".data/serialization_id": None}
)
DIRECTORY = TIGHT.index(b"PK\x01\x02")


@settings(max_examples=200)
@given(EDITS, st.floats(0, 1))
def test_fuzzed_zip(edits: list[tuple[float, int]], cut: float) -> None:
    read_fuzzed(mutated(TIGHT, edits, cut))


@settings(max_examples=200)
@given(EDITS)
def test_fuzzed_zip_directory(edits: list[tuple[float, int]]) -> None:
    read_fuzzed(TIGHT[:DIRECTORY] + mutated(TIGHT[DIRECTORY:], edits, 1))


@settings(max_examples=300)
@given(EDITS, st.floats(0, 1))
def test_fuzzed_pickle_with_a_right_checksum(edits: list[tuple[float, int]], cut: float) -> None:
    with zipfile.ZipFile(io.BytesIO(TIGHT)) as archive:
        data = archive.read("archive/data.pkl")
    read_fuzzed(rezip(TIGHT, {"data.pkl": mutated(data, edits, cut)}))


def test_data_offset_uses_the_local_extra_field(tmp_path: Path) -> None:
    """torch pads the local extra field to align data; the central directory's has another length."""
    (tmp_path / "a.pth").write_bytes(SMALL)
    info = read_torch_file(tmp_path / "a.pth")["a"]
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        entry = archive.getinfo("archive/data/0")
    local_extra = struct.unpack("<H", SMALL[entry.header_offset + 28 : entry.header_offset + 30])[0]
    assert local_extra != len(entry.extra)
    assert info.offset == entry.header_offset + 30 + len(entry.filename) + local_extra
