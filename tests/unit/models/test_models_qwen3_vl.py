import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models import DecoderSpec, VisualTokens, decoder_spec, supported_model_types, vision_spec
from trimkv_export.models.base import ConfigReader
from trimkv_export.models.qwen3_vl import visual_tokens

WHERE = Path("somewhere/config.json")
# In the layout of Qwen/Qwen3-VL-4B-Instruct, which transformers 4 wrote.
TEXT: dict[str, Any] = {
    "model_type": "qwen3_vl_text",
    "num_hidden_layers": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 50,
    "hidden_act": "silu",
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 2], "mrope_interleaved": True},
    "rope_theta": 5000000,
}
VISION: dict[str, Any] = {
    "depth": 4, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 3],
}  # fmt: skip
TOKENS = {"image_token_id": 41, "video_token_id": 42, "vision_start_token_id": 43, "vision_end_token_id": 0}
CONFIG: dict[str, Any] = {"model_type": "qwen3_vl", "text_config": TEXT, "vision_config": VISION, **TOKENS}


def spec(*, top: dict[str, Any] | None = None, **text: Any) -> DecoderSpec:
    return decoder_spec(CONFIG | {"text_config": TEXT | text} | (top or {}), WHERE)


def reference(**config: Any) -> Qwen3VLConfig:
    return Qwen3VLConfig(**copy.deepcopy(config))  # which writes into the objects it is given


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_tensors_are_those_of_transformers(tied: bool, bias: bool) -> None:
    config = CONFIG | {"tie_word_embeddings": tied, "text_config": TEXT | {"attention_bias": bias}}
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(reference(**config))
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    found, vision = decoder_spec(config, WHERE), vision_spec(config, WHERE)
    assert vision is not None
    assert found.tensors() | vision[0].tensors() == expected
    assert found.lm_head == ("model.language_model.embed_tokens.weight" if tied else "lm_head.weight")


@pytest.mark.parametrize("written_by", [4, 5])
def test_both_config_layouts(written_by: int) -> None:
    # What transformers 5 makes of the old layout when it saves it.
    config = CONFIG if written_by == 4 else reference(**CONFIG).to_dict()
    assert ("rope_parameters" in config["text_config"]) == (written_by == 5)
    found = decoder_spec(config, WHERE)
    assert found.rope.axes == (0, 1, 2, 0, 0)
    np.testing.assert_allclose(found.rope.inverse_frequencies, 5e6 ** -(np.arange(0, 10, 2) / 10), rtol=1e-6)
    assert (found.model_type, found.prefix, found.num_layers) == ("qwen3_vl", "model.language_model.", 4)
    assert (found.deepstack_layers, found.qk_norm, found.takes_visual_inputs) == (3, True, True)


@pytest.mark.parametrize(
    ("section", "head_dim"),
    [([24, 20, 20], 128), ([2, 1, 2], 10), ([1, 2, 2], 10), ([0, 0, 5], 10), ([5, 0, 0], 10), ([1, 0, 0], 2)],
)
def test_frequencies_are_those_of_transformers(section: list[int], head_dim: int) -> None:
    rope = {"rope_type": "default", "mrope_section": section}
    found = spec(head_dim=head_dim, rope_scaling=rope).rope
    config = reference(**CONFIG | {"text_config": TEXT | {"head_dim": head_dim, "rope_scaling": rope}})
    position = torch.tensor([[[3]], [[50]], [[700]]])
    cos, sin = Qwen3VLTextRotaryEmbedding(config.text_config)(torch.zeros(1), position)
    angle = position.numpy()[list(found.axes or ()), 0, 0].astype(np.float32) * np.array(
        found.inverse_frequencies, np.float32
    )
    np.testing.assert_allclose(np.cos(angle), cos[0, 0, : head_dim // 2].numpy(), atol=3e-5)
    np.testing.assert_allclose(np.sin(angle), sin[0, 0, : head_dim // 2].numpy(), atol=3e-5)


def test_the_section_of_the_family() -> None:
    rope = spec(head_dim=128, rope_scaling=None).rope
    assert rope.axes is not None
    assert np.bincount(rope.axes).tolist() == [24, 20, 20]
    assert rope.axes[:7] == (0, 1, 2, 0, 1, 2, 0)
    assert rope.axes[-5:] == (2, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("top", "inner", "tied"),
    [
        (None, None, False),
        (True, None, True),
        (None, True, True),
        (False, None, False),
        (True, True, True),
        (True, False, True),
        (False, True, False),
    ],
)
def test_the_whole_model_says_whether_the_head_is_tied(top: bool | None, inner: bool | None, tied: bool) -> None:
    found = spec(top={} if top is None else {"tie_word_embeddings": top}, tie_word_embeddings=inner)
    assert found.tie_word_embeddings is tied


@pytest.mark.parametrize("indexes", [[], [2], [0, 1, 2, 3]])
def test_deepstack_layers(indexes: list[int]) -> None:
    found = spec(top={"vision_config": VISION | {"deepstack_visual_indexes": indexes}})
    assert found.deepstack_layers == len(indexes)


def test_text_families_take_no_visual_inputs() -> None:
    found = decoder_spec(TEXT | {"model_type": "qwen3", "rope_scaling": None}, WHERE)
    assert (found.takes_visual_inputs, found.deepstack_layers) == (False, 0)


def test_visual_tokens() -> None:
    assert visual_tokens(ConfigReader(CONFIG, WHERE)) == VisualTokens(**TOKENS)
    known = Qwen3VLConfig()
    usual = visual_tokens(ConfigReader({"text_config": {"vocab_size": 151936}}, WHERE))
    assert usual == VisualTokens(**{name: getattr(known, name) for name in TOKENS})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_token_id": 50}, "'image_token_id' must be a whole number from 0 to 49, a token id .*, got 50"),
        ({"video_token_id": -1}, "'video_token_id' .* got -1"),
        ({"vision_start_token_id": "<img>"}, "'vision_start_token_id' .* got '<img>'"),
        ({"vision_end_token_id": True}, "'vision_end_token_id' .* got True"),
        ({"vision_end_token_id": None}, r"'vision_end_token_id' .*default 151653\), got 151653"),
    ],
)
def test_bad_visual_tokens(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"somewhere/config.json: {said}"):
        visual_tokens(ConfigReader(CONFIG | change, WHERE))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"mrope_section": [2, 1, 2], "mrope_interleaved": False}}, "mrope_interleaved False"),
        ({"rope_scaling": {"mrope_section": [2, 1, 2], "mrope_interleaved": None}}, "mrope_interleaved None"),
        ({"hidden_act": "swiglu"}, "hidden_act 'swiglu'"),
        ({"head_dim": 5}, "even head_dim, got 5"),
    ],
)
def test_what_is_not_supported(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"somewhere/config.json: .*{said}"):
        spec(**change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"num_hidden_layers": 0},
            "'text_config.num_hidden_layers' must be a whole number from 1 .*, got 0",
        ),
        ({"rope_scaling": {"mrope_section": [24, 20, 20]}}, r"sum to 5, half the head_dim of 10; got \[24, 20, 20\]"),
        ({"rope_scaling": {"mrope_section": [3, 2]}}, r"mrope_section must be three .* got \[3, 2\]"),
        ({"rope_scaling": {"mrope_section": [6, 0, -1]}}, r"got \[6, 0, -1\]"),
        ({"rope_scaling": {"mrope_section": [2.0, 1, 2]}}, r"got \[2.0, 1, 2\]"),
        ({"rope_scaling": {"mrope_section": 5}}, "got 5"),
        ({"rope_scaling": {}}, r"got \(24, 20, 20\)"),
        ({"rope_scaling": [1]}, "'text_config.rope_scaling' must be an object, got"),
        ({"rope_theta": None}, "'text_config.rope_theta' must be a number above 0, got None"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_theta": -1}},
            "'text_config.rope_parameters.rope_theta' .* got -1",
        ),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple"),
        ({"tie_word_embeddings": "yes"}, "'text_config.tie_word_embeddings' must be true or false"),
    ],
)
def test_bad_values(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"somewhere/config.json: .*{said}"):
        spec(**change)


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ({"text_config": None}, "'text_config' must be an object, got None"),
        ({"vision_config": 3}, "'vision_config' must be an object, got 3"),
        ({"vision_config": {}}, "'vision_config.out_hidden_size' must be the decoder's hidden_size, 24, got 3584"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false, got 1"),
    ],
)
def test_bad_values_at_the_top(top: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"somewhere/config.json: {said}"):
        spec(top=top)


@pytest.mark.parametrize("indexes", [None, 3, [4], [-1], [0, 0], [True], [0, 1, 2, 3, 4]])
def test_bad_deepstack_layers(indexes: Any) -> None:
    change = {"vision_config": VISION | {"deepstack_visual_indexes": indexes}}
    said = "'vision_config.deepstack_visual_indexes' must list at most 4 .* vision blocks 0 to 3"
    with pytest.raises(
        CheckpointError, match=f"somewhere/config.json: {said}, each once, got {re.escape(repr(indexes))}"
    ):
        spec(top=change)
    with pytest.raises(CheckpointError, match=said):
        vision_spec(CONFIG | change, WHERE)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"depth": 0}, CheckpointError, "'vision_config.depth' must be a whole number from 1 to 2147483647, got 0"),
        ({"num_heads": 3}, CheckpointError, r"must be a multiple of 4 times num_heads \(3\), got 16"),
        ({"out_hidden_size": 25}, CheckpointError, "'vision_config.out_hidden_size' must be .* 24, got 25"),
        ({"in_channels": 4}, UnsupportedModelError, "vision_config.in_channels 4 is not supported; supported: 3"),
        ({"hidden_act": "tanh"}, UnsupportedModelError, "hidden_act 'tanh'"),
    ],
)
def test_bad_vision_towers(change: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"somewhere/config.json: .*{said}"):
        vision_spec(CONFIG | {"vision_config": VISION | change}, WHERE)


def test_text_families_have_no_vision_tower() -> None:
    assert vision_spec({"model_type": "qwen3"}, WHERE) is None


def test_the_family_is_known() -> None:
    assert "qwen3_vl" in supported_model_types()
