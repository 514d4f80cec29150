"""Model families: one module each, named after Hugging Face's `model_type`."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base import DecoderSpec, DefaultRope, MRope, VisionSpec, VisualTokens

__all__ = [
    "DecoderSpec",
    "DefaultRope",
    "MRope",
    "VisionSpec",
    "VisualTokens",
    "decoder_spec",
    "supported_model_types",
    "vision_spec",
]


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` that can be built."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"))


def decoder_spec(config: Mapping[str, Any], where: Path) -> DecoderSpec:
    """The decoder that a Hugging Face config.json (read from `where`) describes.

    Raises UnsupportedModelError for a family this version does not have, CheckpointError for a bad value.
    """
    spec: DecoderSpec = _family(config, where).decoder(config, where)
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads ({spec.num_heads}) must be a multiple of num_key_value_heads "
            f"({spec.num_kv_heads})"
        )
    return spec


def vision_spec(config: Mapping[str, Any], where: Path) -> tuple[VisionSpec, VisualTokens] | None:
    """The vision tower of a model that has one, and the ids of its tokens; None for a model of text.

    Raises as `decoder_spec`.
    """
    family = _family(config, where)
    if not hasattr(family, "vision"):
        return None
    return family.vision(config, where), family.visual_tokens(config, where)


def _family(config: Mapping[str, Any], where: Path) -> ModuleType:
    model_type = config.get("model_type")
    if model_type not in supported_model_types():
        raise UnsupportedModelError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(supported_model_types())}"
        )
    return importlib.import_module(f"{__name__}.{model_type}")
