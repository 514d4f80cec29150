"""Llama 2 and 3, and what is built like them: nothing but the plain decoder, with biases where the config says so."""

from trimkv_export.models.base import ConfigReader, DecoderSpec, read_decoder

__all__ = ["decoder"]


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read a Llama config.json."""
    bias = read.flag("attention_bias")
    return read_decoder(
        read, "llama", max_position=2048, qkv_bias=bias, output_bias=bias, mlp_bias=read.flag("mlp_bias")
    )
