"""Qwen3-VL (dense): a Qwen3 decoder with interleaved M-RoPE and DeepStack, and a vision tower."""

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
)
from trimkv_export.words import shorten

__all__ = ["decoder", "vision", "visual_tokens"]

MROPE_SECTION = (24, 20, 20)
# A section of a config that transformers wrote holds what differs from these.
TEXT_DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
VISION_DEFAULTS = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 3584,
    "deepstack_visual_indexes": (8, 16, 24),
}  # fmt: skip
MODULES = VisionModules(
    patch="patch_embed.proj",
    position="pos_embed.weight",
    block="blocks.{}",
    norm1="norm1",
    norm2="norm2",
    qkv=("attn.qkv",),
    proj="attn.proj",
    mlp_in=("mlp.linear_fc1",),
    mlp_out="mlp.linear_fc2",
    merger="merger",
    merger_norm="norm",
    merger_in="linear_fc1",
    merger_out="linear_fc2",
    deepstack="deepstack_merger_list.{}",
)


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read the decoder of a Qwen3-VL config.json."""
    text = _text(read)
    bias = text.flag("attention_bias")
    return read_decoder(
        text,
        "qwen3_vl",
        max_position=128000,
        # No default theta: transformers 4 and 5 have different ones.
        rope=partial(read_mrope, default_theta=None, default_section=MROPE_SECTION),
        head_dim=128,
        # The whole model's setting decides; the decoder's own is for configs that have no other.
        tie_word_embeddings=read.flag("tie_word_embeddings", text.flag("tie_word_embeddings")),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        prefix="model.language_model.",
        takes_visual_inputs=True,
        deepstack_layers=len(_deepstack_indexes(read)),
    )


def vision(read: ConfigReader) -> VisionSpec:
    """Read the vision tower of a Qwen3-VL config.json."""
    tower = _tower(read)
    return read_vision(
        tower,
        MODULES,
        _text(read).integer("hidden_size"),
        patch_size=16,
        hidden_act="gelu_pytorch_tanh",
        num_position_embeddings=tower.integer("num_position_embeddings", 2304),
        deepstack_visual_indexes=_deepstack_indexes(read),
    )


def _deepstack_indexes(read: ConfigReader) -> tuple[int, ...]:
    """The vision blocks that feed the first decoder layers, one each."""
    vision, layers = _tower(read), _text(read).integer("num_hidden_layers")
    indexes, depth = vision.get("deepstack_visual_indexes"), vision.integer("depth")
    if (
        not isinstance(indexes, list | tuple)
        or not all(type(index) is int and 0 <= index < depth for index in indexes)
        or len(set(indexes)) != len(indexes)
        or len(indexes) > layers
    ):
        raise CheckpointError(
            f"{read.where}: 'vision_config.deepstack_visual_indexes' must list at most {layers} (num_hidden_layers) of "
            f"the vision blocks 0 to {depth - 1}, each once, got {shorten(indexes)}"
        )
    return tuple(indexes)


def visual_tokens(read: ConfigReader) -> VisualTokens:
    """The ids of the visual tokens, at the top of a Qwen3-VL config.json."""
    return read_visual_tokens(read, _text(read).integer("vocab_size"))


def _text(read: ConfigReader) -> ConfigReader:
    """The decoder's fields."""
    return read.section("text_config").with_defaults(TEXT_DEFAULTS)


def _tower(read: ConfigReader) -> ConfigReader:
    """The tower's fields."""
    return read.section("vision_config").with_defaults(VISION_DEFAULTS)
