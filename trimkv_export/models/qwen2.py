"""Qwen2 and Qwen2.5 (dense): bias on query, key and value."""

from trimkv_export.models.base import ConfigReader, DecoderSpec, read_decoder

__all__ = ["decoder"]


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read a Qwen2 config.json."""
    return read_decoder(
        read,
        "qwen2",
        max_position=32768,
        windowed=read.flag("use_sliding_window"),
        qkv_bias=True,
    )
