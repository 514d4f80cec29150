import json
from pathlib import Path

import onnx
import pytest
from support import GOLDEN, Cli, build, copy_package, seal

from trimkv_export.engine import package as package_module

CASE = next(path for path in GOLDEN if path.name == "rg10_default")


def test_a_good_package(cli: Cli, package: Path) -> None:
    done = cli("verify", package, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["passed"] is True
    assert (report["graph"], report["compared_with"]) == ("valid", "NumPy decoder and policy")
    assert report["evictions"] >= 3
    text = cli("verify", package)
    assert (text.code, text.err) == (0, "")
    assert "kept mismatches" in text.out


def test_a_recorded_case(cli: Cli, tmp_path: Path) -> None:
    path = build(CASE, tmp_path / "package", budget=8, evict_every=4, prefill_chunk=40).path
    done = cli("verify", path, "--case", CASE, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert (report["passed"], report["steps"], report["kept_mismatches"]) == (True, 25, 0)
    assert report["compared_with"] == f"case {CASE}"


def test_a_difference_is_reported_and_fails(cli: Cli, tmp_path: Path) -> None:
    path = build(CASE, tmp_path / "package", budget=8, evict_every=4, prefill_chunk=40, policy="per_head").path
    done = cli("verify", path, "--case", CASE, "--json")
    assert done.code == 9
    assert json.loads(done.out)["passed"] is False
    assert "steps keep other entries" in done.err
    assert cli("verify", path).code == 0


def test_a_bf16_package_is_checked_as_far_as_possible(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    path = build(checkpoint, tmp_path / "package", precision="bf16").path
    done = cli("verify", path, "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["passed"] is True
    assert report["engine"].startswith("not run")


def test_linked_weights(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    path = build(checkpoint, tmp_path / "package", precision="bf16", weights="link").path
    assert cli("verify", path).code == 0


@pytest.mark.parametrize("quick", [True, False])
def test_a_changed_weight(
    cli: Cli, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    bad = copy_package(package, tmp_path / "bad")
    data = bad / "decoder.onnx.data"
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    if not quick:
        monkeypatch.setattr(package_module, "QUICK_BYTES", 0)
    done = cli("verify", bad)
    assert (done.code, done.out) == (6, "")
    assert "decoder.onnx.data was changed after the build" in done.err


@pytest.mark.parametrize("damage", ["graph", "bytes"])
def test_an_invalid_graph(cli: Cli, package: Path, tmp_path: Path, damage: str) -> None:
    bad = copy_package(package, tmp_path / "bad")
    file = bad / "decoder.onnx"
    model = onnx.load(str(file), load_external_data=False)
    model.graph.node[3].op_type = "NoSuchOperator"
    file.write_bytes(model.SerializeToString() if damage == "graph" else b"\xff" * 100)
    seal(bad)
    done = cli("verify", bad)
    assert (done.code, done.out) == (9, "")
    assert "decoder.onnx is not a valid graph" in done.err
