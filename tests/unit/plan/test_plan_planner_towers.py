"""Plans of models whose vision tower has windows, or takes images of one size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import build, write_gates
from visual_models import LLAVA_1_5_7B, QWEN2_5_VL_7B, save_checkpoint, visual_model

from trimkv_export.config import PlanOptions, Precision
from trimkv_export.errors import OptionError
from trimkv_export.graph import build_vision
from trimkv_export.models import VisionSpec, vision_spec
from trimkv_export.plan.activations import graph_activations
from trimkv_export.plan.planner import ModelPlan, plan_model, window_tokens
from trimkv_export.vision.grid import vision_grid

CONFIGS = {"qwen2_5_vl": QWEN2_5_VL_7B, "llava": LLAVA_1_5_7B}


def tower(family: str) -> VisionSpec:
    found = vision_spec(CONFIGS[family], Path("config.json"))
    assert found is not None
    return found[0]


def planned(family: str, folder: Path, **changes: Any) -> ModelPlan:
    if not folder.joinpath("base").exists():
        folder.joinpath("base").mkdir()
        folder.joinpath("base", "config.json").write_text(json.dumps(CONFIGS[family]))
        write_gates(folder / "gates", "rg", 1, 16, 1)
    values: dict[str, Any] = {"budget": 64, "precision": Precision.FP16} | changes
    return plan_model(PlanOptions(str(folder / "base"), gates=str(folder / "gates"), **values))


@pytest.mark.parametrize(
    ("family", "layers", "hidden", "kv_heads", "backbone"),
    # Of LLaVA, without the last block of the tower and the norm behind it.
    [("qwen2_5_vl", 28, 3584, 4, 8_292_166_656), ("llava", 32, 4096, 32, 7_063_427_072 - 12_598_272)],
)
def test_parameters_of_the_real_models(
    family: str, layers: int, hidden: int, kv_heads: int, backbone: int, tmp_path: Path
) -> None:
    inner = 512
    gates = layers * ((hidden + 1) * inner + kv_heads * (inner + 1))
    assert planned(family, tmp_path).workload.parameters == backbone + gates


def test_activations_of_windows() -> None:
    """At the sizes of real grids, as shape inference has them."""
    spec = tower("qwen2_5_vl")
    model = build_vision(spec, Precision.FP16).model
    activations = graph_activations(model, multiple_of={"patches": 4})
    for frames, height, width in ((1, 16, 24), (2, 10, 30)):
        grid: dict[str, Any] = vision_grid(spec, height, width)
        windows, places = grid["window_patch"].shape
        dims = {"frames": frames, "patches": height * width, "windows": windows, "places": places, "keys": places}
        assert set(dims) == set(activations.dims)
        sizes = {tensor.name: tensor.nbytes for tensor in activations.lifetimes(**dims)}
        attended = [node.output[0] for node in model.graph.node if node.op_type == "Attention"]
        assert len(attended) == 28
        assert {sizes[name] for name in attended} == {frames * windows * places * spec.hidden_size * 2}
        mask = next(
            node.output[0] for node in model.graph.node if "window_mask" in node.input and node.op_type == "Expand"
        )
        assert sizes[mask] == frames * windows * places**2


@pytest.mark.parametrize("side", [1, 3, 4])
def test_the_plan_is_for_the_worst_grid(side: int) -> None:
    """The places in windows that grids take, of all grids of at most that many tokens."""
    spec = replace(tower("qwen2_5_vl"), window_size=28 * side)
    for tokens in (1, 2, 5, 16, 25, 61):
        grids = [(height, width) for height in range(1, tokens + 1) for width in range(1, tokens // height + 1)]
        taken = [vision_grid(spec, 2 * height, 2 * width)["window_patch"].size // 4 for height, width in grids]
        assert window_tokens(tokens, side) == max(taken)


def test_images_of_one_size(tmp_path: Path) -> None:
    plans = [planned("llava", tmp_path, max_image_tokens=tokens).plan.vision_bytes for tokens in (576, 577, 4096)]
    assert len(set(plans)) == 1
    with pytest.raises(
        OptionError, match="336 x 336 pixels and takes 576 tokens, and --max-image-tokens is 575; take 576"
    ):
        planned("llava", tmp_path, max_image_tokens=575)


def test_a_build_for_fewer_tokens_than_an_image_has(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, visual_model("llava"))
    with pytest.raises(OptionError, match="20 x 20 pixels and takes 25 tokens"):
        build(tmp_path, tmp_path / "package", max_image_tokens=24)
    assert not (tmp_path / "package").exists()
