"""Places of patches, against what transformers computes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from trimkv_export.models import VisionModules, VisionSpec
from trimkv_export.vision.grid import vision_grid

GRIDS = [(1, 1), (2, 2), (4, 6), (6, 4), (12, 24), (48, 48), (50, 46), (94, 96), (24, 252)]
MODULES = VisionModules(
    patch="", block="", norm1="", norm2="", qkv=(), proj="", mlp_in=(), mlp_out="", merger="", merger_in="",
    merger_out="",
)  # fmt: skip


def spec(merge: int, head_dim: int = 8, **fields: Any) -> VisionSpec:
    sizes: dict[str, Any] = dict.fromkeys(("depth", "intermediate_size", "merger_size", "out_hidden_size"), 1)
    return VisionSpec(
        prefix="", modules=MODULES, hidden_act="relu", hidden_size=head_dim, num_heads=1, patch_size=14,
        spatial_merge_size=merge, **sizes | fields,
    )  # fmt: skip


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("positions", [1, 49, 64, 2304, 2400])  # 2400 is no square: the grid has 48 a side
def test_corners_are_those_of_transformers(positions: int, merge: int) -> None:
    side = int(positions**0.5)
    for height, width in ((h, w) for h, w in GRIDS if not (h % merge or w % merge)):
        index, weight = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, height, width]]), side, align_corners=True, spatial_merge_size=merge
        )
        found: dict[str, Any] = vision_grid(spec(merge, num_position_embeddings=positions), height, width)
        assert found["position_index"].dtype == np.int64
        assert found["position_weight"].dtype == np.float32
        np.testing.assert_array_equal(found["position_index"], index.T.numpy())
        np.testing.assert_allclose(found["position_weight"], weight.T.numpy(), atol=1e-7)


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [4, 8, 64, 72])
def test_angles_are_those_of_transformers(head_dim: int, merge: int) -> None:
    rope = {"rope_type": "axial", "rope_theta": 10000.0}
    reference = Qwen3VLVisionRotaryEmbedding(SimpleNamespace(head_dim=head_dim, rope_parameters=rope))
    for height, width in ((h, w) for h, w in GRIDS if not (h % merge or w % merge)):
        cos, sin = reference(torch.zeros(1), get_vision_position_ids(torch.tensor([[1, height, width]]), merge))
        grid: dict[str, Any] = vision_grid(spec(merge, head_dim), height, width)
        angle = grid["rotary_angle"]
        assert (angle.dtype, angle.shape) == (np.float32, (height * width, head_dim // 2))
        np.testing.assert_allclose(np.cos(angle), cos[:, : head_dim // 2].numpy(), atol=2e-5)
        np.testing.assert_allclose(np.sin(angle), sin[:, : head_dim // 2].numpy(), atol=2e-5)


def test_a_grid_of_the_learned_size_is_read_as_it_is() -> None:
    grid = vision_grid(spec(1, num_position_embeddings=36), 6, 6)
    np.testing.assert_array_equal(grid["position_index"][0], np.arange(36))
    np.testing.assert_array_equal(grid["position_weight"], np.eye(4, dtype=np.float32)[:, :1].repeat(36, axis=1))


def test_patches_of_a_token_follow_each_other() -> None:
    grid = vision_grid(spec(2, 4, num_position_embeddings=16), 4, 4)
    assert grid["position_index"][0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert grid["rotary_angle"][:8].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


@pytest.mark.parametrize(("merge", "window"), [(2, 112), (2, 28), (2, 130), (1, 42), (3, 84)])
def test_windows_are_those_of_transformers(merge: int, window: int) -> None:
    for height, width in ((h, w) for h, w in GRIDS if not (h % merge or w % merge)):
        order, ends = get_vision_window_index(torch.tensor([[1, height, width]]), merge, window, 14)
        token_patches = np.arange(height * width).reshape(-1, merge**2)
        expected = np.split(token_patches[order.numpy()].ravel(), ends.numpy()[1:-1])
        grid: dict[str, Any] = vision_grid(spec(merge, window_size=window), height, width)
        patch, mask, place = grid["window_patch"], grid["window_mask"], grid["window_place"]
        assert (patch.dtype, mask.dtype, place.dtype) == (np.int64, np.bool_, np.int64)
        assert mask.shape == (*patch.shape, patch.shape[1]) == (len(expected), *[max(map(len, expected))] * 2)
        for found, seen, wanted in zip(patch, mask, expected, strict=True):
            assert (seen == seen[0]).all()
            np.testing.assert_array_equal(found[seen[0]], wanted)
        np.testing.assert_array_equal(patch.ravel()[place], np.arange(height * width))


def test_inputs_are_those_of_the_tower() -> None:
    assert set(vision_grid(spec(2), 4, 6)) == {"rotary_angle"}
    assert vision_grid(spec(1, image_size=56, rotary=False, num_position_embeddings=17), 4, 4) == {}
