"""TensorRT-LLM's engine folder, built with stand-ins for TensorRT and for the installed TensorRT-LLM."""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_tensorrt
import pytest
from support import build

from trimkv_export.backends.tensorrt import PLUGIN
from trimkv_export.build.tensorrt_llm import LOADER, installed_version
from trimkv_export.errors import EngineError, MissingDependencyError
from trimkv_export.package import Package

pytestmark = pytest.mark.usefixtures("tensorrt")


def install(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "tensorrt-llm" else real(name))


def test_the_engine_folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("1.2.1", monkeypatch)
    build(checkpoint, tmp_path / "package", target="tensorrt-llm", max_batch=3, precision="fp16")
    config = Package.open(tmp_path / "package").config
    names = {"config.json", "load.py", "rank0.engine", PLUGIN}
    assert {name for name in config.files if "/" in name} == {f"tensorrt-llm/{name}" for name in names}
    folder = tmp_path / "package" / "tensorrt-llm"
    assert (folder / "rank0.engine").samefile(tmp_path / "package" / "decoder.engine")
    content = json.loads((folder / "config.json").read_text())
    assert list(content) == ["version", "pretrained_config", "build_config"]
    model, limits = content["pretrained_config"], content["build_config"]
    assert (content["version"], model["dtype"]) == ("1.2.1", "float16")
    assert model["num_hidden_layers"] == config.model.num_layers
    assert (limits["max_batch_size"], limits["max_input_len"]) == (3, config.prefill_chunk)
    assert limits["plugin_config"]["gpt_attention_plugin"] is None


def test_the_loader(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("1.2.1", monkeypatch)
    build(checkpoint, tmp_path / "package", target="tensorrt-llm")
    registry = fake_tensorrt.IPluginRegistry()
    monkeypatch.setattr(fake_tensorrt, "get_plugin_registry", lambda: registry, raising=False)
    runtime = ModuleType("tensorrt_llm.runtime")
    session = SimpleNamespace(from_serialized_engine=lambda plan: plan)
    monkeypatch.setattr(runtime, "Session", session, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", ModuleType("tensorrt_llm"))
    monkeypatch.setitem(sys.modules, "tensorrt_llm.runtime", runtime)
    file = tmp_path / "package" / "tensorrt-llm" / "load.py"
    names = {"__file__": str(file), "__name__": "load"}
    exec(compile(file.read_text(), file, "exec"), names)  # noqa: S102
    load = names["load"]
    assert callable(load)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # trimkv-export is not installed
    with pytest.raises(SystemExit, match="pass --trust-package-plugin"):
        load()
    assert load(trust_package_plugin=True) == (tmp_path / "package" / "decoder.engine").read_bytes()
    assert registry.get_creator("PoolUpdate", "1", "trimkv")
    assert PLUGIN in LOADER


@pytest.mark.parametrize("version", ["0.17.0.post1", "1.2.1", "1.3.0rc20"])
def test_versions_with_an_engine_backend(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(version, monkeypatch)
    assert installed_version() == version


@pytest.mark.parametrize("version", ["1.3.0rc21", "1.3.0", "2.0.0rc1"])
def test_later_versions(version: str, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    install(version, monkeypatch)
    with pytest.raises(EngineError, match=rf"{version} has no engine backend.*Use --target tensorrt"):
        build(checkpoint, tmp_path / "package", target="tensorrt-llm")
    assert not (tmp_path / "package").exists()


def test_unknown_and_missing_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install tensorrt-llm==1\.2\.1"):
        installed_version()
    install("unknown", monkeypatch)
    with pytest.raises(EngineError, match="'unknown' is not a version"):
        installed_version()
