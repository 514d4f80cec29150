"""The acceptance test: packages keep what the official code kept, at every step of every recorded case."""

from pathlib import Path

import pytest
from support import GOLDEN, GOLDEN_VISUAL, KERNELS, NATIVE_MODE, build_case

from trimkv_export.runtime import Engine
from trimkv_export.verify import replay_case


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", GOLDEN + GOLDEN_VISUAL, ids=lambda path: path.name)
def test_official_kept_sets_and_logits(case: Path, kernels: str, tmp_path: Path) -> None:
    recorded = build_case(case, tmp_path / "package")
    with Engine.open(tmp_path / "package", native=NATIVE_MODE[kernels], threads=1) as engine:
        report = replay_case(engine, case)
    assert (report.kept_mismatches, report.first_mismatch) == (0, None)
    assert report.max_logit_difference < 2e-4
    assert report.passed
    assert report.steps == len(recorded["chunks"]) + recorded["decode"]
