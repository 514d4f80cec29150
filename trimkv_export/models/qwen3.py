"""Qwen3 (dense): RMSNorm on each query and key head, no attention bias by default."""

from trimkv_export.models.base import ConfigReader, DecoderSpec, read_decoder, slides

__all__ = ["decoder"]


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read a Qwen3 config.json."""
    bias = read.flag("attention_bias")
    return read_decoder(
        read,
        "qwen3",
        max_position=32768,
        head_dim=128,
        windowed=slides(read),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
