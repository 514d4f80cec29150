"""Packages on the CUDA provider keep what the official code kept. Skipped where there is no GPU.

pip install onnxruntime-gpu, then: make plugins CUDA=ON && pytest tests/gpu
"""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from support import GOLDEN, build_case, check_batch, random_tokens

from trimkv_export.backends.native import built_with_cuda, find_library
from trimkv_export.runtime import Engine
from trimkv_export.verify import replay_case

TOLERANCE = 1e-3  # a batch may go through other matrix kernels than a single row

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
        check_batch(engine, TOLERANCE)


def test_cuda_graphs_change_nothing(package: Path) -> None:
    rows = 3
    with (
        Engine.open(package, "cuda", max_sessions=rows) as plain,
        Engine.open(package, "cuda", max_sessions=rows, cuda_graph=True) as graphed,
    ):
        pairs = [(graphed.session(), plain.session()) for _ in range(rows)]
        # Alone: prefill, decode with evictions, prefill again, which makes the kernels' workspaces grow, and decode.
        ours, theirs = pairs[0]
        for part in (random_tokens(5), *([token] for token in random_tokens(30, 1)), random_tokens(16, 2), [3], [4]):
            assert abs(ours.step(part) - theirs.step(part)).max() < TOLERANCE
            assert np.array_equal(ours.kept(), theirs.kept())
        # Together, two and three rows at a time.
        for step in range(30):
            chosen = pairs[step % 2 :]
            logits = [
                engine.step_many([(pair[side], [step + row]) for row, pair in enumerate(chosen)])
                for side, engine in enumerate((graphed, plain))
            ]
            for with_graph, without in zip(*logits, strict=True):
                assert abs(with_graph - without).max() < TOLERANCE
            for ours, theirs in pairs:
                assert np.array_equal(ours.kept(), theirs.kept())
        assert all(ours.evictions > 3 for ours, _ in pairs)
