import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from visual_models import LLAVA_1_5_7B

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models import VisionSpec, VisualTokens, decoder_spec, tensor_names, vision_spec

WHERE = Path("somewhere/config.json")
CONFIG, VISION, TEXT = LLAVA_1_5_7B, LLAVA_1_5_7B["vision_config"], LLAVA_1_5_7B["text_config"]
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 2, "vocab_size": 40000}


def tower(config: dict[str, Any]) -> VisionSpec:
    vision = vision_spec(config, WHERE)
    assert vision is not None
    return vision[0]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return decoder_spec(config, WHERE).tensors() | tower(config).tensors()


def reference(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"multimodal_projector_bias": False, "vision_feature_layer": 3},
        {"text_config": QWEN2, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        {"vision_config": {"model_type": "clip_vision_model"}, "text_config": TEXT | {"attention_bias": True}},
    ],
)
def test_tensors_are_those_of_transformers(change: dict[str, Any]) -> None:
    config = CONFIG | change
    unused = tuple(tower(config).unused)
    expected = reference(config)
    assert shapes(config) == {name: shape for name, shape in expected.items() if not name.startswith(unused)}


def test_size_of_the_real_model() -> None:
    # Counted by hand, whole: 6,738,939,904 of Llama, 303,507,456 of CLIP, 20,979,712 of the projector. The features are
    # those of the last layer but one, so one block of 12,596,224 and a norm of 2,048 are left out.
    assert sum(int(np.prod(shape)) for shape in reference(CONFIG).values()) == 7_063_427_072
    found = sum(int(np.prod(shape)) for shape in shapes(CONFIG).values())
    assert found == 7_063_427_072 - 12_596_224 - 2_048 == 7_050_828_800


@pytest.mark.parametrize("text", [TEXT, QWEN2, {"vocab_size": 32064}])
def test_config_as_written_by_transformers_5(text: dict[str, Any]) -> None:
    config = CONFIG | {"text_config": text}
    written = LlavaConfig(**config).to_dict()
    assert "rope_parameters" in written["text_config"]
    assert decoder_spec(config, WHERE) == decoder_spec(written, WHERE)
    assert vision_spec(config, WHERE) == vision_spec(written, WHERE)


def test_decoder() -> None:
    found = decoder_spec(CONFIG, WHERE)
    assert (found.model_type, found.prefix, found.takes_visual_inputs) == ("llava", "model.language_model.", True)
    assert (found.num_layers, found.num_kv_heads, found.head_dim, found.intermediate_size) == (32, 32, 128, 11008)
    assert (found.rope.axes, found.max_position_embeddings, found.qkv_bias) == (None, 4096, False)
    qwen2 = decoder_spec(CONFIG | {"text_config": QWEN2 | {"num_attention_heads": 64}}, WHERE)
    assert (qwen2.num_layers, qwen2.num_kv_heads, qwen2.qkv_bias, qwen2.vocab_size) == (2, 32, True, 40000)


@pytest.mark.parametrize("text", [True, False])
def test_a_head_is_tied_if_the_model_or_the_decoder_says_so(text: bool) -> None:
    config = CONFIG | {"tie_word_embeddings": not text, "text_config": TEXT | {"tie_word_embeddings": text}}
    assert decoder_spec(config, WHERE).tie_word_embeddings


def test_vision() -> None:
    spec = tower(CONFIG)
    assert (spec.depth, spec.patch_dim, spec.temporal_patch_size, spec.spatial_merge_size) == (23, 588, 1, 1)
    assert (spec.image_patches, spec.image_tokens, spec.frame_tokens(24, 24)) == (576, 576, 576)
    assert (spec.tokens_per_second, spec.window_size, spec.norm_eps, spec.hidden_act) == (
        None,
        None,
        1e-5,
        "quick_gelu",
    )
    full = tower(CONFIG | {"vision_feature_select_strategy": "full"})
    assert full.image_tokens == full.frame_tokens(24, 24) == 577


@pytest.mark.parametrize(("layer", "depth"), [(-1, 24), (-24, 1), (1, 1), (24, 24), (-2, 23)])
def test_the_layer_of_the_features(layer: int, depth: int) -> None:
    spec = tower(CONFIG | {"vision_feature_layer": layer})
    assert spec.depth == depth
    assert sum("layers" in name for name in spec.unused) == 24 - depth


@pytest.mark.parametrize(
    ("change", "token"),
    [({}, 32000), ({"image_token_index": 5}, 5), ({"image_token_index": None, "image_token_id": 6}, 6)],
)
def test_tokens(change: dict[str, Any], token: int) -> None:
    vision = vision_spec(CONFIG | change, WHERE)
    assert vision is not None
    assert vision[1] == VisualTokens(image_token_id=token)


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("vision_tower.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("multi_modal_projector.linear_2.weight", "model.multi_modal_projector.linear_2.weight"),
        ("model.multi_modal_projector.linear_2.weight", "model.multi_modal_projector.linear_2.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
    ],
)
def test_names(stored: str, ours: str) -> None:
    assert ours in shapes(CONFIG)
    assert tensor_names(CONFIG, WHERE, [stored]) == {ours: stored}


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"vision_feature_layer": [-2, -5]}, CheckpointError, r"'vision_feature_layer' must be one .* got \[-2, -5\]"),
        ({"vision_feature_layer": -25}, CheckpointError, "'vision_feature_layer' must be one .* -24 to -1, got -25"),
        ({"vision_feature_layer": 0}, CheckpointError, "'vision_feature_layer' must be one layer, 1 to 24 .* got 0"),
        (
            {"vision_feature_select_strategy": "cls"},
            UnsupportedModelError,
            "vision_feature_select_strategy 'cls' is not supported; supported: default, full",
        ),
        ({"projector_hidden_act": "mish"}, UnsupportedModelError, "projector_hidden_act 'mish' is not supported"),
        ({"multimodal_projector_bias": 1}, CheckpointError, "'multimodal_projector_bias' must be true or false, got 1"),
        ({"image_token_index": 32064}, CheckpointError, "'image_token_index' must be .* a token id .* got 32064"),
        (
            {"text_config": {"model_type": "mistral"}},
            UnsupportedModelError,
            "text_config.model_type 'mistral' is not supported; supported: llama, qwen2",
        ),
        ({"text_config": 3}, CheckpointError, "'text_config' must be an object, got 3"),
    ],
)
def test_bad_configs(change: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"{re.escape(str(WHERE))}: {said}"):
        vision_spec(CONFIG | change, WHERE)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (
            {"model_type": "siglip_vision_model"},
            UnsupportedModelError,
            "vision_config.model_type 'siglip_vision_model' is not supported; supported: clip_vision_model",
        ),
        ({"num_channels": 1}, UnsupportedModelError, "vision_config.num_channels 1 is not supported; supported: 3"),
        ({"image_size": 340}, CheckpointError, r"'vision_config.image_size' must be a multiple of patch_size \(14\)"),
        ({"num_attention_heads": 15}, CheckpointError, "'vision_config.hidden_size' must be a multiple .* got 1024"),
        ({"layer_norm_eps": 0}, CheckpointError, "'vision_config.layer_norm_eps' must be a number above 0, got 0"),
        ({"hidden_act": "tanh"}, UnsupportedModelError, "vision_config.hidden_act 'tanh' is not supported"),
    ],
)
def test_bad_vision_towers(change: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"{re.escape(str(WHERE))}: {said}"):
        vision_spec(CONFIG | {"vision_config": VISION | change}, WHERE)


def test_the_layout_of_the_llava_project_is_said() -> None:
    config = {"model_type": "llava", "hidden_size": 4096, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    with pytest.raises(UnsupportedModelError, match=r"layout of the LLaVA project \(mm_vision_tower\), .* llava-hf"):
        decoder_spec(config, WHERE)
