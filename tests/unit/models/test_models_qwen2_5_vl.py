import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from visual_models import QWEN2_5_VL_7B

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models import VisualTokens, decoder_spec, tensor_names, vision_spec

WHERE = Path("somewhere/config.json")
FLAT = QWEN2_5_VL_7B
TOP = {name: value for name, value in FLAT.items() if name.endswith(("_token_id", "_config", "_type"))}
TEXT = {name: value for name, value in FLAT.items() if name not in TOP}
VISION: dict[str, Any] = FLAT["vision_config"]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    vision = vision_spec(config, WHERE)
    assert vision is not None
    return decoder_spec(config, WHERE).tensors() | vision[0].tensors()


def reference(config: dict[str, Any]) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(**copy.deepcopy(config))  # which writes into the objects it is given


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_of_transformers(tied: bool) -> None:
    config = FLAT | {"tie_word_embeddings": tied}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(reference(config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert shapes(config) == expected


def test_size_of_the_real_model() -> None:
    layer = 2 * 3584 + (3584 + 1) * 4608 + 3584**2 + 3 * 3584 * 18944
    block = 2 * 1280 + (1280 + 1) * 3840 + (1280 + 1) * 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280
    merger = 1280 + (5120 + 1) * 5120 + (5120 + 1) * 3584
    assert 28 * layer + 2 * 152064 * 3584 + 3584 + 32 * block + 1176 * 1280 + merger == 8_292_166_656
    assert sum(int(np.prod(shape)) for shape in shapes(FLAT).values()) == 8_292_166_656


def test_layouts_of_the_config() -> None:
    flat, nested = FLAT, TOP | {"text_config": TEXT}
    written = reference(FLAT).to_dict()  # by transformers 5
    assert "rope_parameters" in written["text_config"]
    assert decoder_spec(flat, WHERE) == decoder_spec(nested, WHERE) == decoder_spec(written, WHERE)
    assert vision_spec(flat, WHERE) == vision_spec(nested, WHERE) == vision_spec(written, WHERE)


def test_decoder() -> None:
    found = decoder_spec(FLAT, WHERE)
    assert (found.model_type, found.prefix, found.takes_visual_inputs) == ("qwen2_5_vl", "model.language_model.", True)
    assert (found.qkv_bias, found.output_bias, found.qk_norm, found.deepstack_layers) == (True, False, False, 0)
    assert found.rope.axes == (0,) * 16 + (1,) * 24 + (2,) * 24
    np.testing.assert_allclose(found.rope.inverse_frequencies, 1e6 ** -(np.arange(64) / 64), rtol=1e-6)
    assert found.max_position_embeddings == 128000


@pytest.mark.parametrize("text", [True, False])
def test_a_head_is_tied_if_the_model_or_the_decoder_says_so(text: bool) -> None:
    config = TOP | {"tie_word_embeddings": not text, "text_config": TEXT | {"tie_word_embeddings": text}}
    assert reference(config).tie_word_embeddings
    assert decoder_spec(config, WHERE).tie_word_embeddings


def test_vision() -> None:
    vision = vision_spec(FLAT, WHERE)
    assert vision is not None
    spec, tokens = vision
    assert (spec.head_dim, spec.patch_dim, spec.window_side, spec.tokens_per_second) == (80, 1176, 4, 2.0)
    assert spec.frame_tokens(24, 36) == 216
    assert (spec.image_size, spec.image_tokens, list(spec.unused)) == (None, 0, [])
    assert tokens == VisualTokens(151655, 151656, 151652, 151653)


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("visual.blocks.0.attn.qkv.bias", "model.visual.blocks.0.attn.qkv.bias"),
        ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("model.visual.merger.mlp.0.weight", "model.visual.merger.mlp.0.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names(stored: str, ours: str) -> None:
    assert ours in shapes(FLAT | {"vision_config": VISION | {"depth": 1}})
    assert tensor_names(FLAT, WHERE, [stored]) == {ours: stored}


def test_two_names_of_one_tensor() -> None:
    with pytest.raises(CheckpointError, match=r"'visual\.a' and 'model\.visual\.a' are the same tensor"):
        tensor_names(FLAT, WHERE, ["visual.a", "model.visual.a"])


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"window_size": 27}, CheckpointError, "'vision_config.window_size' must be at least the 28 pixels .* got 27"),
        ({"window_size": "x"}, CheckpointError, "'vision_config.window_size' must be a whole number .* got 'x'"),
        (
            {"fullatt_block_indexes": 7},
            CheckpointError,
            "'vision_config.fullatt_block_indexes' must be a list .* got 7",
        ),
        ({"fullatt_block_indexes": [-1]}, CheckpointError, r"'vision_config.fullatt_block_indexes' .* got \[-1\]"),
        ({"tokens_per_second": 0}, CheckpointError, "'vision_config.tokens_per_second' must be a number .* got 0"),
        ({"out_hidden_size": 5}, CheckpointError, "'vision_config.out_hidden_size' must be .* 3584, got 5"),
        ({"hidden_size": 96}, CheckpointError, "'vision_config.hidden_size' must be a multiple of 4 times .* got 96"),
        ({"in_channels": 1}, UnsupportedModelError, "vision_config.in_channels 1 is not supported; supported: 3"),
        ({"hidden_act": "tanh"}, UnsupportedModelError, "vision_config.hidden_act 'tanh' is not supported"),
    ],
)
def test_bad_vision_towers(change: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"{re.escape(str(WHERE))}: {said}"):
        vision_spec(FLAT | {"vision_config": VISION | change}, WHERE)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"use_sliding_window": True, "max_window_layers": 0}, UnsupportedModelError, "sees 32768 tokens back"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}},
            CheckpointError,
            r"mrope_section .*\[16, 24\]",
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_interleaved": True}},
            UnsupportedModelError,
            "rope_scaling.mrope_interleaved True is not supported; supported: false",
        ),
        ({"num_attention_heads": 27}, CheckpointError, "num_attention_heads"),
    ],
)
def test_bad_decoders(change: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        decoder_spec(FLAT | change, WHERE)


def test_bad_tokens() -> None:
    with pytest.raises(
        CheckpointError, match=r"'image_token_id' must be a whole number from 0 to 152063, .* got 152064"
    ):
        vision_spec(FLAT | {"image_token_id": 152064}, WHERE)


def test_sections_written_as_differences() -> None:
    """transformers leaves out what is as in its classes, whose sizes are those of the largest model."""
    text = {key: value for key, value in FLAT.items() if key not in ("model_type", "vision_config")}
    text |= {"hidden_size": 3584}
    vision = {"hidden_size": 1280, "tokens_per_second": 2}
    full = decoder_spec(FLAT, WHERE)
    assert decoder_spec(FLAT | {"vision_config": vision, "text_config": text}, WHERE) == full
    assert vision_spec(FLAT | {"vision_config": vision}, WHERE) == vision_spec(FLAT, WHERE)
