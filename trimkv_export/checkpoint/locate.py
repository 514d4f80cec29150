"""Turn what the user names (alias, hub repository or folder) into a backbone folder and a gates folder."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_export.checkpoint.aliases import ALIASES, find_alias
from trimkv_export.checkpoint.backbone import has_backbone
from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.checkpoint.gates import base_model_of, is_gates_folder
from trimkv_export.checkpoint.hub import BACKBONE_FILES, COMPANION_FILES, CONFIG_FILES, GATES_FILES, download
from trimkv_export.checkpoint.shipped import bundled_gates, shipped_folder
from trimkv_export.errors import CheckpointError, OptionError
from trimkv_export.files import is_file, is_folder
from trimkv_export.words import did_you_mean

__all__ = ["Location", "locate", "locate_backbone", "locate_configs"]

CONFIG = "config.json"
SHOWN = 4  # checkpoints of a folder that an error names
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Location:
    """The two folders of a checkpoint, and the hub ids they were downloaded from (None for a local folder)."""

    backbone: Path
    gates: Path
    backbone_id: str | None
    gates_id: str | None


def locate(model: str, gates: str | None = None, *, revision: str | None = None, weights: bool = True) -> Location:
    """Find backbone and gates, downloading what is on the hub.

    Args:
        model: an alias ("qwen3-4b"), a hub id ("owner/name") or a folder, of a backbone or, without `gates`, of gates
            whose config.json names their backbone (`base_model`: a hub id, or a folder in or next to theirs), or whose
            folder holds it too. An existing folder wins over an alias or hub id of the same name.
        gates: an alias (its gates side), hub id or folder.
        revision: branch, tag or commit of the hub id in `model`; all else is fetched at its newest.
        weights: False fetches all of the backbone but its weights, enough to tell whether it can be built.

    Raises:
        CheckpointError: a name is none of the three forms, or a folder of several checkpoints; or the gates or the
            backbone are not known.
        OptionError: `revision` is given and `model` is not a hub id.
        DownloadError, OutputError, MissingDependencyError: as `hub.download`.
    """
    files = BACKBONE_FILES if weights else (*CONFIG_FILES, *COMPANION_FILES)
    return _locate(model, gates, revision, files, GATES_FILES, _fetch)


def locate_configs(model: str, gates: str | None = None, *, revision: str | None = None) -> Location:
    """Find the config.json files of backbone and gates, without weights: those that ship with this package first.

    Arguments and errors as `locate`.
    """
    return _locate(model, gates, revision, CONFIG_FILES, CONFIG_FILES, _shipped_or_fetched)


def locate_backbone(model: str) -> tuple[Path, str | None]:
    """Find a backbone, without gates: its folder, and the hub id that it was downloaded from (None for a local folder).

    Args and errors as `locate`.
    """
    source = _resolve(model, "model")
    return _fetch(source, BACKBONE_FILES), _hub_id(source)


def _locate(
    model: str,
    gates: str | None,
    revision: str | None,
    backbone_files: Sequence[str],
    gates_files: Sequence[str],
    fetch: Callable[..., Path],
) -> Location:
    source = _resolve(model, "model")
    alias = None if is_folder(Path(model)) else find_alias(model)
    if revision is not None and (isinstance(source, Path) or alias):
        raise OptionError(f"revision {revision!r} needs a hub id (owner/name) as the model, not {model!r}")
    if gates is not None:
        gates_source = _resolve(gates, "gates")
    elif alias:
        gates_source = _resolve(alias.name, "gates")
    else:  # the model is gates that name their backbone
        gates_path = fetch(source, gates_files, revision)
        backbone = _backbone_of(model, gates_path, local=isinstance(source, Path))
        return Location(fetch(backbone, backbone_files), gates_path, _hub_id(backbone), _hub_id(source))
    gates_path = fetch(gates_source, gates_files)  # first: it is small
    return Location(fetch(source, backbone_files, revision), gates_path, _hub_id(source), _hub_id(gates_source))


def _resolve(name: str, role: str) -> Path | str:
    """Return the folder that `name` is, else the hub id that it is or, as an alias, stands for in this role."""
    if name and is_folder(folder := Path(name)):
        if inner := _checkpoints_in(folder):
            raise CheckpointError(
                f"the {role} {name!r} is a folder of checkpoints ({', '.join(inner[:SHOWN])}"
                f"{', …' if len(inner) > SHOWN else ''}): name one of them"
            )
        return folder
    if is_file(Path(name)):
        raise CheckpointError(
            f"the {role} {name!r} is a file; name the folder that it lies in, with config.json and safetensors weights"
        )
    if alias := find_alias(name):
        bundled = bundled_gates(alias.gates)
        if role == "gates":
            return bundled or alias.gates
        # What stands next to gates of this program is taken first, as where these are named themselves.
        beside = bundled.parent / alias.backbone if bundled else None
        return beside if beside and is_folder(beside) else alias.backbone
    if HUB_ID.fullmatch(name):
        return name
    hint = did_you_mean(name.lower(), ALIASES)
    raise CheckpointError(
        f"the {role} {name!r} is neither a folder, nor a hub id (owner/name), nor an alias"
        f"{f'; {hint}' if hint else '.'} The aliases are {', '.join(ALIASES)}"
    )


def _checkpoints_in(folder: Path) -> list[str]:
    """The folders in one that is no checkpoint itself which are; none where they cannot be read."""
    try:
        return [] if (folder / CONFIG).exists() else sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    except OSError:
        return []


def _backbone_of(model: str, gates_path: Path, *, local: bool) -> Path | str:
    """Return the folder or hub id of the backbone that the gates in `gates_path` name."""
    if not is_gates_folder(gates_path):
        raise CheckpointError(f"{model!r} holds no gates: name the gates of this backbone with --gates")
    if local and has_backbone(gates_path):
        return gates_path
    base_model = base_model_of(read_config(gates_path))
    name_both = "name the backbone with --model, and the gates with --gates"
    if base_model is None:
        raise CheckpointError(f"the gates {model!r} have no base_model in config.json: {name_both}")
    if local:
        for folder in (gates_path / base_model, gates_path.resolve().parent / base_model):
            if is_folder(folder):
                return folder
    if HUB_ID.fullmatch(base_model):
        return base_model
    raise CheckpointError(
        f"the gates {model!r} name the backbone {base_model[:200]!r}, which is neither a folder next to them nor a hub "
        f"id: {name_both}"
    )


def _fetch(source: Path | str, files: Sequence[str], revision: str | None = None) -> Path:
    return source if isinstance(source, Path) else download(source, files, revision=revision)


def _shipped_or_fetched(source: Path | str, files: Sequence[str], revision: str | None = None) -> Path:
    shipped = shipped_folder(source) if isinstance(source, str) and revision is None else None
    return shipped or _fetch(source, files, revision)


def _hub_id(source: Path | str) -> str | None:
    return source if isinstance(source, str) else None
