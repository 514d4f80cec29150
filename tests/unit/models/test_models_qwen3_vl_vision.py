from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models import VisionSpec
from trimkv_export.models.base import ConfigReader
from trimkv_export.models.qwen3_vl import vision

WHERE = Path("somewhere/config.json")
# Qwen/Qwen3-VL-4B-Instruct's.
VISION: dict[str, Any] = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "in_channels": 3, "patch_size": 16,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 2560, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17], "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl",
}  # fmt: skip
ROPE = {"rope_type": "axial", "rope_theta": 10000.0}


def spec(**change: Any) -> VisionSpec:
    config = {"vision_config": VISION | change, "text_config": {"hidden_size": 2560, "num_hidden_layers": 36}}
    return vision(ConfigReader(config, WHERE))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"deepstack_visual_indexes": []},
        {"deepstack_visual_indexes": [23, 0], "spatial_merge_size": 3, "temporal_patch_size": 1},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14, "num_position_embeddings": 50},
    ],
)
def test_tensors_are_those_of_transformers(change: dict[str, Any]) -> None:
    config = {name: value for name, value in (VISION | change).items() if name != "model_type"}
    with torch.device("meta"):
        model = Qwen3VLVisionModel(Qwen3VLVisionConfig(**config))
    expected = {f"model.visual.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert spec(**change).tensors() == expected


def test_sizes() -> None:
    found = spec()
    assert (found.head_dim, found.patch_dim, found.merged_size, found.norm_eps) == (64, 1536, 4096, 1e-6)
    assert found.deepstack_visual_indexes == (5, 11, 17)


def test_what_transformers_5_adds() -> None:
    config = Qwen3VLVisionConfig(**{name: value for name, value in VISION.items() if name != "model_type"})
    assert config.rope_parameters == ROPE
    assert spec(**config.to_dict()) == spec(rope_parameters=None) == spec()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": ROPE | {"rope_theta": 500.0}}, r"'vision_config.rope_parameters' \{.*500.0\} is not"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'vision_config.rope_parameters' .*'linear'"),
        ({"rope_parameters": [3]}, r"'vision_config.rope_parameters' \[3\] is not supported: only rope_type 'axial'"),
        ({"hidden_act": "swiglu"}, "vision_config.hidden_act 'swiglu' is not supported; supported: silu"),
    ],
)
def test_what_is_not_supported(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"somewhere/config.json: {said}"):
        spec(**change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"patch_size": [16, 16]},
            r"'vision_config.patch_size' must be a whole number from 1 .*, got \[16, 16\]",
        ),
        ({"num_position_embeddings": 0}, "'vision_config.num_position_embeddings' .* got 0"),
        ({"intermediate_size": None}, "'vision_config.intermediate_size' .* got None"),
        ({"spatial_merge_size": True}, "'vision_config.spatial_merge_size' .* got True"),
        ({"hidden_size": 96}, r"'vision_config.hidden_size' must be a multiple of 4 times num_heads \(16\), got 96"),
    ],
)
def test_bad_values(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"somewhere/config.json: {said}"):
        spec(**change)
