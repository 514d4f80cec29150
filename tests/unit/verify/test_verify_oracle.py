"""replay_case finds packages that differ from the recorded run, and refuses cases that cannot be compared."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import external_data_helper
from support import GOLDEN, build, copy_package, seal

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine
from trimkv_export.verify import CaseReport, replay_case
from trimkv_export.verify.oracle import RecordedCase

CASE = next(path for path in GOLDEN if path.name == "rg10_default")
OPTIONS: dict[str, Any] = {"budget": 8, "evict_every": 4, "prefill_chunk": 40}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CASE, tmp_path_factory.mktemp("golden") / "package", **OPTIONS).path


def replay(package: Path, case: Path = CASE) -> CaseReport:
    with Engine.open(package, threads=1) as engine:
        return replay_case(engine, case)


def test_report(golden: Path) -> None:
    report = replay(golden)
    assert report.as_dict() | {"max_logit_difference": 0} == {
        "case": "rg10_default",
        "steps": 25,
        "kept_mismatches": 0,
        "first_mismatch": None,
        "max_logit_difference": 0,
        "tolerance": 2e-4,
        "passed": True,
    }


@pytest.mark.parametrize(
    ("name", "kept_differs"),
    [
        ("model.layers.0.self_attn.q_proj.weight", None),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
        ("model.layers.1.self_attn.retention_gate.bias", True),
        ("model.layers.2.self_attn.retention_gate.linear3.weight", True),
    ],
)
def test_one_changed_weight(golden: Path, tmp_path: Path, name: str, kept_differs: bool | None) -> None:
    bad = copy_package(golden, tmp_path / "bad")
    model = onnx.load(str(bad / "decoder.onnx"), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    place = external_data_helper.ExternalDataInfo(tensor)
    with (bad / place.location).open("r+b") as file:
        file.seek(place.offset or 0)
        values = np.frombuffer(file.read(4 * 2), np.float32)
        file.seek(place.offset or 0)
        file.write((values + np.array([3, -3], np.float32)).tobytes())
    seal(bad)
    report = replay(bad)
    assert not report.passed
    if kept_differs is not None:
        assert (report.kept_mismatches > 0) == kept_differs
        assert (report.first_mismatch is not None) == kept_differs


def test_logits_that_are_not_finite(golden: Path, tmp_path: Path) -> None:
    case = shutil.copytree(CASE, tmp_path / "case")
    with np.load(CASE / "trace.npz") as archive:
        trace = dict(archive)
    trace["step_7_logits"][:] = np.nan
    np.savez(case / "trace.npz", allow_pickle=False, **trace)
    assert not replay(golden, case).passed


def test_another_policy_of_the_same_sizes(tmp_path: Path) -> None:
    report = replay(build(CASE, tmp_path / "package", **OPTIONS, policy="per_head").path)
    assert not report.passed
    assert report.kept_mismatches > 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 9}, "recorded with budget 8, the package has 9"),
        ({"evict_every": 5}, "recorded with buffer 4, the package has 5"),
        ({"min_tokens_per_head": 1}, "recorded with min_per_head 0, the package has 1"),
        ({"lookahead_steps": 2}, "recorded with lookahead 1, the package has 2"),
        ({"prefill_chunk": 39}, "has steps of 40 tokens, the package takes 39; build it with --prefill-chunk 40"),
    ],
)
def test_cases_of_another_build(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    package = build(CASE, tmp_path / "package", **OPTIONS | changes).path
    with pytest.raises(OptionError, match=said):
        replay(package)


def test_a_case_of_another_model(golden: Path) -> None:
    other = next(path for path in GOLDEN if path.name == "rg_default")
    with pytest.raises(OptionError, match="recorded with gate rg, the package has rg10"):
        replay(golden, other)


@pytest.mark.parametrize("damage", ["no_case", "no_trace", "bad_json", "cut_trace", "no_step", "no_tokens"])
def test_what_is_no_case(golden: Path, tmp_path: Path, damage: str) -> None:
    case = shutil.copytree(CASE, tmp_path / "case")
    trace = case / "trace.npz"
    match damage:
        case "no_case":
            (case / "case.json").unlink()
        case "no_trace":
            trace.unlink()
        case "bad_json":
            (case / "case.json").write_text("{")
        case "cut_trace":
            trace.write_bytes(trace.read_bytes()[:1000])
        case "no_step":
            with np.load(trace) as archive:
                arrays = {name: array for name, array in archive.items() if name != "step_7_kept"}
            np.savez(trace, allow_pickle=False, **arrays)
        case _:
            np.savez(trace, allow_pickle=False, chunks=np.ones(2))
    with pytest.raises(OptionError, match=r"is not a recorded case \(.*\); .* case.json, .* and trace.npz"):
        replay(golden, tmp_path / "case")


def test_a_recorded_step_that_differs(golden: Path, tmp_path: Path) -> None:
    case = shutil.copytree(CASE, tmp_path / "case")
    with np.load(CASE / "trace.npz") as archive:
        trace = dict(archive)
    trace["step_7_kept"][0, 2] += 1
    np.savez(case / "trace.npz", allow_pickle=False, **trace)
    report = replay(golden, case)
    assert (report.kept_mismatches, report.first_mismatch, report.passed) == (1, 7, False)
    assert json.loads(json.dumps(report.as_dict()))["first_mismatch"] == 7


def test_a_case_by_a_stranger(tmp_path: Path) -> None:
    """A pipe is not waited for, and nothing that NumPy says of an archive is a traceback."""
    (tmp_path / "case.json").write_text("{}")
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"x" * 1000):
        (tmp_path / "trace.npz").write_bytes(content)
        with pytest.raises(OptionError, match="is not a recorded case"):
            RecordedCase.open(tmp_path)
    for name in ("trace.npz", "case.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(OptionError, match="is not an ordinary file"):
            RecordedCase.open(tmp_path)
