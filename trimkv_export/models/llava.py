"""LLaVA 1.5: a Llama or Qwen2 decoder, and a CLIP vision tower whose features a small MLP projects."""

from dataclasses import replace

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models import llama, qwen2
from trimkv_export.models.base import ConfigReader, DecoderSpec, VisionModules, VisionSpec, VisualTokens
from trimkv_export.words import shorten

__all__ = ["RENAMES", "decoder", "vision", "visual_tokens"]

# The checkpoints on the hub, what transformers 4.52 writes, and what transformers 5 does.
RENAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
# A text_config holds what differs from the defaults of transformers; those that the other families need no default for:
TEXT_DEFAULTS = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip
MODULES = VisionModules(
    patch="vision_tower.embeddings.patch_embedding",
    position="vision_tower.embeddings.position_embedding.weight",
    class_embedding="vision_tower.embeddings.class_embedding",
    pre_norm="vision_tower.pre_layrnorm",
    block="vision_tower.encoder.layers.{}",
    norm1="layer_norm1",
    norm2="layer_norm2",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    mlp_in=("mlp.fc1",),
    mlp_out="mlp.fc2",
    merger="multi_modal_projector",
    merger_in="linear_1",
    merger_out="linear_2",
)


def decoder(read: ConfigReader) -> DecoderSpec:
    """Read the decoder of a LLaVA config.json."""
    text = _text(read)
    spec = {"llama": llama.decoder, "qwen2": qwen2.decoder}[text.config["model_type"]](text)
    return replace(
        spec,
        model_type="llava",
        prefix="model.language_model.",
        takes_visual_inputs=True,
        # transformers ties the head if either says so.
        tie_word_embeddings=read.flag("tie_word_embeddings") or spec.tie_word_embeddings,
    )


def vision(read: ConfigReader) -> VisionSpec:
    """Read the CLIP tower and the projector of a LLaVA config.json."""
    tower, width = read.section("vision_config"), _text(read).integer("hidden_size")
    if tower.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise tower.unsupported("model_type", "clip_vision_model")
    strategy = read.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise read.unsupported("vision_feature_select_strategy", "default, full")
    if tower.integer("num_channels", 3) != 3:
        raise tower.unsupported("num_channels", "3")
    hidden, heads = tower.integer("hidden_size", 768), tower.integer("num_attention_heads", 12)
    if hidden % heads:
        raise tower.bad("hidden_size", f"a multiple of num_attention_heads ({heads})")
    image, patch = tower.integer("image_size", 224), tower.integer("patch_size", 32)
    if image % patch:
        raise tower.bad("image_size", f"a multiple of patch_size ({patch})")
    blocks, depth = tower.integer("num_hidden_layers", 12), _depth(read, tower.integer("num_hidden_layers", 12))
    clip = "model.vision_tower."
    return VisionSpec(
        prefix="model.",
        modules=MODULES,
        # Blocks behind the features; position_ids is a buffer of older checkpoints.
        unused=(
            *(f"{clip}encoder.layers.{index}." for index in range(depth, blocks)),
            f"{clip}post_layernorm.",
            f"{clip}embeddings.position_ids",
        ),
        depth=depth,
        hidden_size=hidden,
        intermediate_size=tower.integer("intermediate_size", 3072),
        num_heads=heads,
        hidden_act=tower.activation("quick_gelu"),
        norm_eps=tower.number("layer_norm_eps", 1e-5),
        patch_size=patch,
        patch_bias=False,
        num_position_embeddings=(image // patch) ** 2 + 1,
        rotary=False,
        image_size=image,
        keeps_class_token=strategy == "full",
        merger_size=width,
        merger_act=read.activation("gelu", key="projector_hidden_act"),
        merger_bias=read.flag("multimodal_projector_bias", True),
        out_hidden_size=width,
    )


def visual_tokens(read: ConfigReader) -> VisualTokens:
    """The id of the image token, at the top of a LLaVA config.json."""
    index, other = read.get("image_token_index"), read.get("image_token_id")
    key = "image_token_id" if index is None else "image_token_index"
    if None not in (index, other) and index != other:
        raise read.bad("image_token_id", f"image_token_index, {shorten(index)}")
    return VisualTokens(image_token_id=read.token_id(key, 32000, _text(read).integer("vocab_size")))


def _text(read: ConfigReader) -> ConfigReader:
    """The decoder's fields, with the defaults of its family."""
    if read.get("text_config") is None and read.get("mm_vision_tower") is not None:
        raise UnsupportedModelError(
            f"{read.where}: is in the layout of the LLaVA project (mm_vision_tower), not of transformers: take the "
            "checkpoint of the same model in that of transformers, such as those of llava-hf"
        )
    text = read.section("text_config")
    defaults = TEXT_DEFAULTS.get(str(text.get("model_type", "llama")))
    if defaults is None:
        raise text.unsupported("model_type", ", ".join(TEXT_DEFAULTS))
    return text.with_defaults({"model_type": "llama"} | defaults)


def _depth(read: ConfigReader, blocks: int) -> int:
    """How many blocks make the features; `vision_feature_layer` counts from the end where it is negative."""
    layer = read.get("vision_feature_layer", -2)
    if type(layer) is not int or not (1 <= layer <= blocks or -blocks <= layer <= -1):
        raise CheckpointError(
            f"{read.where}: 'vision_feature_layer' must be one layer, 1 to {blocks} or -{blocks} to -1, got "
            f"{shorten(layer)}"
        )
    return layer if layer > 0 else blocks + 1 + layer
