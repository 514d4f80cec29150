"""Qwen3 (dense): RMSNorm on each query and key head, no attention bias by default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimkv_export.errors import UnsupportedModelError
from trimkv_export.models.base import ConfigReader, DecoderSpec

__all__ = ["decoder"]


def decoder(config: Mapping[str, Any], where: Path) -> DecoderSpec:
    """Read a Qwen3 config.json. Raises CheckpointError or UnsupportedModelError, naming key and value."""
    read = ConfigReader(config, where)
    if read.flag("use_sliding_window"):
        raise UnsupportedModelError(
            f"{where}: use_sliding_window is true, but the pool sees every live entry; set it to false if the model "
            "was not trained with a window"
        )
    heads = read.integer("num_attention_heads")
    head_dim = read.integer("head_dim", 128)
    return DecoderSpec(
        model_type="qwen3",
        num_layers=read.integer("num_hidden_layers"),
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=read.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=read.integer("vocab_size"),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        hidden_act=read.activation(),
        rope=read.rope(head_dim, 10000.0),
        max_position_embeddings=read.integer("max_position_embeddings", 32768),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        attention_bias=read.flag("attention_bias"),
        qk_norm=True,
    )
