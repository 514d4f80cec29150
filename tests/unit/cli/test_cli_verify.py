import json
import re
from pathlib import Path

import onnx
import pytest
from support import GOLDEN, GOLDEN_VISUAL, Cli, build, build_case, copy_package, make_checkpoint, seal

from trimkv_export.package import package as package_module

CASE = next(path for path in GOLDEN if path.name == "rg10_default")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 package of a small Qwen3-VL."""
    folder = tmp_path_factory.mktemp("seeing")
    return build(make_checkpoint(folder / "checkpoint", family="qwen3_vl"), folder / "package").path


def test_a_good_package(cli: Cli, package: Path) -> None:
    done = cli("verify", package, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["passed"] is True
    assert (report["graph"], report["compared_with"]) == ("valid", "NumPy decoder and policy")
    assert "pictures" not in report
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


def test_a_folder_that_is_no_case(cli: Cli, package: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nosuch"):
        done = cli("verify", package, "--case", folder)
        assert (done.code, done.out) == (2, "")
        assert f"{folder}: is not a recorded case" in done.err
        assert "a folder with case.json, the arguments of the recording, and trace.npz" in done.err


def test_a_text_that_cannot_be_read(cli: Cli, package: Path, tmp_path: Path) -> None:
    done = cli("verify", package, "--against", package, "--text", tmp_path / "nosuch")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: --text {tmp_path / 'nosuch'}: cannot be read: No such file or directory\n"


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


@pytest.mark.parametrize("graph", ["decoder.onnx", "vision.onnx"])
@pytest.mark.parametrize(("damage", "code", "said"), [("graph", 9, "is not a valid graph"), ("bytes", 6, "{graph}")])
def test_an_invalid_graph(
    cli: Cli, seeing: Path, tmp_path: Path, graph: str, damage: str, code: int, said: str
) -> None:
    """Bytes that are no graph at all make a damaged package; what is read from them is told on opening."""
    bad = copy_package(seeing, tmp_path / "bad")
    file = bad / graph
    model = onnx.load(str(file), load_external_data=False)
    model.graph.node[3].op_type = "NoSuchOperator"
    file.write_bytes(model.SerializeToString() if damage == "graph" else b"\xff" * 100)
    seal(bad)
    done = cli("verify", bad)
    assert (done.code, done.out) == (code, "")
    assert graph in done.err
    assert said.format(graph=graph) in done.err
    assert done.err.count("\n") == 1


def test_a_package_that_sees(cli: Cli, seeing: Path) -> None:
    done = cli("verify", seeing, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["passed"] is True
    assert report["compared_with"] == "NumPy decoder, vision tower and policy"
    assert report["pictures"] == 4
    checks = report["kernels"].values()
    assert report["max_visual_difference"] == max(check["max_visual_difference"] for check in checks)
    text = cli("verify", seeing)
    assert (text.code, text.err) == (0, "")
    assert re.search(r"pictures +4 *\n", text.out)
    assert "max visual difference" in text.out


def test_a_vision_tower_that_computes_something_else(cli: Cli, seeing: Path, tmp_path: Path) -> None:
    bad = copy_package(seeing, tmp_path / "bad")
    model = onnx.load(str(bad / "vision.onnx"), load_external_data=False)
    norm = next(node for node in model.graph.node if node.name == "model.visual.merger.norm")
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 1.0
    (bad / "vision.onnx").write_bytes(model.SerializeToString())
    seal(bad)
    done = cli("verify", bad, "--json")
    assert done.code == 9
    assert json.loads(done.out)["passed"] is False
    assert re.search(r"the vision tower by 0\.\d+ on 4 pictures \(tolerance 0.0002\)", done.err)


@pytest.mark.parametrize("quick", [True, False])
def test_a_changed_weight_of_the_vision_tower(
    cli: Cli, seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    bad = copy_package(seeing, tmp_path / "bad")
    data = bytearray((bad / "vision.onnx.data").read_bytes())
    data[1000] ^= 1
    (bad / "vision.onnx.data").write_bytes(data)
    if not quick:
        monkeypatch.setattr(package_module, "QUICK_BYTES", 0)
    done = cli("verify", bad)
    assert (done.code, done.out) == (6, "")
    assert "vision.onnx.data was changed after the build" in done.err


def test_a_recorded_case_with_images(cli: Cli, tmp_path: Path) -> None:
    case = next(path for path in GOLDEN_VISUAL if path.name == "rg10_cut_two_images")
    build_case(case, tmp_path / "package")
    done = cli("verify", tmp_path / "package", "--case", case, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert (report["passed"], report["compared_with"]) == (True, f"case {case}")
    assert "max_visual_difference" not in report
