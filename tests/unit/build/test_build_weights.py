"""Every initialiser of a package is the checkpoint's tensor, converted and bit for bit."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from converted_checkpoints import DTYPES, convert_checkpoint, tensors
from support import build, copy_package, initializers, make_checkpoint

from trimkv_export.build import weights as weights_module
from trimkv_export.checkpoint import open_backbone, open_gates
from trimkv_export.errors import CheckpointError, OutputError
from trimkv_export.package import Package
from trimkv_export.runtime import Engine


def assert_weights_equal(package: Path, checkpoint: Path, dtype: np.dtype[Any]) -> None:
    found, expected = initializers(package), tensors(checkpoint)
    assert set(found) == set(expected)
    for name, value in found.items():
        wanted = np.dtype(np.float32) if name.endswith("retention_gate.bias") else dtype
        assert value.dtype == wanted, name
        assert value.tobytes() == expected[name].astype(wanted).tobytes(), name


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_dtype_to_every_precision(
    checkpoint: Path, tmp_path: Path, source: str, precision: str, shards: int
) -> None:
    converted = convert_checkpoint(checkpoint, tmp_path / "checkpoint", DTYPES[source], shards)
    report = build(converted, tmp_path / "package", precision=precision)
    assert_weights_equal(report.path, converted, DTYPES[precision])
    size = DTYPES[precision].itemsize
    biases = 4 - size  # the gates' own biases are float32 everywhere
    expected = sum(
        value.size * size + value.size * biases * name.endswith("gate.bias")
        for name, value in tensors(converted).items()
    )
    assert report.config.weight_bytes == expected
    if precision != "bf16":
        with Engine.open(report.path, threads=1) as engine:
            assert np.isfinite(engine.session().step([1, 2, 3])).all()


@pytest.mark.parametrize("chunk", [7, 1 << 10])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_reads_that_end_inside_an_element(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, precision: str
) -> None:
    monkeypatch.setattr(weights_module, "CHUNK_BYTES", chunk)
    assert_weights_equal(
        build(checkpoint, tmp_path / "package", precision=precision).path, checkpoint, DTYPES[precision]
    )


def test_untied_and_rg(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", gate="rg", tie=False)
    path = build(source, tmp_path / "package").path
    assert "lm_head.weight" in initializers(path)
    assert_weights_equal(path, source, DTYPES["fp32"])


def test_what_needs_no_conversion_is_the_checkpoints_own_file(checkpoint: Path, tmp_path: Path) -> None:
    path = build(checkpoint, tmp_path / "package", precision="bf16").path
    file = checkpoint / "base" / "model.safetensors"
    assert (path / file.name).read_bytes() == file.read_bytes()
    assert not (path / file.name).samefile(file)
    assert (path / "decoder.onnx.data").stat().st_size < 20_000  # the gates
    onnx.checker.check_model(str(path / "decoder.onnx"), full_check=True)


def test_a_converted_package_passes_the_checker_and_holds_no_second_copy(package: Path, tmp_path: Path) -> None:
    package = copy_package(package, tmp_path / "own")  # other tests link the files of the shared one
    onnx.checker.check_model(str(package / "decoder.onnx"), full_check=True)
    assert not list(package.glob("*.safetensors"))
    weights = Package.open(package).config.weight_bytes
    assert weights <= (package / "decoder.onnx.data").stat().st_size < weights + 64 * 60


@pytest.mark.parametrize("shards", [1, 3])
def test_linked_weights(checkpoint: Path, tmp_path: Path, shards: int) -> None:
    source = convert_checkpoint(checkpoint, tmp_path / "checkpoint", DTYPES["fp32"], shards)
    files = sorted((source / "base").glob("*.safetensors"))
    path = build(source, tmp_path / "package", weights="link").path
    assert [(path / file.name).stat().st_ino for file in files] == [file.stat().st_ino for file in files]
    own = sum(f.stat().st_size for f in path.iterdir() if f.stat().st_nlink == 1)
    assert own < sum(file.stat().st_size for file in files)
    copied = build(source, tmp_path / "copied").path
    tokens = [1, 2, 3]
    with Engine.open(path, threads=1) as linked, Engine.open(copied, threads=1) as other:
        assert np.array_equal(linked.session().step(tokens), other.session().step(tokens))
    found = json.loads((path / "config.json").read_text())["files"]
    assert found == json.loads((copied / "config.json").read_text())["files"]


def test_links_lead_to_the_file_behind_a_symbolic_link(checkpoint: Path, tmp_path: Path) -> None:
    source = convert_checkpoint(checkpoint, tmp_path / "checkpoint", DTYPES["fp32"])
    file = source / "base" / "model.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")  # as in the hub's cache
    path = build(source, tmp_path / "package", weights="link").path
    assert (path / file.name).stat().st_ino == (tmp_path / "blob").stat().st_ino
    assert not (path / file.name).is_symlink()
    with Engine.open(path) as engine:
        engine.session().step([1])


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
def test_links_across_devices(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match=r"cannot hard-link .*model.safetensors.*--weights copy"):
        build(checkpoint, tmp_path / "package", precision="bf16", weights="link")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["base", "gates"])
def test_a_value_that_float16_cannot_hold(checkpoint: Path, tmp_path: Path, where: str) -> None:
    source = convert_checkpoint(checkpoint, tmp_path / "checkpoint", DTYPES["fp32"])
    name = {
        "base": "model.layers.1.mlp.up_proj.weight",
        "gates": "model.layers.1.self_attn.retention_gate.linear1.weight",
    }[where]
    info = tensors_info(source)[name]
    with info.file.open("r+b") as file:
        file.seek(info.offset + info.nbytes - 4)
        file.write(np.float32(-123456.0).tobytes())
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} holds 123456, which float16.*--precision bf16"):
        build(source, tmp_path / "package", precision="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    build(source, tmp_path / "package", precision="bf16")


def tensors_info(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = dict(open_backbone(checkpoint / "base").tensors)
    for layer in open_gates(checkpoint / "gates").layers:
        found |= {info.name: info for info in layer.values()}
    return found


def test_a_copy_of_a_package_is_a_package(package: Path, tmp_path: Path) -> None:
    copied = copy_package(package, tmp_path / "copy")
    model = onnx.load(str(copied / "decoder.onnx"))
    onnx.checker.check_model(model)
    with Engine.open(copied, threads=1) as one, Engine.open(package, threads=1) as other:
        assert np.array_equal(one.session().step([5]), other.session().step([5]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_hashes_on_record_are_those_of_the_files(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    report = build(checkpoint, tmp_path / "package", precision=precision)

    def record(file: Path) -> dict[str, Any]:
        return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}

    written = {file.name: record(file) for file in report.path.iterdir() if file.name != "config.json"}
    assert report.config.files == written
    inputs = [checkpoint / "base" / "config.json", checkpoint / "base" / "model.safetensors"]
    inputs += [checkpoint / "gates" / "config.json", checkpoint / "gates" / "trimkv_weights.pth"]
    roles = {"base": "model", "gates": "gates"}
    assert report.config.inputs == {f"{roles[file.parent.name]}/{file.name}": record(file) for file in inputs}
