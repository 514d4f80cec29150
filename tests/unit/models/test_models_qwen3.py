from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models import decoder_spec, supported_model_types

WHERE = Path("somewhere/config.json")
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 50,
    "hidden_act": "silu",
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_tensors_are_those_of_transformers(tied: bool, bias: bool) -> None:
    config = CONFIG | {"tie_word_embeddings": tied, "attention_bias": bias}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert decoder_spec(config, WHERE).tensors() == expected


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 1000000}, 1e6),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}, 123.0),
        ({"rope_parameters": {"rope_theta": 123.0}, "rope_theta": 9.0}, 123.0),
    ],
)
def test_rope_of_both_config_styles(rope: dict[str, Any], theta: float) -> None:
    spec = decoder_spec(CONFIG | rope, WHERE)
    exponent = torch.arange(0, 10, 2, dtype=torch.int64).float() / 10  # as transformers computes it
    expected = 1.0 / theta**exponent
    np.testing.assert_allclose(spec.rope.inverse_frequencies, expected.numpy(), rtol=2e-7)


def test_defaults_of_the_family() -> None:
    wanted = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    least = {key: CONFIG[key] for key in (*wanted, "vocab_size", "hidden_act")}
    spec, known = decoder_spec(least, WHERE), Qwen3Config(hidden_size=24, num_attention_heads=6)
    assert (spec.num_kv_heads, spec.head_dim) == (6, known.head_dim)
    assert spec.rms_norm_eps == known.rms_norm_eps
    assert spec.max_position_embeddings == known.max_position_embeddings
    assert (spec.tie_word_embeddings, spec.qkv_bias) == (known.tie_word_embeddings, known.attention_bias)
    assert spec.qk_norm


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama5"}, "'llama5' is not supported; supported: .*qwen3"),
        ({"model_type": "base"}, "'base' is not supported"),
        ({"model_type": None}, "None is not supported"),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 512},
            "the model sees 512 tokens back .* at most 512",
        ),
        ({"hidden_act": "swiglu"}, "hidden_act 'swiglu'"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_type 'dynamic' .* supported: default, linear",
        ),
        ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type \['linear'\]"),
        ({"head_dim": 5}, "even head_dim, got 5"),
    ],
)
def test_what_is_not_supported(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"somewhere/config.json: .*{said}"):
        decoder_spec(CONFIG | change, WHERE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a whole number from 1 to 2147483647, got 0"),
        ({"hidden_size": 24.0}, "'hidden_size' .* got 24.0"),
        ({"vocab_size": True}, "'vocab_size' .* got True"),
        ({"intermediate_size": None}, "'intermediate_size' .* got None"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' must be a number above 0, got 'small'"),
        ({"rope_theta": float("nan")}, "'rope_theta' .* got nan"),
        ({"rope_theta": float("inf")}, "'rope_theta' .* got inf"),
        ({"rope_scaling": [1]}, "'rope_scaling' must be an object"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' must be true or false, got 'yes'"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
    ],
)
def test_bad_values(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"somewhere/config.json: .*{said}"):
        decoder_spec(CONFIG | change, WHERE)


def test_families_are_the_modules() -> None:
    assert "qwen3" in supported_model_types()
    assert "base" not in supported_model_types()
