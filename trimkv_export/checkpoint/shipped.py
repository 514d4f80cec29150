"""The config.json files that ship with the package: those of every alias, and of some backbones beside them.

`configs/OWNER/NAME/config.json`, named as on the Hugging Face hub, so that a folder is a checkpoint without weights.
What a model needs can then be said without the network. `configs/README.md` says where each file is from.
"""

from functools import cache
from pathlib import Path
from typing import Any

from trimkv_export.checkpoint.aliases import ALIASES, find_alias, similar_aliases
from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.errors import CheckpointError

__all__ = ["shipped_config", "shipped_folder", "shipped_repositories"]

CONFIGS = Path(__file__).parent / "configs"


@cache
def shipped_repositories() -> tuple[str, ...]:
    """Hub ids (owner/name) of every shipped config.json, backbones and gates, sorted."""
    return tuple(sorted(file.parent.relative_to(CONFIGS).as_posix() for file in CONFIGS.glob("*/*/config.json")))


def shipped_folder(repo_id: str) -> Path | None:
    """Return the folder of a repository's shipped config.json; None if it is not shipped. Case does not matter."""
    found = {repository.lower(): repository for repository in shipped_repositories()}.get(repo_id.lower())
    return CONFIGS / found if found else None


def shipped_config(alias: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config.json of an alias's backbone and that of its gates.

    Raises:
        CheckpointError: there is no such alias; the nearest ones are named.
    """
    found = find_alias(alias)
    if found is None:
        similar = similar_aliases(alias)
        hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else "."
        raise CheckpointError(f"{alias!r} is not an alias{hint} The aliases are {', '.join(ALIASES)}")
    backbone, gates = _folder(found.backbone), _folder(found.gates)
    return read_config(backbone), read_config(gates)


def _folder(repo_id: str) -> Path:
    folder = shipped_folder(repo_id)
    if folder is None:
        raise CheckpointError(f"{CONFIGS / repo_id}: is missing: install trimkv-export again")
    return folder
