"""The graphs of the other families' vision towers, against transformers: windows, class token, images of one size."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from vision_harness import run, with_weights
from visual_models import visual_model

from trimkv_export.config import FLOATS, Precision
from trimkv_export.graph import build_vision
from trimkv_export.graph.check import check_graph
from trimkv_export.models import VisionSpec, vision_spec

WINDOWED: dict[str, dict[str, Any]] = {
    "default": {},
    "one_token_windows": {"window_size": 8},
    "merge_3": {"spatial_merge_size": 3, "window_size": 40, "fullatt_block_indexes": [0]},
    "no_windows": {"fullatt_block_indexes": [0, 1, 2], "hidden_size": 40, "temporal_patch_size": 1},
    "windows_alone": {"fullatt_block_indexes": [], "num_heads": 1, "hidden_act": "gelu", "intermediate_size": 7},
}
GRIDS = [(1, 6, 6), (1, 6, 12), (1, 18, 6), (3, 6, 30), (2, 24, 18), (1, 42, 6)]
CLIP: dict[str, dict[str, Any]] = {
    "default": {},
    "full": {"vision_feature_select_strategy": "full"},
    "last": {"vision_feature_layer": -1, "multimodal_projector_bias": False},
    "first": {"vision_feature_layer": 1, "projector_hidden_act": "relu"},
    "one_patch": {"vision_config": {"image_size": 4, "layer_norm_eps": 0.1, "hidden_act": "gelu"}},
}


def spec_and_state(model: Any) -> tuple[VisionSpec, dict[str, torch.Tensor]]:
    found = vision_spec(model.config.to_dict(), Path())
    assert found is not None
    spec = found[0]
    assert {name for name in model.state_dict() if name.startswith(tuple(spec.unused))}.isdisjoint(spec.tensors())
    return spec, {name: model.state_dict()[name] for name in spec.tensors()}


def random_patches(spec: VisionSpec, grid: tuple[int, int, int]) -> NDArray[np.float32]:
    rng = np.random.default_rng(int(np.prod(grid)))
    return rng.standard_normal((int(np.prod(grid)), spec.patch_dim), np.float32)


def check(model: onnx.ModelProto) -> None:
    check_graph(model)
    onnx.checker.check_model(model, full_check=True)
    operators = {node.op_type for node in model.graph.node}
    # What TensorRT-RTX does not take, and arithmetic on shapes.
    assert operators.isdisjoint(
        {"NonZero", "ScatterND", "ScatterElements", "Sub", "Div", "Range", "Unique", "Compress"}
    )


@pytest.mark.parametrize("variant", WINDOWED)
def test_windows_equal_transformers(variant: str) -> None:
    model = visual_model("qwen2_5_vl", vision_config=WINDOWED[variant])
    spec, state = spec_and_state(model)
    graph = with_weights(spec, Precision.FP32, state)
    check(graph)
    for grid in GRIDS:
        pixels = random_patches(spec, grid)
        with torch.no_grad():
            expected = model.model.visual(torch.from_numpy(pixels), torch.tensor([grid])).pooler_output.numpy()
        (embeds,) = run(graph, spec, pixels, grid)
        assert embeds.shape == (grid[0] * spec.frame_tokens(*grid[1:]), spec.out_hidden_size)
        np.testing.assert_allclose(embeds, expected, atol=2e-5)


@pytest.mark.parametrize("variant", CLIP)
def test_images_of_one_size_equal_transformers(variant: str) -> None:
    model = visual_model("llava", **CLIP[variant])
    spec, state = spec_and_state(model)
    graph = with_weights(spec, Precision.FP32, state)
    check(graph)
    side, size = spec.image_size, spec.patch_size
    assert side is not None
    rows = side // size
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, side, side), np.float32))
    with torch.no_grad():
        expected = torch.cat(list(model.model.get_image_features(images).pooler_output)).numpy()
    pixels = images.reshape(2, 3, rows, size, rows, size).permute(0, 2, 4, 1, 3, 5).reshape(-1, spec.patch_dim).numpy()
    (embeds,) = run(graph, spec, pixels, (2, rows, rows))
    assert embeds.shape == (2 * spec.image_tokens, spec.out_hidden_size)
    np.testing.assert_allclose(embeds, expected, atol=2e-5)


@pytest.mark.parametrize(("family", "grid"), [("qwen2_5_vl", (2, 10, 14)), ("llava", (1, 5, 5))])
def test_half_precision(family: str, grid: tuple[int, int, int]) -> None:
    spec, state = spec_and_state(visual_model(family))
    pixels = random_patches(spec, grid)
    (exact,) = run(with_weights(spec, Precision.FP32, state), spec, pixels, grid)
    (half,) = run(with_weights(spec, Precision.FP16, state), spec, pixels, grid)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half.astype(np.float32), exact, atol=0.01 * np.abs(exact).max())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("precision", FLOATS)
def test_graph_is_valid(family: str, precision: Precision) -> None:
    graph = build_vision(spec_and_state(visual_model(family))[0], precision)
    check_graph(graph.model)
    assert {weight.dtype for weight in graph.weights} == {precision.dtype}
