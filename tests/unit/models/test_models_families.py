"""What the text families read: a row each. Qwen3 has a file of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models import DecoderSpec, decoder_spec, gate_intermediate_size, supported_model_types

WHERE = Path("somewhere/config.json")
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "vocab_size": 50,
}  # fmt: skip
FAMILIES: dict[str, type] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config}


def spec(family: str, context: int | None = None, **changes: Any) -> DecoderSpec:
    return decoder_spec({"model_type": family, **SIZES, **changes}, WHERE, context)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 1}),
        ("llama", {"mlp_bias": True, "head_dim": 10, "tie_word_embeddings": True}),
        ("qwen2", {"num_key_value_heads": 3}),
        ("qwen2", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
        ("qwen2", {"num_key_value_heads": 1, "head_dim": 10}),
        ("phi3", {}),
        ("phi3", {"num_key_value_heads": 2, "head_dim": 10}),
        ("phi3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ],
)
def test_tensors_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](**SIZES, pad_token_id=0, **changes))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if changes.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    assert spec(family, **changes).tensors() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_the_family(family: str) -> None:
    found, known = spec(family), FAMILIES[family](**SIZES, pad_token_id=0)
    assert (found.num_kv_heads, found.head_dim) == (6, 4)
    for name in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act"):
        assert getattr(found, name) == getattr(known, name), name
    theta = known.rope_parameters["rope_theta"]
    assert found.rope == spec(family, rope_theta=theta, rope_scaling={"rope_type": "default"}).rope
    assert found.rope.rotary_dim == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_width_of_gates_that_do_not_say_it(family: str) -> None:
    assert gate_intermediate_size({"model_type": family}, WHERE) == (1024 if family == "phi3" else 512)


@pytest.mark.parametrize(
    ("family", "changes", "biases", "fused"),
    [
        ("llama", {}, (False, False, False), False),
        ("llama", {"attention_bias": True}, (True, True, False), False),
        ("llama", {"mlp_bias": True}, (False, False, True), False),
        ("qwen2", {}, (True, False, False), False),
        ("qwen2", {"attention_bias": False, "mlp_bias": True}, (True, False, False), False),  # not keys of Qwen2
        ("phi3", {}, (False, False, False), True),
        ("phi3", {"attention_bias": True, "mlp_bias": True}, (False, False, False), True),  # nor of Phi-3
    ],
)
def test_biases_and_fused_projections(
    family: str, changes: dict[str, Any], biases: tuple[bool, bool, bool], fused: bool
) -> None:
    found = spec(family, **changes)
    assert (found.qkv_bias, found.output_bias, found.mlp_bias) == biases
    assert (found.fused_projections, found.qk_norm) == (fused, False)
    assert (found.model_type, found.prefix, found.takes_visual_inputs) == (family, "model.", False)


def test_the_window_is_as_long_as_the_context() -> None:
    window = {"sliding_window": 100, "max_position_embeddings": 400}
    assert spec("phi3", context=100, **window).max_position_embeddings == 100
    assert spec("phi3", **window | {"sliding_window": 400}).max_position_embeddings == 400
    assert spec("phi3", **window | {"sliding_window": None}).max_position_embeddings == 400
    assert spec("qwen2", **window).max_position_embeddings == 400
    assert (
        spec("qwen2", context=60, use_sliding_window=True, max_window_layers=0, **window).max_position_embeddings == 100
    )
    assert spec("llama", **window).max_position_embeddings == 400  # not a key of Llama


def test_longrope_limits_the_positions() -> None:
    lists = {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    lengths = {"original_max_position_embeddings": 64, "max_position_embeddings": 4096}
    config: dict[str, Any] = {"rope_scaling": {"type": "longrope", **lists}, **lengths}
    assert spec("phi3", context=64, **config).max_position_embeddings == 64
    assert spec("phi3", context=65, **config).max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama4", {}, "model_type 'llama4' is not supported; supported: .*llama.*phi3.*qwen2"),
        ("phi", {}, "model_type 'phi' is not supported; supported: .*phi3"),
        ("phi3_v", {}, "model_type 'phi3_v' is not supported"),
        ("qwen2_moe", {}, "model_type 'qwen2_moe' is not supported"),
        ("", {}, "model_type '' is not supported"),
        *(
            (family, changes, said)
            for family in FAMILIES
            for changes, said in (
                ({"hidden_act": "swiglu"}, "hidden_act 'swiglu' is not supported; supported: silu, gelu"),
                ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\] is not supported"),
                (
                    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
                    "rope_type 'dynamic' is not supported; supported: default, "
                    + ("longrope$" if family == "phi3" else "linear, llama3, longrope, yarn$"),
                ),
                ({"head_dim": 7}, "even head_dim, got 7 of 7"),
                ({"partial_rotary_factor": 0.3}, r"even head_dim, got 1 of 4 \(partial_rotary_factor 0.3\)"),
            )
        ),
        ("phi3", {"sliding_window": 2047}, "2047 tokens back .* the context is 4096.* at most 2047 with --context"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 0},
            "4096 tokens back .* the context is 32768.* at most 4096",
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 512}, "sees 512 tokens back"),
    ],
)
def test_what_is_not_supported(family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{WHERE}: .*{said}"):
        spec(family, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"attention_bias": 1}, "'attention_bias' must be true or false, got 1"),
        ("llama", {"mlp_bias": "no"}, "'mlp_bias' must be true or false, got 'no'"),
        ("qwen2", {"use_sliding_window": "yes"}, "'use_sliding_window' must be true or false, got 'yes'"),
        ("qwen2", {"max_window_layers": "all"}, "'max_window_layers' must be a whole number, got 'all'"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0},
            "'sliding_window' must be a whole .* got 0",
        ),
        ("phi3", {"sliding_window": -1}, "'sliding_window' must be a whole number from 1 to 2147483647, got -1"),
        *(
            (family, changes, said)
            for family in FAMILIES
            for changes, said in (
                ({"hidden_size": None}, "'hidden_size' must be a whole number from 1 to 2147483647, got None"),
                ({"vocab_size": 2**31}, r"'vocab_size' must be a whole number from 1 to 2147483647, got 2147483648"),
                ({"rms_norm_eps": 1e-300}, "'rms_norm_eps' must be in the range of float32, got 1e-300"),
                ({"rms_norm_eps": -1e-6}, "'rms_norm_eps' must be a number above 0, got -1e-06"),
                ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple of .* \(4\)"),
                ({"hidden_size": 25}, r"hidden_size \(25\) must be a multiple of num_attention_heads \(6\)"),
                ({"max_position_embeddings": "4k"}, "'max_position_embeddings' .* got '4k'"),
                ({"tie_word_embeddings": 0}, "'tie_word_embeddings' must be true or false, got 0"),
            )
        ),
    ],
)
def test_bad_values(family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"{WHERE}: {said}"):
        spec(family, **changes)


def test_families_are_supported() -> None:
    assert set(FAMILIES) <= set(supported_model_types())


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_not_known(family: str) -> None:
    for value in (2, 0.5, "x", True, [1], {"a": 1}):
        with pytest.raises(UnsupportedModelError, match=f"{WHERE}: logit_scaling .* is not known, and may change what"):
            spec(family, logit_scaling=value)
    empty: list[Any] = [None, False, 0, 0.0, "", [], {}]
    for nothing in empty:
        assert spec(family, logit_scaling=nothing) == spec(family)
    assert spec(family, _private="x", torch_dtype="bfloat16", auto_map={"a": "b"}) == spec(family)


def test_phi3_calls_longrope_otherwise() -> None:
    lists = {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    long = {"original_max_position_embeddings": 64, "max_position_embeddings": 128}
    found = spec("phi3", rope_scaling={"type": "longrope", **lists}, **long)
    for name in ("su", "yarn"):
        assert spec("phi3", rope_scaling={"type": name, **lists}, **long) == found
    inside = {"type": "longrope", "original_max_position_embeddings": 64, **lists}
    # The default of the class goes before what is inside.
    assert spec("phi3", rope_scaling=inside, max_position_embeddings=4096).max_position_embeddings == 4096
    assert spec("phi3", rope_scaling=inside, max_position_embeddings=4096).rope.inverse_frequencies[0] == 1.0
