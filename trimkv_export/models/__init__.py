"""Model families: one module each, named after Hugging Face's `model_type`.

A family has `decoder(read)`, and with a vision tower also `vision(read)` and `visual_tokens(read)`. They raise
CheckpointError for a bad value and UnsupportedModelError for an option that this version does not have; file, key and
value are named. Where checkpoints name tensors otherwise than the family does, `RENAMES` has pairs of prefixes: theirs,
and its own. Where the official code has another width of gates than elsewhere, `GATE_INTERMEDIATE_SIZE` is that.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base import ConfigReader, DecoderSpec, VisionModules, VisionSpec, VisualTokens
from trimkv_export.words import shorten

__all__ = [
    "DecoderSpec",
    "VisionModules",
    "VisionSpec",
    "VisualTokens",
    "decoder_spec",
    "gate_intermediate_size",
    "supported_model_types",
    "tensor_names",
    "vision_spec",
]


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` that can be built."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"))


def decoder_spec(config: Mapping[str, Any], where: Path, context: int | None = None) -> DecoderSpec:
    """The decoder that a Hugging Face config.json describes.

    Args:
        config: its content.
        where: the file, for messages.
        context: the longest context, in tokens, that it is to serve; None means as long as the model was made for.

    Raises:
        UnsupportedModelError: a family or an option that this version does not have.
        CheckpointError: a bad value.
    """
    spec: DecoderSpec = _family(config, where).decoder(ConfigReader(config, where, context))
    return spec


def vision_spec(config: Mapping[str, Any], where: Path) -> tuple[VisionSpec, VisualTokens] | None:
    """The vision tower of a model and the ids of its tokens, None for a model of text. Raises as `decoder_spec`."""
    family, read = _family(config, where), ConfigReader(config, where)
    if not hasattr(family, "vision"):
        return None
    return family.vision(read), family.visual_tokens(read)


def gate_intermediate_size(config: Mapping[str, Any], where: Path) -> int:
    """The width of retention gates where their config does not say it: the official code's default for this model.

    Raises:
        UnsupportedModelError: a family that this version does not have.
    """
    return int(getattr(_family(config, where), "GATE_INTERMEDIATE_SIZE", 512))


def tensor_names(config: Mapping[str, Any], where: Path, stored: Iterable[str]) -> dict[str, str]:
    """The family's name of each tensor -> the name that a checkpoint stores it under.

    Raises:
        CheckpointError: two names mean the same tensor.
        UnsupportedModelError: a family that this version does not have.
    """
    renames = getattr(_family(config, where), "RENAMES", ())
    out: dict[str, str] = {}
    for name in stored:
        ours = next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name)
        if ours in out:
            raise CheckpointError(
                f"{where}: {shorten(out[ours])} and {shorten(name)} are the same tensor: fetch the checkpoint again"
            )
        out[ours] = name
    return out


def _family(config: Mapping[str, Any], where: Path) -> ModuleType:
    model_type = config.get("model_type")
    if model_type not in supported_model_types():
        raise UnsupportedModelError(
            f"{where}: model_type {shorten(model_type)} is not supported; supported: "
            f"{', '.join(supported_model_types())}"
        )
    return importlib.import_module(f"{__name__}.{model_type}")
