"""A package that was changed in any way is refused, with the reason."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import build, copy_package, seal, sealed

from trimkv_export.config import Precision
from trimkv_export.errors import EngineError, PackageError
from trimkv_export.package import Package
from trimkv_export.package import package as package_module
from trimkv_export.policy import plan_slab
from trimkv_export.runtime import Engine


@pytest.fixture
def damaged(package: Path, tmp_path: Path) -> Path:
    """A package that may be changed."""
    return copy_package(package, tmp_path / "damaged")


def test_opens_as_it_was_built(package: Path) -> None:
    opened = Package.open(str(package))
    on_disk = {file.name for file in package.iterdir()}
    assert set(opened.config.files) == on_disk - {"config.json"}
    assert opened.config.dump() == (package / "config.json").read_bytes()
    plan = json.loads((package / "memory_plan.json").read_text())
    slab = plan_slab(opened.config.cache)
    assert plan["cache_bytes"] == opened.config.as_dict()["cache_bytes"] == slab.nbytes == plan["slab"]["nbytes"]
    assert plan["cache_bytes"] == plan["plan"]["cache_bytes"]
    assert plan["weight_bytes"] == opened.config.weight_bytes
    assert plan["full_cache_bytes"] == opened.config.cache.full_cache_nbytes(plan["full_cache_context"])


@pytest.mark.parametrize("bit", [0, 2, 5, 7])
def test_every_byte_of_the_config_counts(damaged: Path, bit: int) -> None:
    file = damaged / "config.json"
    whole = file.read_bytes()
    for index, byte in enumerate(whole):
        file.write_bytes(whole[:index] + bytes([byte ^ 1 << bit]) + whole[index + 1 :])
        with pytest.raises(PackageError):
            Package.open(damaged)
    file.write_bytes(whole)
    Package.open(damaged)


def test_a_cut_or_longer_config(damaged: Path) -> None:
    file = damaged / "config.json"
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(PackageError):
            Package.open(damaged)
    for more in (b"\n", b" ", b"x", b"\0"):
        file.write_bytes(whole + more)
        with pytest.raises(PackageError):
            Package.open(damaged)


def places(size: int) -> list[int]:
    return sorted({0, size - 1, *range(0, size, max(1, size // 23))})


@pytest.mark.parametrize("quick", [True, False])
def test_a_flipped_byte_in_any_file(damaged: Path, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    if not quick:  # as if every file were too large to be read at opening
        monkeypatch.setattr(package_module, "QUICK_BYTES", 0)
    names = list(Package.open(damaged).config.files)
    assert {"decoder.onnx", "decoder.onnx.data", "memory_plan.json", "tokenizer.json"} <= set(names)
    for name in names:
        with (damaged / name).open("r+b", buffering=0) as file:
            for place in places((damaged / name).stat().st_size):
                byte = file.read(1) if file.seek(place) >= 0 else b""
                file.seek(place)
                file.write(bytes([byte[0] ^ 64]))
                with pytest.raises(PackageError, match=f"{name} was changed after the build"):
                    Package.open(damaged).verify_large_files()
                file.seek(place)
                file.write(byte)
    Package.open(damaged).verify_large_files()


def test_large_files_report_progress(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_module, "QUICK_BYTES", 5000)
    opened, seen = Package.open(package), [0]
    large = dict(opened.large_files())
    opened.verify_large_files(seen.append)
    assert sum(seen) == sum(large.values()) > 0
    assert all((package / name).stat().st_size == size > 5000 for name, size in large.items())


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json", "memory_plan.json"])
@pytest.mark.parametrize(
    ("change", "said"), [(append, "the build wrote"), (cut, "the build wrote"), (Path.unlink, "missing")]
)
def test_size_and_presence(damaged: Path, name: str, change: Callable[[Path], object], said: str) -> None:
    change(damaged / name)
    with pytest.raises(PackageError, match=f"{name}.*{said}"):
        Package.open(damaged)


@pytest.mark.parametrize(("version", "major"), [("3.0", True), ("1.1", True), ("20.0", True), ("", True), (None, True)])
def test_another_major_version(damaged: Path, version: object, major: bool) -> None:
    seal(damaged, {"format_version": version})
    with pytest.raises(PackageError, match=f"package format '{version}' cannot be read, this version reads 2.5"):
        Package.open(damaged)


def test_a_newer_minor_version_only_adds(damaged: Path) -> None:
    seal(damaged, {"format_version": "2.6", "something_new": [1]})
    assert Package.open(damaged).config.eviction.budget == 8


def test_an_older_minor_version_says_less(damaged: Path) -> None:
    body = json.loads((damaged / "config.json").read_text())
    del body["vision"], body["device"], body["engine"], body["quantization_method"]
    (damaged / "config.json").write_text(json.dumps(body))
    seal(damaged, {"format_version": "2.0"})
    config = Package.open(damaged).config
    assert (config.vision, config.device, config.engine) == (None, None, None)


def test_sealing_keeps_a_good_package_good(damaged: Path) -> None:
    before = (damaged / "config.json").read_bytes()
    seal(damaged)
    assert (damaged / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "something"}, "not the config of a package"),
        ({"precision": "fp8"}, "fp8"),
        ({"prefill_chunk": 17, "extra": 1}, "was changed"),
        ({"model": []}, "was changed"),
        ({"eviction": {"policy": "threshold", "budget": 4}}, "threshold"),
        ({"eviction": {"policy": "global", "budget": 0}}, "budget must be"),
        ({"cache_bytes": 1}, "was changed"),
    ],
)
def test_sealed_nonsense(damaged: Path, changes: dict[str, Any], said: str) -> None:
    seal(damaged, changes)
    with pytest.raises(PackageError, match=said):
        Package.open(damaged)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b"\xff\xfe", b'"trimkv-export"', b"{" * 50, b"[" * 100_000]
)
def test_other_files_as_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PackageError, match=r"config\.json"):
        Package.open(tmp_path)


@given(st.binary(max_size=60))
def test_any_bytes_as_config(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(content)
        with pytest.raises(PackageError):
            Package.open(folder)


def test_what_is_no_package(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="this is a checkpoint, not the config of a package"):
        Package.open(checkpoint / "base")
    with pytest.raises(PackageError, match="no such folder"):
        Package.open(tmp_path / "nothing")
    with pytest.raises(PackageError, match=r"no config\.json"):
        Package.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PackageError, match="no such folder"):
        Package.open(tmp_path / "file")


@pytest.mark.parametrize("changes", [{"budget": 9}, {"evict_every": 5}, {"policy": "per_head"}, {"prefill_chunk": 8}])
def test_the_graph_of_another_build(checkpoint: Path, damaged: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    other = build(checkpoint, tmp_path / "other", **changes).path
    shutil.copy(other / "decoder.onnx", damaged / "decoder.onnx")
    with pytest.raises(PackageError, match=r"decoder\.onnx"):
        Package.open(damaged)
    seal(damaged)
    Package.open(damaged)
    with pytest.raises(PackageError, match="of different builds"):
        Engine.open(damaged)


def test_a_graph_that_does_not_load(damaged: Path) -> None:
    """Bytes that are no graph are found before ONNX Runtime sees them; what it does not take, by it."""
    (damaged / "decoder.onnx").write_bytes(b"nonsense")
    seal(damaged)
    with pytest.raises(PackageError, match=r"decoder\.onnx is not an ONNX graph"):
        Engine.open(damaged)
    (damaged / "decoder.onnx").write_bytes(onnx.ModelProto(ir_version=11).SerializeToString())
    seal(damaged)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load decoder\.onnx"):
        Engine.open(damaged)


def test_the_digest_names_the_build(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    config = Package.open(package).config
    again = build(checkpoint, tmp_path / "again").config
    assert config.digest == again.digest
    assert (package / "decoder.onnx").read_bytes() == (tmp_path / "again" / "decoder.onnx").read_bytes()
    for change in ({"prefill_chunk": 17}, {"precision": Precision.FP16}, {"weight_bytes": 1}):
        assert dataclasses.replace(config, **change).digest != config.digest


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../b", "", "config.json", "a//b", "./a"])
def test_names_outside_the_package(damaged: Path, name: str) -> None:
    body = json.loads((damaged / "config.json").read_text())
    body["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (damaged / "config.json").write_bytes(sealed(body))
    with pytest.raises(PackageError, match=r"files has .*, which"):
        Package.open(damaged)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "unlisted.data", "*/_ORT_MEM_ADDR_/*"])
@pytest.mark.parametrize("place", ["initializer", "function", "subgraph"])
def test_a_graph_that_reads_other_files(damaged: Path, location: str, place: str) -> None:
    """A package that is sealed again may not take weights from files that it does not list."""
    (damaged / "unlisted.data").write_bytes(bytes(64))
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    model = onnx.load(damaged / "decoder.onnx", load_external_data=False)
    constant = onnx.NodeProto(op_type="Constant", output=["y"])
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=tensor))
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "function":
        model.functions[0].node.append(constant)
    else:
        inner = onnx.AttributeProto(name="g", type=onnx.AttributeProto.GRAPH, g=onnx.GraphProto(node=[constant]))
        model.graph.node.append(onnx.NodeProto(op_type="If", attribute=[inner]))
    (damaged / "decoder.onnx").write_bytes(model.SerializeToString())
    seal(damaged)
    with pytest.raises(PackageError, match=r"decoder\.onnx takes weights from .* does not list"):
        Package.open(damaged)


def test_what_cannot_be_read(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no such folder"):
        Package.open(tmp_path / ("n" * 300))
    with pytest.raises(PackageError, match="no such folder"):
        Package.open("a\0b")
    for name in ("tokenizer.json", "config.json"):
        (damaged / name).unlink()
        os.mkfifo(damaged / name)
        with pytest.raises(PackageError, match=name):
            Package.open(damaged)


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("model", {"num_layers": 10**6}, "model.num_layers must be from 1 to 128, got 1,000,000"),
        ("model", {"head_dim": 10**9}, "model.head_dim must be from 1 to 256"),
        ("model", {"vocab_size": "x"}, "model.vocab_size must be a whole number .*, got 'x'"),
        ("model", {"rms_norm_eps": None}, "model.rms_norm_eps must be a finite number"),
        ("model", {"hidden_act": "sin"}, "model.hidden_act must be one of silu"),
        ("model", {"new": 1}, "model.new is not known, and is 1"),
        ("eviction", {"budget": 1 << 20}, None),
    ],
)
def test_hostile_values(damaged: Path, part: str, values: dict[str, Any], said: str | None) -> None:
    body = json.loads((damaged / "config.json").read_text())
    body[part] |= values
    (damaged / "config.json").write_bytes(sealed(body))
    with pytest.raises(PackageError, match=said or "was changed"):
        Package.open(damaged)
