"""check_package: what `verify` decides, from Python."""

import json
from pathlib import Path

import onnx
import pytest
from support import build, copy_package, make_checkpoint, seal

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


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose kernels round inputs of matrices to int8."""
    folder = tmp_path_factory.mktemp("rounding")
    sizes = {"hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "head_dim": 16}
    # Of random weights, some forms leave near ties that the rounding turns round: 0.02 to 0.28 of what is judged.
    form = {"precision": "int4", "head": "int4"}
    return build(make_checkpoint(folder / "checkpoint", **sizes), folder / "package", **form).path


def test_weights_of_a_quantised_package_are_judged_exactly(rounding: Path) -> None:
    """Without the rounding of inputs, to the tolerance of float32; with it, on text."""
    report = check_package(rounding)
    assert report.passed
    found = report.as_dict()
    assert found["max_logit_difference"] < found["tolerance"] == 2e-4
    assert 1e-4 < found["rounding_difference"] < found["rounding_tolerance"] == 0.5
    assert not list(rounding.parent.glob(".*"))


def test_a_matrix_with_the_scales_of_another(rounding: Path, tmp_path: Path) -> None:
    """The rounding of inputs would hide it."""
    bad = copy_package(rounding, tmp_path / "bad")
    model = onnx.load(str(bad / "decoder.onnx"), load_external_data=False)
    for node in model.graph.node:
        if node.name == "model.layers.1.mlp.down_proj":
            node.input[2] = "model.layers.0.mlp.down_proj.scales"
    (bad / "decoder.onnx").write_bytes(model.SerializeToString())
    seal(bad)
    report = check_package(bad)
    assert not report.passed
    with pytest.raises(VerificationError, match=r"logits differ by .*; rounding of inputs changes logits by"):
        report.require()


def test_rounding_that_changes_too_much(rounding: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimkv_export.verify.package.ROUNDING_TOLERANCE", 1e-6)
    report = check_package(rounding)
    assert not report.passed
    assert report.as_dict()["max_logit_difference"] < 2e-4


def test_rounding_without_a_tokenizer(rounding: Path, tmp_path: Path) -> None:
    """The model's own words are the text."""
    silent = copy_package(rounding, tmp_path / "silent")
    body = json.loads((silent / "config.json").read_text())
    body["companions"]["text"] = None
    for name in [name for name in body["files"] if name.startswith(("tokenizer", "chat_template"))]:
        del body["files"][name]
        (silent / name).unlink()
    (silent / "config.json").write_text(json.dumps(body))
    seal(silent)
    report = check_package(silent)
    assert report.passed
    assert "has no tokenizer.json" in report.notes[0]
    assert 0 < report.as_dict()["rounding_difference"] < 0.5
