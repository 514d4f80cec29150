import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from trimkv_export.checkpoint.safetensors_file import read_header
from trimkv_export.errors import CheckpointError


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def layout(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_equals_the_safetensors_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2]
    reference = {
        f"t.{index}.{dtype}": (torch.randn(shape, generator=generator) * 3).to(dtype)
        for index, shape in enumerate([(3, 5), (), (0, 4), (7,)])
        for dtype in dtypes
    }
    path = tmp_path / "model.safetensors"
    save_file(reference, path, metadata={"format": "pt"})
    found = read_header(path)
    assert set(found) == set(reference)
    for name, tensor in reference.items():
        info = found[name]
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == str(tensor.dtype).removeprefix("torch.")
        assert info.nbytes == tensor.nbytes
        np.testing.assert_array_equal(info.read().astype(np.float64), tensor.double().numpy())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"1234567", "7 bytes are too few"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\xff" * 20, "more than the format's 100000000"),
        (layout({})[:-1].replace(b"\x02", b"\xc8"), "has 17 bytes, its header promises 208: the download was cut off"),
        (layout({"a": entry()}, bytes(5)), r"header promises \d+: the download was cut off; fetch it again"),
        (layout({"a": entry()}, bytes(11)), "has 3 bytes after its last tensor"),
        (layout({}, b"x"), "has 1 bytes after its last tensor"),
        (layout(b"\xff\xfe", b""), "is not JSON"),
        (layout(b"{", b""), "is not JSON"),
        (layout(b"[" * 100_000, b""), "is not JSON"),
        (layout(b"[]", b""), "is not a JSON object"),
        (layout(b" {}", b""), "is not a JSON object"),
        (layout(b'{"a":{},"a":{}}'), "names 'a' twice"),
        (layout({"__metadata__": {"a": 1}}), "'__metadata__' is not a map"),
        (layout({"a": 3}), "'a' has no object"),
        (layout({"a": entry(dtype="F4")}), "'a' has the dtype 'F4', and this version knows BOOL"),
        (layout({"a": entry(dtype=None)}), "'a' has the dtype None"),
        (layout({"a": entry(shape=[-2])}), r"'a' has the shape \[-2\], not a list"),
        (layout({"a": entry(shape=[True, 2])}), r"'a' has the shape \[True, 2\]"),
        (layout({"a": entry(shape=[2.0])}), r"'a' has the shape \[2.0\]"),
        (layout({"a": entry(shape=[1] * 65)}), r"'a' has the shape \[1, 1, .*…, not a list of at most 64"),
        (layout({"a": entry(shape=[2**63])}), "'a' has the shape"),
        (layout({"a": entry(shape=None)}), "'a' has the shape None"),
        (layout({"a": entry(offsets=[8, 0])}), r"'a' has the data_offsets \[8, 0\], not \[begin, end\]"),
        (layout({"a": entry(offsets=[0])}), r"'a' has the data_offsets \[0\]"),
        (layout({"a": entry(offsets=[0, 7])}), r"'a' has 7 bytes of data, but dtype F32 and shape \[2\] take 8"),
        (layout({"a": entry(offsets=[4, 12])}, bytes(12)), "'a' starts at byte 4 .* leaves a hole"),
        (
            layout({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
            "'b' starts at byte 4 of the data and not at 8, so it overlaps",
        ),
        (layout({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "'b' starts at byte 12 .* leaves a hole"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_empty_and_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(layout({"__metadata__": {}}, b""))
    assert read_header(path) == {}
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


VALID = layout({"a": entry(), "b": entry("BF16", [3, 1], [8, 14]), "__metadata__": {"k": "v"}}, bytes(14))


@settings(max_examples=300)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, len(VALID)),
    tail=st.binary(max_size=3),
)
def test_fuzz_gives_a_result_or_a_checkpoint_error(edits: list[tuple[int, int]], cut: int, tail: bytes) -> None:
    content = bytearray(VALID)
    for place, value in edits:
        content[place] = value
    with tempfile.NamedTemporaryFile() as file:
        file.write((content[:cut] if cut % 2 else content) + tail)
        file.flush()
        try:
            for info in read_header(Path(file.name)).values():
                assert info.read().shape == info.shape
        except CheckpointError:
            pass


def test_a_hundred_thousand_names_twice(tmp_path: Path) -> None:
    """Found at the first one, and not by comparing each with each."""
    header = "{" + ",".join(f'"{number}":1' for number in range(100_000)) * 2
    body = (header.replace("}{", ",") + "}").replace('1"', '1,"').encode()
    (tmp_path / "many.safetensors").write_bytes(len(body).to_bytes(8, "little") + body)
    with pytest.raises(CheckpointError, match="its header names '0' twice"):
        read_header(tmp_path / "many.safetensors")


def test_a_pipe_in_place_of_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "model.safetensors")
