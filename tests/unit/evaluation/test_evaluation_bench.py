"""measure: what `bench` prints, from Python."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from trimkv_export.errors import OptionError
from trimkv_export.evaluation import measure


def test_a_report(package: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = measure(
        package, prompt_tokens=40, new_tokens=3, batch=2, repeat=2, threads=1, progress=lambda *at: seen.append(at)
    )
    assert (len(report.prompt_seconds), len(report.step_seconds)) == (2 * 2, 2 * 2)
    total = 3 * 2 * (40 + 2)
    assert seen[-1] == (total, total)
    found = report.as_dict()
    assert found["decode_tokens_per_second"] == pytest.approx(2 * 4 / sum(report.step_seconds))
    assert found["prefill_tokens_per_second"] == pytest.approx(4 * 40 / sum(report.prompt_seconds))
    assert "plan" not in found


@pytest.mark.parametrize("changes", [{"repeat": 0}, {"warmup": -1}, {"new_tokens": 1.5}, {"batch": True}])
def test_bad_counts(package: Path, changes: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=r"must be a whole number from [01] to"):
        measure(package, **changes)  # type: ignore[arg-type]


def test_it_needs_no_package_of_the_builder(package: Path) -> None:
    code = (
        "import sys\nsys.modules['onnx'] = None\nfrom trimkv_export.cli import main\n"
        f"main(['bench', {str(package)!r}, '--prompt-tokens', '3', '--new-tokens', '2', '--repeat', '1'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
