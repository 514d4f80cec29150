"""Model families: one module each, named after Hugging Face's `model_type`.

A family has `decoder(read)`, and with a vision tower also `vision(read)` and `visual_tokens(read)`. They raise
CheckpointError for a bad value and UnsupportedModelError for an option that this version does not have; file, key and
value are named. Where checkpoints name tensors otherwise than the family does, `RENAMES` has pairs of prefixes: theirs,
and its own. Where the official code has another width of gates than elsewhere, `GATE_INTERMEDIATE_SIZE` is that.
"""

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trimkv_export.checkpoint.config_keys import HARMLESS
from trimkv_export.errors import CheckpointError, TrimKVError, UnsupportedModelError
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

# Keys that do not matter, by the name of the object that they lie in. Those of RoPE are for other programs, or for
# pictures, whose positions a model of text does not have; none of the kinds here reads them.
ROPE_KEYS = {"finetuned", "mrope_interleaved", "mrope_section", "original_max_position_embeddings", "type"}
TOP_KEYS = HARMLESS | {"model_type"}
# Some versions of transformers write the ids of visual tokens into the decoder's section too; those at the top count.
TOKEN_KEYS = {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
OTHER_KEYS: dict[str, Collection[str]] = {
    "": TOP_KEYS,
    "text_config": TOP_KEYS | TOKEN_KEYS,
    "vision_config": TOP_KEYS | {"vocab_size"},
    "rope_parameters": ROPE_KEYS,
    "rope_scaling": ROPE_KEYS,
}


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
    family, read = _family(config, where), ConfigReader(config, where, context)
    spec: DecoderSpec = family.decoder(read)
    if hasattr(family, "vision"):
        family.vision(read)
        family.visual_tokens(read)
    copies = _copies(config, read)
    if copies:
        _check_copies(family, config, where, context, spec, copies)
    read.refuse_rest({key: set(known) | copies if key == "" else known for key, known in OTHER_KEYS.items()})
    return spec


def _copies(config: Mapping[str, Any], read: ConfigReader) -> set[str]:
    """Keys of the decoder that stand at the top too, not in its section alone, as some versions of transformers do."""
    return {key for key in config if key in read.keys_read("text_config.") - read.keys_read("")}


def _check_copies(
    family: ModuleType,
    config: Mapping[str, Any],
    where: Path,
    context: int | None,
    spec: DecoderSpec,
    copies: Iterable[str],
) -> None:
    """Refuse copies that say something else than the section does, which alone is read."""

    def differ(keys: Iterable[str]) -> bool:
        text = config["text_config"] | {key: config[key] for key in keys if config[key] is not None}
        try:
            found: DecoderSpec = family.decoder(ConfigReader({**config, "text_config": text}, where, context))
        except TrimKVError:
            return True
        return found != spec

    copies = sorted(set(copies) - {"model_type", "vocab_size", "use_sliding_window", "sliding_window"})
    if differ(copies):
        key = next((key for key in copies if differ([key])), copies[0])
        raise UnsupportedModelError(
            f"{where}: {key} is {shorten(config[key])} at the top and {shorten(config['text_config'].get(key))} in "
            "text_config, which alone counts; say the same in both"
        )


def vision_spec(config: Mapping[str, Any], where: Path) -> tuple[VisionSpec, VisualTokens] | None:
    """The vision tower of a model and the ids of its tokens, None for a model of text. Raises as `decoder_spec`."""
    family, read = _family(config, where), ConfigReader(config, where)
    if not hasattr(family, "vision"):
        return None
    found = family.vision(read), family.visual_tokens(read)
    read.refuse_rest(OTHER_KEYS, only="vision_config.")
    return found


def gate_intermediate_size(config: Mapping[str, Any], where: Path) -> int:
    """The width of retention gates where their config does not say it: the official code's default for this model.

    Raises:
        UnsupportedModelError: a family that this version does not have.
    """
    return int(getattr(_family(config, where), "GATE_INTERMEDIATE_SIZE", 512))


def tensor_names(config: Mapping[str, Any], where: Path, stored: Iterable[str]) -> dict[str, str]:
    """The family's name of each tensor -> the name that a checkpoint stores it under.

    A model that was saved without its head, or as the part of another, has names without "model.".

    Raises:
        CheckpointError: two names mean the same tensor.
        UnsupportedModelError: a family that this version does not have.
    """
    renames, stored = getattr(_family(config, where), "RENAMES", ()), list(stored)
    bare = {"embed_tokens.weight", "language_model.embed_tokens.weight"} & set(stored)
    out: dict[str, str] = {}
    for name in stored:
        ours = next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name)
        if bare and not ours.startswith(("model.", "lm_head.")):
            ours = f"model.{ours}"
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
