"""Qwen2.5-VL: a Qwen2 decoder with M-RoPE in blocks, and a vision tower with attention in windows."""

from functools import partial

from trimkv_export.errors import CheckpointError
from trimkv_export.models.base import (
    ConfigReader,
    DecoderSpec,
    VisionModules,
    VisionSpec,
    VisualTokens,
    read_decoder,
    read_mrope,
    read_vision,
    read_visual_tokens,
    slides,
)

__all__ = ["RENAMES", "decoder", "vision", "visual_tokens"]

# The checkpoints on the hub, and what transformers 5 writes.
RENAMES = (
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("visual.", "model.visual."),
)
MROPE_SECTION = (16, 24, 24)
# A section of a config that transformers wrote holds what differs from these.
TEXT_DEFAULTS = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
VISION_DEFAULTS = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
}  # fmt: skip
MODULES = VisionModules(
    patch="patch_embed.proj",
    block="blocks.{}",
    norm1="norm1",
    norm2="norm2",
    qkv=("attn.qkv",),
    proj="attn.proj",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    merger="merger",
    merger_norm="ln_q",
    merger_in="mlp.0",
    merger_out="mlp.2",
)


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read the decoder of a Qwen2.5-VL config.json."""
    text = _text(read)
    return read_decoder(
        text,
        "qwen2_5_vl",
        max_position=32768,
        rms_norm_eps=1e-5,
        rope=partial(read_mrope, default_theta=1e6, default_section=MROPE_SECTION, interleaved=False),
        windowed=slides(text),
        # transformers ties the head if either says so.
        tie_word_embeddings=read.flag("tie_word_embeddings") or text.flag("tie_word_embeddings"),
        qkv_bias=True,
        prefix="model.language_model.",
        takes_visual_inputs=True,
    )


def vision(read: ConfigReader) -> VisionSpec:
    """Read the vision tower of a Qwen2.5-VL config.json."""
    tower = read.section("vision_config").with_defaults(VISION_DEFAULTS)
    whole = tower.get("fullatt_block_indexes", (7, 15, 23, 31))
    if not isinstance(whole, list | tuple) or not all(type(index) is int and index >= 0 for index in whole):
        raise tower.bad("fullatt_block_indexes", "a list of whole numbers from 0")
    spec = read_vision(
        tower,
        MODULES,
        _text(read).integer("hidden_size"),
        patch_size=14,
        hidden_act="silu",
        rms_norm=True,
        patch_bias=False,
        window_size=tower.integer("window_size", 112),
        fullatt_block_indexes=tuple(whole),
        tokens_per_second=tower.number("tokens_per_second", 4),
    )
    if not spec.window_side:
        token = spec.patch_size * spec.spatial_merge_size
        raise CheckpointError(
            f"{read.where}: 'vision_config.window_size' must be at least the {token} pixels of a token "
            f"(patch_size times spatial_merge_size), got {spec.window_size}"
        )
    return spec


def visual_tokens(read: ConfigReader) -> VisualTokens:
    """The ids of the visual tokens, at the top of a Qwen2.5-VL config.json."""
    return read_visual_tokens(read, _text(read).integer("vocab_size"))


def _text(read: ConfigReader) -> ConfigReader:
    """The decoder's fields: those of the hub's configs lie at the top."""
    return read if read.get("text_config") is None else read.section("text_config").with_defaults(TEXT_DEFAULTS)
