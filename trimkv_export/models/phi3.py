"""Phi-3: fused projections, part of each head rotated, LongRoPE, a sliding window."""

from trimkv_export.models.base import ConfigReader, DecoderSpec, read_decoder

__all__ = ["GATE_INTERMEDIATE_SIZE", "decoder"]

GATE_INTERMEDIATE_SIZE = 1024  # the official code's default for this family


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read a Phi-3 config.json.

    A sliding window as long as the context or longer hides nothing, and is accepted.
    """
    return read_decoder(
        read,
        "phi3",
        max_position=4096,
        rms_norm_eps=1e-5,
        windowed=read.config.get("sliding_window") is not None,
        fused_projections=True,
    )
