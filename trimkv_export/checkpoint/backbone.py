"""Open a backbone: a folder in the Hugging Face layout, config.json and safetensors weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_export.checkpoint.check import quote_some
from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.checkpoint.safetensors_file import read_header
from trimkv_export.checkpoint.tensors import TensorInfo
from trimkv_export.errors import CheckpointError
from trimkv_export.files import is_file, read_json_object
from trimkv_export.words import shorten

__all__ = ["Backbone", "has_backbone", "open_backbone", "read_weights"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
GATES_STEM = "trimkv_weights"  # gates may lie in the same folder; they are not the backbone's
SHARD = re.compile(r"[^/\\\0.][^/\\\0]*\.safetensors")
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.bin.index.json", "*.msgpack", "*.h5")


@dataclass(frozen=True)
class Backbone:
    """An opened backbone.

    Attributes:
        path: its folder.
        config: config.json as it is.
        tensors: every tensor of its weight files by name; empty if opened without weights.
        files: the weight files, sorted; empty if opened without weights.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]


def open_backbone(path: Path, *, weights: bool = True) -> Backbone:
    """Read config.json and the headers of the weight files.

    The weights are, in this order of preference: model.safetensors, model.safetensors.index.json with its shards, a
    single other *.safetensors.

    Args:
        path: the folder.
        weights: False reads only config.json.

    Raises:
        CheckpointError: config.json or weights are missing, in another format, corrupt, or inconsistent.
    """
    for name in ADAPTER_FILES:
        if (path / name).exists():
            raise CheckpointError(
                f"{path}: has an adapter of peft ({name}), which transformers adds to the weights: merge it with "
                "merge_and_unload and save that to a folder of its own, or remove the adapter if the base is meant"
            )
    config = read_config(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"{path / 'config.json'}: has the model_type {model_type!r}, and a backbone needs one such as 'qwen3'"
        )
    if not weights:
        return Backbone(path, config, {}, ())
    tensors = read_weights(path, config)
    if not tensors:
        raise CheckpointError(f"{path}: its weights hold no tensor: fetch them again")
    return Backbone(path, config, tensors, tuple(sorted({tensor.file for tensor in tensors.values()})))


def has_backbone(path: Path) -> bool:
    """Whether the weights of a folder, under the names that a backbone's have, are those of a language model.

    Raises:
        CheckpointError: they cannot be read.
    """
    if not (path / WEIGHTS).exists() and not (path / INDEX).exists():
        return False
    return any(name.endswith("embed_tokens.weight") for name in read_weights(path, {}))


def read_weights(path: Path, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Every tensor of a folder's weight files by name.

    Args:
        path: the folder.
        config: its config.json, for what an error advises.

    Raises:
        CheckpointError: the weights are missing, in another format, corrupt, or inconsistent.
    """
    if not (path / WEIGHTS).exists() and (path / INDEX).exists():
        return _read_shards(path)
    return read_header(_single_file(path, config))


def _single_file(path: Path, config: Mapping[str, Any]) -> Path:
    """Return the one weight file of a folder without an index."""
    if (path / WEIGHTS).exists():
        return path / WEIGHTS
    found = sorted(file for file in path.glob("*.safetensors") if file.stem != GATES_STEM)
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path}: has {quote_some(file.name for file in found)} and no {INDEX} that says what they hold: fetch it"
        )
    others = sorted(file.name for pattern in OTHER_FORMATS for file in path.glob(pattern) if file.stem != GATES_STEM)
    if others:
        # Into another folder, and by the class that has the head.
        kind = "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForCausalLM"
        raise CheckpointError(
            f"{path}: has {quote_some(others)} and no safetensors weights: write them to another folder with "
            f"transformers' {kind}.from_pretrained(folder).save_pretrained(another), and copy the tokenizer there"
        )
    raise CheckpointError(f"{path}: has no weights: expected {WEIGHTS}, or {INDEX} and its shards")


def _read_shards(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that the index names. Tensors and files it does not name are ignored."""
    index = path / INDEX
    weight_map = _weight_map(index)
    shards: dict[str, dict[str, TensorInfo]] = {}
    holder: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if not is_file(path / shard):
            raise CheckpointError(
                f"{path}: the shard {shorten(shard)} that {INDEX} names is missing: the download is incomplete; "
                "fetch it again"
            )
        shards[shard] = read_header(path / shard)
        for name in shards[shard]:
            if name in holder:
                raise CheckpointError(f"{path}: {name!r} is in both {holder[name]!r} and {shard!r}: fetch them again")
            holder[name] = shard
    wrong = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if wrong:
        raise CheckpointError(
            f"{index}: says that {weight_map[wrong[0]]!r} holds {quote_some(wrong[:1])}, and it does not "
            f"({len(wrong)} such in all): index and shards are of different versions; fetch both again"
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json_object(index, CheckpointError, "fetch it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' from tensors to files: fetch it again")
    for name, shard in weight_map.items():
        # It may become a file of the package: of that name, and in no other folder.
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{index}: {shorten(name)} lies in {shorten(str(shard))}, which is no file name of weights: one ends "
                "in .safetensors and has no folder; fetch it again"
            )
    return weight_map
