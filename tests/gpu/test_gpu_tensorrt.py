"""Packages on TensorRT keep what the official code kept. Skipped without a GPU, TensorRT or the plugin library.

pip install -e '.[dev,tensorrt]' and TensorRT (docs/tensorrt.md), then: make -B plugins CUDA=ON TENSORRT_INCLUDE_DIR=…
&& pytest tests/gpu/test_gpu_tensorrt.py
"""

from pathlib import Path

import numpy as np
import pytest
from support import GOLDEN, GOLDEN_VISUAL, MAX_IMAGE_TOKENS, build, build_case, check_batch, random_tokens

from trimkv_export.backends.cuda import Cuda, import_cuda
from trimkv_export.backends.tensorrt import find_plugin, import_tensorrt
from trimkv_export.config import EngineWeights, Target
from trimkv_export.errors import TrimKVError
from trimkv_export.runtime import Engine
from trimkv_export.verify import compare_backends, replay_case

TOLERANCE = 1e-3  # a batch may go through other matrix kernels than a single row


def missing() -> str:
    """What of all that these tests need is not here."""
    try:
        import_tensorrt(Target.TENSORRT)
        Cuda(import_cuda())
    except (TrimKVError, RuntimeError) as error:
        return str(error)
    return "" if find_plugin() else "the plugin library was not built"


MISSING = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


@pytest.mark.parametrize("case", [*GOLDEN, *GOLDEN_VISUAL], ids=lambda path: path.name)
def test_official_kept_sets_and_logits(case: Path, tmp_path: Path) -> None:
    build_case(case, tmp_path / "package", target=Target.TENSORRT)
    with Engine.open(tmp_path / "package", "tensorrt") as engine:
        assert replay_case(engine, case).passed


@pytest.mark.parametrize("weights", EngineWeights)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_as_onnx_runtime(
    checkpoint: Path, visual_checkpoint: Path, tmp_path: Path, precision: str, weights: EngineWeights
) -> None:
    for name, source in (("text", checkpoint), ("visual", visual_checkpoint)):
        package = build(
            source, tmp_path / name, target=Target.TENSORRT, precision=precision, engine_weights=weights,
            max_image_tokens=MAX_IMAGE_TOKENS,
        ).path  # fmt: skip
        assert compare_backends(package).passed


def test_bf16_runs(checkpoint: Path, tmp_path: Path) -> None:
    package = build(checkpoint, tmp_path / "package", target=Target.TENSORRT, precision="bf16").path
    with Engine.open(package, "tensorrt") as engine, engine.session() as session:
        assert np.isfinite(session.prefill(random_tokens(60))).all()
        assert np.isfinite(session.step([1])).all()
        assert session.evictions


def test_a_batch_equals_single_rows(checkpoint: Path, tmp_path: Path) -> None:
    package = build(checkpoint, tmp_path / "package", target=Target.TENSORRT, max_batch=4).path
    with Engine.open(package, "tensorrt", max_sessions=4) as engine:
        check_batch(engine, TOLERANCE)
