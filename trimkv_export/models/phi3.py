"""Phi-3: fused projections, part of each head rotated, LongRoPE, a sliding window."""

from functools import partial

from trimkv_export.models.base import ConfigReader, DecoderSpec, read_decoder, read_rope

__all__ = ["GATE_INTERMEDIATE_SIZE", "decoder"]

GATE_INTERMEDIATE_SIZE = 1024  # the official code's default for this family
# "su" and "yarn" are what its first configs called LongRoPE.
KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read a Phi-3 config.json.

    A sliding window as long as the context or longer hides nothing, and is accepted.
    """
    # Where it is absent, transformers takes its own default, not the one in rope_scaling.
    read = read.with_defaults({"original_max_position_embeddings": 4096})
    return read_decoder(
        read,
        "phi3",
        rope=partial(read_rope, kinds=KINDS),
        max_position=4096,
        rms_norm_eps=1e-5,
        windowed=read.get("sliding_window") is not None,
        fused_projections=True,
    )
