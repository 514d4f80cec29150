"""The vision tower and the visual tokens of a config, in the keys that Qwen's models share."""

from typing import Any

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base.reader import ConfigReader
from trimkv_export.models.base.vision import VisionModules, VisionSpec, VisualTokens
from trimkv_export.words import shorten

__all__ = ["read_vision", "read_visual_tokens"]


def read_vision(
    read: ConfigReader, modules: VisionModules, width: int, *, patch_size: int, hidden_act: str, **differences: Any
) -> VisionSpec:
    """The tower of a `vision_config`, with rotary angles by row and column. Raises as a family does.

    Args:
        read: the `vision_config`.
        modules: the family's names.
        width: hidden size of the decoder.
        patch_size: the family's default.
        hidden_act: the family's default.
        **differences: fields that the family sets itself.
    """
    hidden, heads = read.integer("hidden_size"), read.integer("num_heads")
    merge = read.integer("spatial_merge_size", 2)
    if hidden % heads or hidden // heads % 4:
        raise CheckpointError(
            f"{read.where}: 'vision_config.hidden_size' must be a multiple of 4 times num_heads ({heads}), got {hidden}"
        )
    if read.integer("in_channels", 3) != 3:
        raise read.unsupported("in_channels", "3")
    rope = read.get("rope_parameters") or {}  # transformers 5 writes it; older configs have none
    if (
        not isinstance(rope, dict)
        or rope.get("rope_type") not in (None, "axial", "default")
        or rope.get("rope_theta") not in (None, 1e4)
        or any(value for key, value in rope.items() if key not in ("rope_type", "rope_theta"))
    ):
        raise UnsupportedModelError(
            f"{read.where}: 'vision_config.rope_parameters' {shorten(rope)} is not supported: only rope_type 'axial' "
            "with rope_theta 10000"
        )
    if read.integer("out_hidden_size") != width:
        raise read.bad("out_hidden_size", f"the decoder's hidden_size, {width}")
    fields: dict[str, Any] = {
        "prefix": "model.visual.",
        "modules": modules,
        "depth": read.integer("depth"),
        "hidden_size": hidden,
        "intermediate_size": read.integer("intermediate_size"),
        "num_heads": heads,
        "hidden_act": read.activation(hidden_act),
        "patch_size": read.integer("patch_size", patch_size),
        "temporal_patch_size": read.integer("temporal_patch_size", 2),
        "spatial_merge_size": merge,
        "merger_size": hidden * merge**2,
        "out_hidden_size": width,
    }
    return VisionSpec(**fields | differences)


def read_visual_tokens(read: ConfigReader, vocab_size: int) -> VisualTokens:
    """The ids of the visual tokens, at the top of a config."""
    return VisualTokens(
        image_token_id=read.token_id("image_token_id", 151655, vocab_size),
        video_token_id=read.token_id("video_token_id", 151656, vocab_size),
        vision_start_token_id=read.token_id("vision_start_token_id", 151652, vocab_size),
        vision_end_token_id=read.token_id("vision_end_token_id", 151653, vocab_size),
    )
