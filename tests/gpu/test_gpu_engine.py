"""Packages on the CUDA provider keep what the official code kept. Skipped where there is no GPU.

pip install onnxruntime-gpu, then: make plugins CUDA=ON && pytest tests/gpu
"""

from pathlib import Path

import onnxruntime
import pytest
from support import GOLDEN, build_case

from trimkv_export.runtime import Engine
from trimkv_export.runtime.native import built_with_cuda, find_library
from trimkv_export.verify import replay_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not built_with_cuda(find_library()),
        reason="needs onnxruntime-gpu and `make plugins CUDA=ON`",
    ),
]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: path.name)
def test_official_kept_sets_and_logits(case: Path, tmp_path: Path) -> None:
    build_case(case, tmp_path / "package")
    with Engine.open(tmp_path / "package", "cuda") as engine:
        assert replay_case(engine, case).passed


def test_a_batch_equals_single_rows(package: Path) -> None:
    with Engine.open(package, "cuda", max_sessions=4) as engine:
        sessions = [engine.session() for _ in range(4)]
        for row, session in enumerate(sessions):
            session.step(list(range(3 + row)))
        together = engine.step_many([(session, [row]) for row, session in enumerate(sessions)])
        for row, session in enumerate(sessions):
            session.reset()
            session.step(list(range(3 + row)))
            assert abs(session.step([row]) - together[row]).max() < 1e-3
