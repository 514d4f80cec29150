"""Qwen2 and Qwen2.5 (dense): bias on query, key and value."""

from trimkv_export.models.base import ConfigReader, DecoderSpec, read_decoder, slides

__all__ = ["decoder"]


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read a Qwen2 config.json."""
    return read_decoder(
        read,
        "qwen2",
        max_position=32768,
        windowed=slides(read),
        qkv_bias=True,
    )
