"""Qwen3-VL (dense): a Qwen3 decoder with interleaved M-RoPE and DeepStack, and a vision tower."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimkv_export.errors import CheckpointError
from trimkv_export.models.base import ConfigReader, DecoderSpec, VisualTokens

__all__ = ["decoder", "visual_tokens"]

MROPE_SECTION = (24, 20, 20)


def decoder(config: Mapping[str, Any], where: Path) -> DecoderSpec:
    """Read the decoder of a Qwen3-VL config.json.

    Raises CheckpointError or UnsupportedModelError, naming key and value.
    """
    read = ConfigReader(config, where)
    text = read.section("text_config")
    heads = text.integer("num_attention_heads")
    head_dim = text.integer("head_dim", 128)
    layers = text.integer("num_hidden_layers")
    return DecoderSpec(
        model_type="qwen3_vl",
        num_layers=layers,
        hidden_size=text.integer("hidden_size"),
        intermediate_size=text.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=text.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=text.integer("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        hidden_act=text.activation(),
        # No default: transformers 4 and 5 have different ones.
        rope=text.mrope(head_dim, None, MROPE_SECTION),
        max_position_embeddings=text.integer("max_position_embeddings", 128000),
        # The whole model's setting decides; the decoder's own is for configs that have no other.
        tie_word_embeddings=read.flag("tie_word_embeddings", text.flag("tie_word_embeddings")),
        attention_bias=text.flag("attention_bias"),
        qk_norm=True,
        prefix="model.language_model.",
        deepstack_layers=_deepstack_layers(read, layers),
    )


def _deepstack_layers(read: ConfigReader, layers: int) -> int:
    """The first decoder layer takes the first DeepStack feature, and so on: one for each vision layer in the list."""
    indexes = read.section("vision_config").config.get("deepstack_visual_indexes")
    if not isinstance(indexes, list | tuple) or len(indexes) > layers:
        raise CheckpointError(
            f"{read.where}: 'vision_config.deepstack_visual_indexes' must be a list of at most {layers} vision layers "
            f"(num_hidden_layers), got {indexes!r}"
        )
    return len(indexes)


def visual_tokens(config: Mapping[str, Any], where: Path) -> VisualTokens:
    """The ids of the visual tokens, at the top of a Qwen3-VL config.json. Raises CheckpointError."""
    read = ConfigReader(config, where)
    vocabulary = read.section("text_config").integer("vocab_size")
    return VisualTokens(
        image_token_id=read.token_id("image_token_id", 151655, vocabulary),
        video_token_id=read.token_id("video_token_id", 151656, vocabulary),
        vision_start_token_id=read.token_id("vision_start_token_id", 151652, vocabulary),
        vision_end_token_id=read.token_id("vision_end_token_id", 151653, vocabulary),
    )
