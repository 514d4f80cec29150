"""Model families: one module each, named after Hugging Face's `model_type`."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base import DecoderSpec, DefaultRope, MRope, VisualTokens

__all__ = ["DecoderSpec", "DefaultRope", "MRope", "VisualTokens", "decoder_spec", "supported_model_types"]


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` that can be built."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"))


def decoder_spec(config: Mapping[str, Any], where: Path) -> DecoderSpec:
    """The decoder that a Hugging Face config.json (read from `where`) describes.

    Raises UnsupportedModelError for a family this version does not have, CheckpointError for a bad value.
    """
    model_type = config.get("model_type")
    if model_type not in supported_model_types():
        raise UnsupportedModelError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(supported_model_types())}"
        )
    spec: DecoderSpec = importlib.import_module(f"{__name__}.{model_type}").decoder(config, where)
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads ({spec.num_heads}) must be a multiple of num_key_value_heads "
            f"({spec.num_kv_heads})"
        )
    return spec
