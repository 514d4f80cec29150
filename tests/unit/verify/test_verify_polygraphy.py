"""`verify --backend tensorrt`, on the stand-ins for TensorRT and CUDA, through Polygraphy itself."""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from support import MAX_IMAGE_TOKENS, Cli, build

from trimkv_export.backends import tensorrt as tensorrt_library
from trimkv_export.config import Target
from trimkv_export.errors import MissingDependencyError
from trimkv_export.runtime import tensorrt as backend_module
from trimkv_export.verify import compare_backends

pytestmark = pytest.mark.usefixtures("tensorrt")
needs_polygraphy = pytest.mark.usefixtures("polygraphy")


@pytest.fixture
def polygraphy() -> None:
    pytest.importorskip("polygraphy", reason="not installed: pip install polygraphy")


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "import_cuda", fake_tensorrt.CudaRuntime)


@pytest.fixture
def text(checkpoint: Path, tmp_path: Path, tensorrt: Path) -> Path:
    return build(checkpoint, tmp_path / "text", target=Target.TENSORRT).path


def spoil(monkeypatch: pytest.MonkeyPatch, tensor: str, row: int, value: float) -> None:
    """Let the engine's output be wrong after each run."""
    run = fake_tensorrt.IExecutionContext._run

    def spoiled(context: Any, shapes: Any, addresses: dict[str, int]) -> None:

        run(context, shapes, addresses)
        kind = ctypes.c_float if tensor == "logits" else ctypes.c_int32
        kind.from_address(addresses[tensor] + 4 * row).value = (
            kind(value).value if kind is ctypes.c_float else int(value)
        )

    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "_run", spoiled)


@needs_polygraphy
def test_text(cli: Cli, text: Path) -> None:
    done = cli("verify", text, "--backend", "tensorrt", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["passed"]
    assert (report["steps"], report["kept_mismatches"]) == (24, 0)
    assert report["max_logit_difference"] < 1e-5
    assert "Polygraphy" in report["compared_with"]


@needs_polygraphy
def test_a_model_that_sees(visual_checkpoint: Path, tmp_path: Path) -> None:
    package = build(visual_checkpoint, tmp_path / "p", target=Target.TENSORRT, max_image_tokens=MAX_IMAGE_TOKENS).path
    report = compare_backends(package)
    assert report.passed
    assert report.max_logit_difference < 1e-4


@needs_polygraphy
def test_other_logits(cli: Cli, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "logits", 3, 50)
    done = cli("verify", text, "--backend", "tensorrt")
    assert done.code == 9
    assert "0 of 24 steps keep other entries, logits differ by" in done.err


@needs_polygraphy
def test_logits_that_are_not_numbers(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "logits", 3, float("nan"))
    report = compare_backends(text)
    assert not report.passed
    assert np.isnan(report.max_logit_difference)


@needs_polygraphy
def test_other_entries(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "present.pool_position", 0, 999)
    report = compare_backends(text)
    assert not report.passed
    assert report.kept_mismatches > 10


def test_without_polygraphy(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.backend.base", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trimkv-export\[tensorrt\]'"):
        compare_backends(text)


def test_a_case_is_for_onnx_runtime(cli: Cli, text: Path) -> None:
    done = cli("verify", text, "--backend", "tensorrt", "--case", "tests/golden/rg_default")
    assert done.code == 2
    assert "the case tests/golden/rg_default is replayed by ONNX Runtime" in done.err


@needs_polygraphy
def test_a_package_plugin_is_loaded_on_request(
    cli: Cli, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nothing").mkdir()
    monkeypatch.setattr(tensorrt_library, "FOLDER", tmp_path / "nothing")
    done = cli("verify", text, "--backend", "tensorrt")
    assert (done.code, "--trust-package-plugin" in done.err) == (8, True)
    assert cli("verify", text, "--backend", "tensorrt", "--trust-package-plugin").code == 0
