"""check_engine on packages that see: good ones pass, and whatever computes something else is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from seeing import FAMILIES, make_seeing_checkpoint
from support import GOLDEN_VISUAL, KERNELS, NATIVE_MODE, build, build_case, copy_package, make_checkpoint, seal

from trimkv_export.runtime import Engine, Session, vision_tower
from trimkv_export.runtime.vision_tower import VisualFeed
from trimkv_export.verify import SelfCheckReport, check_engine, replay_case
from trimkv_export.vision import positions
from trimkv_export.vision.grid import vision_grid

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rg10": ({}, {}),
    "rg_untied": ({"gate": "rg", "tie": False}, {}),
    "fp16": ({}, {"precision": "fp16"}),
    "per_head": ({}, {"policy": "per_head", "evict_every": 1}),
    "long_steps": ({}, {"budget": 40, "prefill_chunk": 100}),
    "single_steps": ({}, {"prefill_chunk": 1}),
    "one_layer": ({"layers": 1}, {}),
    "small_pictures": ({}, {"max_image_tokens": 7}),
    "single_tokens": ({}, {"max_image_tokens": 1}),
}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 package of a small Qwen3-VL."""
    folder = tmp_path_factory.mktemp("seeing")
    return build(make_checkpoint(folder / "checkpoint", family="qwen3_vl"), folder / "package").path


def check(package: Path) -> SelfCheckReport:
    with Engine.open(package, native="off", threads=1) as engine:
        return check_engine(engine)


@pytest.mark.parametrize("variant", VARIANTS)
def test_good_packages_pass(variant: str, tmp_path: Path) -> None:
    sizes, options = VARIANTS[variant]
    path = build(make_checkpoint(tmp_path / "checkpoint", family="qwen3_vl", **sizes), tmp_path / "package", **options)
    with Engine.open(path.path, threads=1) as engine:
        report = check_engine(engine)
        again = check_engine(engine, seed=1)
    assert report.passed
    assert again.passed
    assert report.evictions >= 3
    assert report.as_dict()["pictures"] == 4
    if variant != "fp16":
        assert (report.kept_mismatches, report.near_ties) == (0, 0)
        assert max(report.max_logit_difference, report.max_visual_difference) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_packages_of_other_families_pass(family: str, tmp_path: Path) -> None:
    path = build(make_seeing_checkpoint(tmp_path / "checkpoint", family), tmp_path / "package").path
    report = check(path)
    assert (report.passed, report.pictures, report.kept_mismatches, report.near_ties) == (True, 4, 0, 0)
    assert report.evictions >= 3
    assert max(report.max_logit_difference, report.max_visual_difference) < 1e-5


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_is_fed(seeing: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures cut by steps and two in one step, decode steps, and no token of a picture that is not there."""
    steps: list[tuple[list[int], list[list[int]]]] = []
    with Engine.open(seeing, native=NATIVE_MODE[kernels], threads=1) as engine:
        step = Session.step

        def listen(self: Session, tokens: Any, pixel_values: Any = None, grids: Any = None) -> Any:
            steps.append((tokens, [] if grids is None else grids.tolist()))
            return step(self, tokens, pixel_values, grids)

        monkeypatch.setattr(Session, "step", listen)
        assert check_engine(engine).passed
        info = engine.vision_info
    seen = [sum(token in info.placeholder_ids for token in tokens) for tokens, _ in steps]
    assert seen[:2] == [3, 1]
    assert [grids for _, grids in steps if grids] == [[[1, 4, 10]], [[1, 8, 4]], [[1, 2, 2], [2, 6, 4]]]
    assert sum(seen) == 10 + 8 + 1 + 12
    assert (len(steps[4][0]), seen[4]) == (1, 0)


def test_an_engine_without_its_tower_is_checked_on_text(seeing: Path) -> None:
    with Engine.open(seeing, vision=False, threads=1) as engine:
        report = check_engine(engine)
    assert (report.passed, report.pictures) == (True, 0)
    assert "pictures" not in report.as_dict()


Edit = Callable[[dict[str, onnx.NodeProto]], None]


def bypass(nodes: dict[str, onnx.NodeProto], name: str) -> None:
    """Let the readers of a node read its first input."""
    for node in nodes.values():
        for index, read in enumerate(node.input):
            if read == nodes[name].output[0]:
                node.input[index] = nodes[name].input[0]


def other_deepstack_merger(nodes: dict[str, onnx.NodeProto]) -> None:
    """The weights of two DeepStack mergers exchanged."""
    one, two = (nodes[f"model.visual.deepstack_merger_list.{k}.linear_fc2"] for k in (0, 1))
    one.input[1], two.input[1] = two.input[1], one.input[1]


def other_norm(nodes: dict[str, onnx.NodeProto]) -> None:
    nodes["model.visual.blocks.2.norm1"].input[2] = "model.visual.blocks.2.attn.proj.bias"


def tower_scale(nodes: dict[str, onnx.NodeProto]) -> None:
    next(a for a in nodes["model.visual.blocks.1.attn"].attribute if a.name == "scale").f *= 1.05


def other_activation(nodes: dict[str, onnx.NodeProto]) -> None:
    """The mergers' GELU is not the approximation that the blocks have."""
    merged = nodes["model.visual.merger.linear_fc1"].output[0]
    gelu = next(node for node in nodes.values() if node.op_type == "Gelu" and node.input[0] == merged)
    gelu.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))


def swapped_deepstack(nodes: dict[str, onnx.NodeProto]) -> None:
    """The features of the first two layers exchanged in the decoder."""
    one, two = (nodes[f"model.language_model.layers.{layer}.deepstack.add"] for layer in (0, 1))
    first, second = (next(node for node in nodes.values() if node.output[0] == add.input[1]) for add in (one, two))
    first.input[1], second.input[1] = second.input[1], first.input[1]


def no_deepstack(nodes: dict[str, onnx.NodeProto]) -> None:
    """Layer 1 without its feature."""
    bypass(nodes, "model.language_model.layers.1.deepstack")


def embeddings_not_replaced(nodes: dict[str, onnx.NodeProto]) -> None:
    bypass(nodes, "model.language_model.visual_embeds")


@pytest.mark.parametrize(
    ("graph", "edit"),
    [
        ("vision.onnx", other_deepstack_merger),
        ("vision.onnx", other_norm),
        ("vision.onnx", tower_scale),
        ("vision.onnx", other_activation),
        ("decoder.onnx", swapped_deepstack),
        ("decoder.onnx", no_deepstack),
        ("decoder.onnx", embeddings_not_replaced),
    ],
)
def test_a_graph_that_computes_something_else(seeing: Path, tmp_path: Path, graph: str, edit: Edit) -> None:
    bad = copy_package(seeing, tmp_path / "bad")
    model = onnx.load(str(bad / graph), load_external_data=False)
    edit({node.name: node for node in model.graph.node})
    (bad / graph).write_bytes(model.SerializeToString())
    seal(bad)
    report = check(bad)
    assert not report.passed
    assert report.as_dict()["passed"] is False
    assert (report.max_visual_difference > report.tolerance) == (graph == "vision.onnx")
    assert graph == "vision.onnx" or report.max_logit_difference > report.tolerance


@pytest.mark.parametrize(
    "change",
    [
        ("model", {"rope": {"axes": [0, 0, 2, 0]}}),
        ("model", {"rope": {"axes": [0, 0, 0, 0]}}),
        ("model", {"rope": {"attention_scaling": 1.5}}),
        ("vision", {"hidden_act": "relu"}),
        ("vision", {"deepstack_visual_indexes": [0, 2, 1]}),
    ],
    ids=lambda change: next(iter(change[1])),
)
def test_a_config_of_another_model(seeing: Path, tmp_path: Path, change: tuple[str, dict[str, Any]]) -> None:
    bad = copy_package(seeing, tmp_path / "bad")
    section, values = change
    config = json.loads((bad / "config.json").read_text())
    if "rope" in values:
        values = {"rope": config[section]["rope"] | values["rope"]}
    assert config[section] != config[section] | values
    seal(bad, {section: config[section] | values})
    assert not check(bad).passed


@pytest.fixture
def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that takes a picture's height for its width."""
    monkeypatch.setattr(vision_tower, "vision_grid", lambda info, height, width: vision_grid(info, width, height))


@pytest.fixture
def long_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose text goes on behind a picture as if each of its tokens had taken a position."""
    original = positions.MRopePositions.step

    def step(self: Any, tokens: Any) -> Any:
        positions = original(self, tokens)
        self.next_position += int(tokens.sum())
        return positions

    monkeypatch.setattr(positions.MRopePositions, "step", step)


@pytest.fixture
def repeated_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that gives a cut picture's first features again in each step."""
    fill = VisualFeed._fill

    def again(self: VisualFeed) -> None:
        fill(self)
        features = self._features
        if features is not None and self.count < len(features.embeds):
            self._embeds[: self.count * self._width] = features.embeds[: self.count].ravel()

    monkeypatch.setattr(VisualFeed, "_fill", again)


@pytest.mark.parametrize("damage", ["transposed", "long_pictures", "repeated_features"])
def test_a_runtime_that_feeds_something_else(seeing: Path, damage: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(damage)
    report = check(seeing)
    assert not report.passed
    assert (report.max_visual_difference > report.tolerance) == (damage == "transposed")


def test_features_that_are_not_finite(seeing: Path, tmp_path: Path) -> None:
    bad = copy_package(seeing, tmp_path / "bad")
    data = np.fromfile(bad / "vision.onnx.data", np.float32)
    data[:] = np.inf
    data.tofile(bad / "vision.onnx.data")
    seal(bad)
    with np.errstate(all="ignore"):
        report = check(bad)
    assert not report.passed
    assert np.isnan(report.max_visual_difference)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recorded case with an image, and its package."""
    case = next(path for path in GOLDEN_VISUAL if path.name == "rg10_one_image")
    package = tmp_path_factory.mktemp("recorded") / "package"
    build_case(case, package)
    return case, package


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "merger.linear_fc2.weight", "pos_embed.weight"])
def test_a_changed_weight_of_the_tower(recorded: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """The self-check shares the package's weights, so only the official code's record can tell (and its sha256)."""
    case, package = recorded
    bad = copy_package(package, tmp_path / "bad")
    model = onnx.load(str(bad / "vision.onnx"), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"model.visual.{name}")
    place = onnx.external_data_helper.ExternalDataInfo(tensor)
    with (bad / place.location).open("r+b") as file:
        file.seek(place.offset or 0)
        values = np.frombuffer(file.read(8), np.float32)
        file.seek(place.offset or 0)
        file.write((values + np.array([3, -3], np.float32)).tobytes())
    seal(bad)
    for path, passes in ((package, True), (bad, False)):
        with Engine.open(path, native="off", threads=1) as engine:
            assert replay_case(engine, case).passed == passes
