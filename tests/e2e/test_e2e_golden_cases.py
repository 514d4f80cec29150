"""The acceptance test: packages keep what the official code kept, at every step of every recorded case."""

import json
from collections import Counter
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


def test_every_family_has_cases_of_its_gates() -> None:
    recorded = [json.loads((case / "case.json").read_text()) for case in GOLDEN]
    counts = Counter((arguments["arch"], arguments["gate"]) for arguments in recorded)
    # The official Phi-3 has no rg10 gates.
    assert {family for family, _ in counts} == {"llama", "phi3", "qwen2", "qwen3"}
    assert all(count >= (4 if family == "phi3" else 2) for (family, _), count in counts.items())
    assert len(counts) == 7
