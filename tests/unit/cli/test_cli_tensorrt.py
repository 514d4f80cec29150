"""From a checkpoint to tokens by TensorRT, command by command, on the stand-ins for TensorRT and CUDA."""

import json
from pathlib import Path

import fake_tensorrt
import pytest
from support import Cli

from trimkv_export.runtime import tensorrt as backend_module


@pytest.fixture(autouse=True)
def cuda(tensorrt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "import_cuda", fake_tensorrt.CudaRuntime)


@pytest.fixture
def built(cli: Cli, checkpoint: Path, tmp_path: Path) -> Path:
    done = cli(
        "build", "--model", checkpoint / "base", "--gates", checkpoint / "gates", "--budget", 8, "--target", "tensorrt",
        "--max-batch", 2, "--engine-weights", "stripped", "--timing-cache", tmp_path / "timing", "--output",
        tmp_path / "package",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert "decoder.engine" in done.out
    assert (tmp_path / "timing").exists()
    return tmp_path / "package"


def test_run_says_what_onnx_runtime_says(cli: Cli, built: Path) -> None:
    arguments = ("run", built, "--prompt", "The sky", "--max-new-tokens", 8, "--json")
    ours, theirs = (json.loads(cli(*arguments, "--provider", name).out) for name in ("tensorrt", "cpu"))
    assert ours["text"] == theirs["text"]
    assert ours["cache_bytes"] == theirs["cache_bytes"]


def test_bench(cli: Cli, built: Path) -> None:
    done = cli("bench", built, "--provider", "tensorrt", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["provider"] == "tensorrt"


def test_a_package_for_onnx_runtime(cli: Cli, package: Path) -> None:
    done = cli("run", package, "--prompt", "The sky", "--provider", "tensorrt")
    assert done.code == 8
    assert "has no TensorRT engine of the decoder; build it on this machine with --target tensorrt" in done.err


def test_doctor(cli: Cli, tensorrt: Path) -> None:
    report = json.loads(cli("doctor", "--json").out)
    assert report["tensorrt"]["tensorrt"] == "10.3.0"
    assert report["tensorrt_plugin"] == str(tensorrt)
    tensorrt.unlink()
    assert "not built" in cli("doctor").out
