"""Opening a package, and what running one imports."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import KERNELS, build, make_checkpoint

from trimkv_export.backends import native as native_module
from trimkv_export.backends.onnxruntime import import_onnxruntime
from trimkv_export.errors import EngineError, MissingDependencyError, OptionError, PackageError
from trimkv_export.policy import plan_slab
from trimkv_export.runtime import Engine
from trimkv_export.runtime import engine as engine_module

HEAVY = {"torch", "onnx", "transformers", "ml_dtypes", "jinja2", "matplotlib", "rich", "click", "huggingface_hub"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"provider": "tpu"}, "provider must be one of cpu, cuda, tensorrt, got 'tpu'"),
        ({"native": "yes"}, "native must be one of auto, require, off, got 'yes'"),
        ({"max_sessions": 0}, "max_sessions must be a whole number of at least 1, got 0"),
        ({"max_sessions": True}, "max_sessions .* got True"),
        ({"threads": 0}, "threads must be a whole number from 1 to 1024, got 0"),
        ({"threads": 99999999999}, "threads must be a whole number from 1 to 1024, got 99999999999"),
        ({"context": 0}, "context must be a whole number from 1 to 2147483647, got 0"),
        ({"context": 1e3}, "context .* got 1000.0"),
        ({"threads": 1.5}, "threads .* got 1.5"),
    ],
)
def test_bad_options(package: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Engine.open(package, **options)


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_telemetry_of_onnxruntime_is_off_unless_asked_for(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if before is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", before)
    import_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == after


def test_native_kernels_may_be_switched_off(package: Path) -> None:
    with Engine.open(str(package), "cpu", "off") as engine:
        assert engine.native is False


@pytest.mark.parametrize("kernels", KERNELS)
def test_native_kernels_are_taken_where_they_are_installed(package: Path, kernels: str) -> None:
    with Engine.open(package, native="off" if kernels == "portable" else "auto") as engine:
        assert engine.native is (kernels == "native")


def test_without_the_native_library(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_module, "FOLDER", tmp_path)
    with Engine.open(package) as engine:
        assert engine.native is False
    with pytest.raises(EngineError, match=r"native kernels are required, .* run `make plugins`"):
        Engine.open(package, native="require")
    with pytest.raises(EngineError, match="native kernels are required by the CUDA provider"):
        Engine.open(package, "cuda")


def test_cuda_needs_kernels_and_a_provider(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_module, "find_library", lambda: tmp_path / "library.so")
    with pytest.raises(EngineError, match=r"library\.so was built without CUDA"):
        Engine.open(package, "cuda")
    monkeypatch.setattr(engine_module, "built_with_cuda", lambda _: True)
    with pytest.raises(EngineError, match=r"this onnxruntime has no CUDAExecutionProvider .* install onnxruntime-gpu"):
        Engine.open(package, "cuda")


def test_a_native_library_that_does_not_load(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_module, "FOLDER", tmp_path)
    (tmp_path / native_module.LIBRARY).write_bytes(b"no library")
    with pytest.raises(EngineError, match=r"the native kernels cannot be loaded: .*; build them again"):
        Engine.open(package)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_cache_is_allocated_at_opening(package: Path, rows: int) -> None:
    with Engine.open(package, max_sessions=rows) as engine:
        assert engine.cache_bytes == plan_slab(engine.config.cache, rows).nbytes
        sessions = [engine.session() for _ in range(rows)]
        with pytest.raises(EngineError, match=f"all {rows} cache rows are in use; close a session"):
            engine.session()
        sessions[0].close()
        engine.session()


@pytest.mark.parametrize("rows", [10**9, 10**12, 10**18, 10**25])
@pytest.mark.parametrize("told", [True, False])
def test_a_cache_that_cannot_be_allocated(
    package: Path, rows: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not told:  # a system that does not say how much there is

        def silent() -> int:
            raise OptionError("no /proc")

        monkeypatch.setattr(engine_module, "available_memory", silent)
        if rows < 10**12:
            pytest.skip("the kernel may promise so much")
    with pytest.raises(
        EngineError, match=f"the cache of {rows:,} rows takes .*; open with fewer max_sessions, or build"
    ):
        Engine.open(package, max_sessions=rows)


@pytest.mark.parametrize("budget", [0, 9, -1, True, 4.0, "4"])
def test_bad_budgets(engine: Engine, budget: Any) -> None:
    with pytest.raises(OptionError, match=f"budget must be a whole number from 1 to 8, .* got {budget!r}"):
        engine.session(budget)
    for _ in range(4):
        engine.session(8)  # no row was lost


def test_the_minimum_per_head_bounds_the_budget(checkpoint: Path, tmp_path: Path) -> None:
    path = build(checkpoint, tmp_path / "package", min_tokens_per_head=3).path
    with Engine.open(path) as engine:
        with pytest.raises(OptionError, match="from 3 to 8"):
            engine.session(2)
        engine.session(3)


def test_a_bf16_package(checkpoint: Path, tmp_path: Path) -> None:
    path = build(checkpoint, tmp_path / "package", precision="bf16").path
    with pytest.raises(EngineError, match=r"bf16 package does not run .* --precision fp32"):
        Engine.open(path)


def test_without_onnxruntime(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="pip install 'trimkv-export\\[runtime\\]'"):
        Engine.open(package)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / "base" / name).unlink()
    with Engine.open(build(source, tmp_path / "package").path) as engine:
        engine.session().step([1])
        with pytest.raises(PackageError, match=r"tokenizer\.json"):
            _ = engine.tokenizer


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_runtime_is_light() -> None:
    assert not (HEAVY | {"onnxruntime", "tokenizers"}) & modules_after("import trimkv_export.runtime")


def test_running_a_package_is_light(package: Path) -> None:
    code = f"""
from trimkv_export.runtime import Engine, SamplingOptions
with Engine.open({str(package)!r}) as engine, engine.session() as session:
    tokens = engine.tokenizer.encode("What is kept?")
    new = list(session.generate(tokens, 20, SamplingOptions(0.8, seed=0)))
    engine.tokenizer.decode(new)
    session.kept()
"""
    found = modules_after(code)
    assert not HEAVY & found
    assert {"numpy", "onnxruntime", "tokenizers"} <= found
