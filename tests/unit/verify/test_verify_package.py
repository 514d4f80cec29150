"""check_package: what `verify` decides, from Python."""

from pathlib import Path

import pytest
from support import build, copy_package, seal

from trimkv_export.backends.native import find_library
from trimkv_export.errors import OptionError, VerificationError
from trimkv_export.package import Package
from trimkv_export.package import package as package_module
from trimkv_export.verify import PackageReport, SelfCheckReport, check_package


def test_a_good_package(package: Path) -> None:
    report = check_package(package)
    assert report.passed
    assert list(report.checks) == ["portable"] + ["native"] * (find_library() is not None)
    assert report.files == len(Package.open(package).config.files)
    assert report.as_dict()["compared_with"] == report.compared_with == "NumPy decoder and policy"
    report.require()


def test_against_another_package(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = build(checkpoint, tmp_path / "fp16", precision="fp16").path
    report = check_package(other, against=package, text="Compare the two on this text.")
    assert report.against is not None
    path, comparison = report.against
    assert path == package
    assert comparison.prompt_tokens == len("Compare the two on this text.")
    assert 0 < comparison.logit_difference < 0.1
    assert report.as_dict()["against"]["package"] == str(package)


def test_the_worst_of_both_kinds_of_kernels(tmp_path: Path) -> None:
    def check(mismatches: int, difference: float) -> SelfCheckReport:
        return SelfCheckReport(9, 116, 16, 3, mismatches, 0, difference, 0, 0.0, 2e-4)

    report = PackageReport(tmp_path, 6, "NumPy decoder and policy", {"portable": check(0, 0), "native": check(2, 0.5)})
    assert not report.passed
    found = report.as_dict()
    assert (found["passed"], found["kept_mismatches"], found["max_logit_difference"]) == (False, 2, 0.5)
    with pytest.raises(VerificationError, match=r"with native kernels, 2 of 9 steps keep other .* differ by 0.5"):
        report.require()


def test_what_cannot_be_asked_is_refused_before_files_are_read(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Package, "open")
    with pytest.raises(OptionError, match="backend must be one of onnxruntime, tensorrt, got 'tpu'"):
        check_package(package, backend="tpu")
    with pytest.raises(OptionError, match="leave out the case, or the backend tensorrt"):
        check_package(package, case=tmp_path, backend="tensorrt")
    with pytest.raises(OptionError, match="is not a recorded case"):
        check_package(package, case=tmp_path)


def test_progress_counts_the_bytes_of_large_files(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy_package(package, tmp_path / "copied")
    seal(copied)
    monkeypatch.setattr(package_module, "QUICK_BYTES", 0)
    seen: list[tuple[str, int, int]] = []
    check_package(copied, progress=lambda *step: seen.append(step))
    total = sum(entry["bytes"] for entry in Package.open(copied).config.files.values())
    assert seen[-1] == ("sha256", total, total)
