"""Variations of config.json, as real files have them, on small random models of every family.

Each row says what must come of it: the logits that transformers 5.23 computes, or a refusal that names the key. Where
transformers 4.57 does something else with the same file, the row says what.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import randomize, write_gates
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

__all__ = ["BASES", "DROP", "VARIATIONS", "Variation", "edited", "write_variation"]

DROP = object()  # in place of a value: the key is absent
VOCABULARY = 101

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "torch_dtype": "float32", "use_cache": True,
    "initializer_range": 0.02, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "transformers_version": "4.51.0",
}  # fmt: skip
QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN25_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "in_chans": 3,
    "out_hidden_size": 48, "patch_size": 4, "spatial_merge_size": 2, "spatial_patch_size": 4, "window_size": 24,
    "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN3_TOWER: dict[str, Any] = {
    "model_type": "qwen3_vl", "depth": 2, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32, "intermediate_size": 40,
    "num_heads": 2, "in_channels": 3, "out_hidden_size": 48, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.02,
}  # fmt: skip
VISUAL_TOKENS = {
    "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
}  # fmt: skip
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}
TEXT3 = {key: DECODER[key] for key in DECODER if key not in ("torch_dtype", "transformers_version")} | {
    "model_type": "qwen3_vl_text", "head_dim": 8, "attention_bias": False, "dtype": "float32",
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default"},
}  # fmt: skip
# As the files on the hub look.
BASES: dict[str, dict[str, Any]] = {
    "llama": DECODER | {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False,
                        "pretraining_tp": 1, "rope_scaling": None, "head_dim": 8},
    "qwen2": DECODER | QWEN | {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": DECODER | QWEN | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 8,
                               "rope_scaling": None},
    "phi3": DECODER | {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0,
                       "resid_pdrop": 0.0, "original_max_position_embeddings": 16, "sliding_window": 262144,
                       "rope_scaling": None, "pad_token_id": 0, "_name_or_path": "Phi-3-mini-128k-instruct",
                       "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
    "qwen2_5_vl": DECODER | QWEN | VISUAL_TOKENS | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "rope_scaling": MROPE, "vision_token_id": 94,
        "vision_config": QWEN25_TOWER},
    "qwen3_vl": {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": TEXT3,
                 "tie_word_embeddings": False,
                 "vision_config": QWEN3_TOWER, "transformers_version": "4.57.0.dev0", **VISUAL_TOKENS},
    "llava": {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 90,
        "pad_token_id": 0, "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vocab_size": VOCABULARY,
        "vision_feature_select_strategy": "default", "torch_dtype": "float32", "tie_word_embeddings": False,
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "model_type": "llama", **DECODER},
        "vision_config": {"hidden_size": 36, "image_size": 20, "intermediate_size": 40, "num_attention_heads": 3,
                          "model_type": "clip_vision_model", "num_hidden_layers": 3, "patch_size": 4,
                          "projection_dim": 24, "vocab_size": 32000}},
}  # fmt: skip
for family, found in BASES.items():
    found["model_type"] = family

# What transformers 4.57 has in every config, and wrote into sections.
COMMON_4: dict[str, Any] = {
    "return_dict": True, "output_hidden_states": False, "torchscript": False, "dtype": None, "pruned_heads": {},
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "architectures": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "task_specific_params": None, "problem_type": None, "tokenizer_class": None, "prefix": None, "bos_token_id": None,
    "pad_token_id": None, "eos_token_id": None, "sep_token_id": None, "decoder_start_token_id": None, "max_length": 20,
    "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1, "temperature": 1.0, "top_k": 50,
    "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "num_beam_groups": 1, "diversity_penalty": 0.0, "_name_or_path": "",
    "tf_legacy_loss": False, "use_bfloat16": False, "output_attentions": False,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 3.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.2, 1.9, 2.5, 3.5]}
FULL = ["full_attention"] * 3
IGNORES = "ignores rope_parameters: the plain embedding, theta 10000"
FAILS = "fails"


@dataclass(frozen=True)
class Variation:
    """A row.

    Attributes:
        family: the model_type.
        changes: of the base's config.json; a dotted key lies in a section.
        refused: a regular expression of the error; None: the logits are those of transformers 5.23.
        differs: what transformers 4.57 does with the file, where that is something else.
        context: that the package is built for.
        gone: 5.23 cannot read the file either.
    """

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    differs: str | None = None
    context: int | None = 256
    gone: bool = False


V = Variation
VARIATIONS: dict[str, Variation] = {
    # Plain models, biases, norms, activations.
    **{f"{family}-plain": V(family) for family in BASES},
    "llama-biases": V("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": V("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": V("llama", {"num_key_value_heads": 1}),
    "llama-no-kv-heads": V("llama", {"num_key_value_heads": DROP}),
    "llama-no-head-dim": V("llama", {"head_dim": DROP}),
    "llama-wide-head": V("llama", {"head_dim": 10}),
    "llama-gelu": V("llama", {"hidden_act": "gelu"}),
    "llama-relu": V("llama", {"hidden_act": "relu"}),
    "llama-gelu-tanh": V("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-eps": V("llama", {"rms_norm_eps": 1e-3}),
    "qwen3-attention-bias": V("qwen3", {"attention_bias": True}),
    "qwen3-tied": V("qwen3", {"tie_word_embeddings": True}),
    "qwen2-tied": V("qwen2", {"tie_word_embeddings": True}),
    # What says nothing of the arithmetic.
    "llama-all-of-4.57": V("llama", COMMON_4 | {"torch_dtype": "float32"}),
    "qwen3-all-of-4.57": V("qwen3", COMMON_4 | {"layer_types": FULL, "sliding_window": None}),
    "qwen2_5_vl-tower-all-of-4.57": V("qwen2_5_vl", {f"vision_config.{key}": COMMON_4[key] for key in COMMON_4}),
    "llava-tower-all-of-4.57": V("llava", {f"vision_config.{key}": COMMON_4[key] for key in COMMON_4}),
    "llava-text-all-of-4.57": V("llava", {f"text_config.{key}": COMMON_4[key] for key in COMMON_4}),
    "llama-dropout": V("llama", {"attention_dropout": 0.5}),
    "llama-window-of-mistral": V("llama", {"sliding_window": 4}),
    "llama-pretraining-tp": V("llama", {"pretraining_tp": 2}),
    "llama-unsloth": V("llama", {"unsloth_fixed": True, "unsloth_version": "2024.9", "model_max_length": 4096}),
    "llama-transformers-js": V("llama", {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    "llama-of-smollm2": V("llama", {"is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2}),
    "llama-of-falcon3": V("llama", {"activation": "swiglu"}),
    "llama-activation-says-otherwise": V("llama", {"activation": "gelu"}, "activation 'gelu' is not known"),
    "llama-of-the-first-version": V("llama", {"max_sequence_length": 2048}),
    "llama-multipliers-of-one": V("llama", {"residual_multiplier": 1.0, "logits_scaling": 1, "embedding_scale": 1.0}),
    "phi3-of-phi-4-mini": V("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
                                     "mlp_bias": False, "partial_rotary_factor": 0.75, "head_dim": 8}),
    "phi3-head-with-bias": V("phi3", {"lm_head_bias": True}, "lm_head_bias True is not known"),
    "phi3-stretched": V("phi3", {"interpolate_factor": 2}, "interpolate_factor 2 is not known"),
    "llama-neftune": V("llama", {"neftune_noise_alpha": 5}),
    "qwen2-use-mrope": V("qwen2", {"use_mrope": False}),
    "qwen2-bias-that-it-has-not": V("qwen2", {"attention_bias": False}),
    "phi3-dropouts": V("phi3", {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    # RoPE.
    "llama-theta": V("llama", {"rope_theta": 500000.0}),
    "llama-no-theta": V("llama", {"rope_theta": DROP}),
    "llama-parameters": V("llama", {"rope_parameters": DEFAULT | {"rope_theta": 500.0}, "rope_theta": DROP},
                          differs=IGNORES),
    "llama-theta-in-both": V("llama", {"rope_parameters": DEFAULT | {"rope_theta": 500.0}, "rope_theta": 1e6},
                             differs="takes rope_theta at the top"),
    "llama-linear": V("llama", {"rope_scaling": LINEAR}),
    "llama-linear-type": V("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama-linear-finetuned": V("llama", {"rope_scaling": LINEAR | {"finetuned": True}}),
    "llama-llama3": V("llama", {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}),
    "llama-llama3-type": V("llama", {"rope_scaling": LLAMA3 | {"type": "llama3"}}),
    "llama-yarn": V("llama", {"rope_scaling": YARN}),
    "llama-yarn-type": V("llama", {"rope_scaling": {"type": "yarn", "factor": 16.0,
                                                    "original_max_position_embeddings": 16}}),
    "llama-yarn-betas": V("llama", {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}}),
    "llama-yarn-mscale": V("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "llama-yarn-factor": V("llama", {"rope_scaling": YARN | {"attention_factor": 0.8}}),
    "qwen3-yarn-of-deepseek": V("qwen3", {"rope_scaling": YARN | {"attn_factor": 0.8782488562869419}},
                                r"attn_factor 0.878\d* is not supported: .*say attention_factor, 1 as there"),
    "qwen3-yarn-attn-factor-one": V("qwen3", {"rope_scaling": YARN | {"attn_factor": 1.0}}),
    "llama-yarn-not-truncated": V("llama", {"rope_scaling": YARN | {"truncate": False}}),
    "llama-longrope": V("llama", {"rope_scaling": LONG | {"rope_type": "longrope", "factor": 16.0,
                                                          "original_max_position_embeddings": 16}},
                        differs="reads original_max_position_embeddings at the top alone"),
    "llama-scaling-before-parameters": V("llama", {"rope_scaling": YARN, "rope_parameters": DEFAULT}),
    "llama-scaling-loses-theta": V("llama", {"rope_scaling": YARN, "rope_theta": DROP,
                                             "rope_parameters": DEFAULT | {"rope_theta": 500.0}},
                                   "rope_parameters.rope_theta is 500.0, and 10000.0 where rope_scaling is"),
    "llama-default-with-factor": V("llama", {"rope_parameters": DEFAULT | {"factor": 4.0}},
                                   "rope_parameters.factor 4.0 is not known"),
    "llama-default-with-factor-one": V("llama", {"rope_parameters": DEFAULT | {"factor": 1.0}}),
    "llama-linear-attention-factor": V("llama", {"rope_scaling": LINEAR | {"attention_factor": 0.5}},
                                       "rope_scaling.attention_factor 0.5 is not known"),
    "llama-parameters-per-layer-type": V(
        "llama", {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT | {"rope_theta": 9.0}}},
        "rope_parameters.full_attention .* is not known"),
    "qwen3-parameters-per-layer-type": V(
        "qwen3", {"layer_types": FULL, "rope_parameters": {"full_attention": DEFAULT}},
        "rope_parameters.full_attention .* is not known", gone=True, differs=IGNORES),
    "llama-dynamic": V("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "llama-partial": V("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5", differs=FAILS),
    "qwen2-partial": V("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5", differs=FAILS),
    "qwen3-partial-in-parameters": V("qwen3", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
                                     "partial_rotary_factor 0.5"),
    "llama-partial-one": V("llama", {"partial_rotary_factor": 1.0}),
    "qwen2-yarn-of-the-readme": V("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0,
                                                             "original_max_position_embeddings": 64}}),
    "qwen3-yarn": V("qwen3", {"rope_scaling": YARN}),
    "phi3-partial": V("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-partial-in-parameters": V("phi3", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
                                    differs=IGNORES),
    "phi3-longrope": V("phi3", {"rope_scaling": LONG | {"type": "longrope"}}),
    "phi3-longrope-short": V("phi3", {"rope_scaling": LONG | {"type": "longrope"},
                                      "original_max_position_embeddings": 64}, context=64),
    "phi3-yarn-is-longrope": V("phi3", {"rope_scaling": LONG | {"type": "yarn"}}),
    "phi3-default-of-the-class": V(
        "phi3", {"original_max_position_embeddings": DROP, "max_position_embeddings": 8192,
                 "rope_scaling": LONG | {"type": "longrope"}}, context=64),
    "phi3-linear": V("phi3", {"rope_scaling": LINEAR}, "rope_type 'linear' .* supported: default, longrope", gone=True,
                     differs=FAILS),
    # Windows and masks.
    "qwen2-window-as-long": V("qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0}),
    "qwen2-window": V("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
                      "sees 8 tokens back"),
    "qwen2-window-of-no-layer": V("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    "qwen2-window-of-the-last": V("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
                                  "sees 8 tokens back"),
    "qwen3-layer-types-before-window": V("qwen3", {"layer_types": FULL, "use_sliding_window": True, "sliding_window": 8,
                                                   "max_window_layers": 0}),
    "qwen2_5_vl-window-of-no-layer": V("qwen2_5_vl", {"use_sliding_window": True, "sliding_window": 8}),
    "qwen3-layer-types": V("qwen3", {"layer_types": FULL}),
    "qwen3-layer-types-sliding": V("qwen3", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8,
                                             "use_sliding_window": True}, "sees 8 tokens back"),
    "qwen3-layer-types-linear": V("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types .* not supported",
                                  gone=True, differs=FAILS),
    "phi3-window": V("phi3", {"sliding_window": 8}, "sees 8 tokens back"),
    "phi3-no-window": V("phi3", {"sliding_window": None}),
    "llama-bidirectional": V("llama", {"is_causal": False}, "is_causal False is not supported",
                             differs="passes over is_causal"),
    # What changes the arithmetic elsewhere, or is for another program.
    "llama-logit-scale": V("llama", {"logit_scale": 0.5}, "logit_scale 0.5 is not known"),
    "llama-multipliers": V("llama", {"residual_multiplier": 0.22}, "residual_multiplier 0.22 is not known"),
    "llama-softcap": V("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not known"),
    "llama-empty-keys": V("llama", {"final_logit_softcapping": None, "num_experts": 0, "extra": {}, "notes": ""}),
    "llama-mlx": V("llama", {"quantization": {"group_size": 64, "bits": 4}}, "quantization .* is not known"),
    "llama-per-layer": V("llama", {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
                         "per_layer_config .* is not known", gone=True, differs="passes over per_layer_config"),
    "qwen3-experts": V("qwen3", {"num_experts": 8}, "num_experts 8 is not known"),
    "qwen2_5_vl-tower-scale": V("qwen2_5_vl", {"vision_config.layer_scale": 0.1},
                                "vision_config.layer_scale 0.1 is not known"),
    "llava-tower-scale": V("llava", {"vision_config.layer_scale": 0.1}, "vision_config.layer_scale 0.1 is not known"),
    "qwen3_vl-text-scale": V("qwen3_vl", {"text_config.logit_scale": 2}, "text_config.logit_scale 2 is not known"),
    "llava-mlp-type": V("llava", {"mm_projector_type": "ldp"}, "mm_projector_type 'ldp' is not known"),
    # Sections.
    "qwen2_5_vl-flat-and-section": V("qwen2_5_vl", {"text_config": DECODER | QWEN | {
        "model_type": "qwen2_5_vl_text", "rope_scaling": MROPE}}),
    "qwen2_5_vl-flat-says-otherwise": V("qwen2_5_vl", {
        "rope_scaling": MROPE | {"type": "yarn", "factor": 4.0},
        "text_config": DECODER | QWEN | {"model_type": "qwen2_5_vl_text", "rope_scaling": MROPE}},
        "rope_scaling is .*yarn.* at the top and .*mrope.* in text_config", gone=True,
        differs="takes the section"),
    "qwen2_5_vl-tied-in-section": V("qwen2_5_vl", {"text_config": DECODER | QWEN | {
        "tie_word_embeddings": True, "rope_scaling": MROPE, "model_type": "qwen2_5_vl_text"}}),
    "qwen3_vl-tied": V("qwen3_vl", {"tie_word_embeddings": True}, differs="takes tie_word_embeddings of text_config"),
    "qwen3_vl-theta": V("qwen3_vl", {"text_config.rope_theta": 5000000}),
    "qwen3_vl-yarn": V("qwen3_vl", {"text_config.rope_scaling": YARN | {
        "mrope_section": [2, 1, 1], "mrope_interleaved": True}}),
    "llava-model-type-of-text": V("llava", {"text_config.model_type": DROP}),
    "llava-qwen2": V("llava", {"text_config": DECODER | QWEN | {"model_type": "qwen2"}}),
    "llava-tied-in-section": V("llava", {"text_config.tie_word_embeddings": True}),
}  # fmt: skip


def edited(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config with changes."""
    out = copy.deepcopy(config)
    for path, value in changes.items():
        section, dot, key = path.partition(".")
        if not dot or section not in ("text_config", "vision_config"):
            section, key = "", path
        part = out[section] if section else out
        part[key] = value
        if value is DROP:
            del part[key]
    return out


def write_variation(folder: Path, variation: Variation) -> Any:
    """Write folder/base and folder/gates; returns the model of transformers, or None where it cannot read the file."""
    base = folder / "base"
    base.mkdir(parents=True)
    config = edited(BASES[variation.family], variation.changes)
    kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    try:
        model = _model(base, config, kind)
    except Exception:
        model = None
        plain = _model(base, BASES[variation.family], kind)
    state = dict((model or plain).state_dict())
    tied = (model or plain).config.tie_word_embeddings
    if tied:
        del state["lm_head.weight"]
    save_file({name: value.contiguous().clone() for name, value in state.items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    text = config.get("text_config") or config
    heads = text.get("num_key_value_heads", text["num_attention_heads"])
    write_gates(folder / "gates", "rg", 3, 48, heads)
    return model


def _model(base: Path, config: dict[str, Any], kind: Any) -> Any:
    (base / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.from_pretrained(base)).float().eval()
    randomize(model)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    return model
