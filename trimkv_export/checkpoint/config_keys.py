"""Keys of a config.json: those that say nothing of a model's arithmetic, and the refusal of those that are not known.

A key that is neither read nor listed here may change what the model computes, so it is refused by name, unless its
value is empty: null, false, 0, "", [] or {}; or one that `NEUTRAL` has for it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trimkv_export.errors import UnsupportedModelError
from trimkv_export.words import shorten

__all__ = ["BACKBONE_KEYS", "HARMLESS", "is_empty", "refuse_unknown"]

# Of how text is sampled, which older versions of transformers write into config.json.
_GENERATION = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens cache_implementation
    constraints decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids
    forced_bos_token_id forced_eos_token_id generation_config guidance_scale length_penalty low_memory max_length
    max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_logits output_scores penalty_alpha prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    repetition_penalty return_dict return_dict_in_generate sequence_bias stop_strings suppress_tokens target_lookbehind
    temperature token_healing top_h top_k top_p typical_p use_cache use_return_dict watermarking_config
"""
# Of training, files, the tokenizer and the programs that wrote the file.
_ORIGIN = """
    architectures attention_dropout attention_probs_dropout_prob attn_implementation attn_pdrop auto_map bos_token
    bos_token_id classifier_dropout custom_pipelines dropout dtype embd_pdrop eos_token eos_token_id finetuning_task
    gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_factor initializer_range is_decoder
    is_llama_config keys_to_ignore_at_inference label2id language license max_sequence_length mlp_dropout
    model_max_length name_or_path neftune_noise_alpha num_labels pad_token pad_token_id pooler_config prefix
    pretraining_tp problem_type resid_pdrop return_dict sep_token_id seq_length summary_activation task_specific_params
    tensor_parallel_degree tf_legacy_loss tie_encoder_decoder tokenizer tokenizer_class tokenizer_model_max_length
    tokenizer_name tokenizer_padding_side tokenizer_version torch_dtype torchscript training_args transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_training unsloth_version use_bfloat16 use_flash_attention
    use_flash_attention_2 use_flash_attn use_mrope use_sdpa vocab_file
"""
# Those that other checks answer for: weights and their shapes say whether there are biases; quantisation has a reader
# of its own; a window and its layers are read where a family has one.
_ANSWERED = """
    attention_bias max_window_layers mlp_bias original_max_position_embeddings qkv_bias quantization_config
    sliding_window tie_word_embeddings use_sliding_window
"""
# Of vision towers and their processors: sizes of what the tower does not have, and what the tensors' shapes say.
_VISION = """
    ignore_index image_seq_length image_token in_chans projection_dim spatial_patch_size video_seq_length
    vision_token_id
"""
# Of gates and their training, also in the config of gates and backbone together.
_GATES = """
    attn_impl base_loss base_model buffer_size capacity_weight compress_memory global_capacity logit_block_size
    lookahead_steps max_seq_len memory_size min_per_head retention_gate retention_gate_bias_init
    retention_gate_intermediate_size retention_weight strategy tie_retention_gate_layers trainable_params
"""
# Of a backbone, which the config of its gates repeats.
_BACKBONE = """
    head_dim hidden_act hidden_size image_token_id image_token_index intermediate_size layer_types
    max_position_embeddings model_type multimodal_projector_bias num_attention_heads num_hidden_layers
    num_key_value_heads partial_rotary_factor projector_hidden_act rms_norm_eps rope_parameters rope_scaling rope_theta
    text_config video_token_id vision_config vision_end_token_id vision_feature_layer vision_feature_select_strategy
    vision_start_token_id vocab_size
"""

# Keys that would change the arithmetic, with the values that do not. Phi-4-mini, Falcon 3 and models that were made
# from families with multipliers have them.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "activation": ("silu", "swiglu"),  # what hidden_act says
    "embedding_multiplier": (1,),
    "embedding_scale": (1,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
}

HARMLESS = frozenset(f"{_GENERATION} {_ORIGIN} {_ANSWERED} {_VISION} {_GATES}".split())
"""Keys that say nothing of what a model computes, or nothing that is not checked otherwise."""

BACKBONE_KEYS = frozenset(_BACKBONE.split())
"""Keys of a backbone's config that its gates' config may repeat."""


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, false, 0, "", [] or {}."""
    return value is None or (isinstance(value, bool | int | float | str | list | tuple | dict) and not value)


def refuse_unknown(found: Mapping[str, Any], known: Collection[str], where: Path, path: str = "") -> None:
    """Refuse keys that nothing reads and whose values are not empty.

    Args:
        found: the object of a config.json.
        known: keys that are read, or that do not matter; those that begin with "_" are transformers' own notes.
        where: the file.
        path: what leads to the object, such as "text_config.".

    Raises:
        UnsupportedModelError: there is such a key; key and value are named.
    """
    for key, value in found.items():
        neutral = is_empty(value) or (not isinstance(value, bool) and value in NEUTRAL.get(key, ()))
        if key not in known and not key.startswith("_") and not neutral:
            raise UnsupportedModelError(
                f"{where}: {path}{shorten(key)[1:-1]} {shorten(value)} is not known, and may "
                "change what the model computes; remove the key if it says nothing of the model, or take "
                "another checkpoint"
            )
