"""The config.json files that ship with the package: those of every alias, and of some other backbones.

`configs/OWNER/NAME/config.json`, named as on the Hugging Face hub, so that a folder is a checkpoint without weights.
What a model needs can then be said without the network. `configs/README.md` says where each file is from. Gates that
were trained here come with their weights.
"""

from functools import cache
from pathlib import Path

__all__ = ["bundled_gates", "shipped_folder", "shipped_repositories"]

CONFIGS = Path(__file__).parent / "configs"
# Where `examples/` lies: in the wheel, and in the source tree.
FOLDERS = (Path(__file__).parents[1], Path(__file__).parents[2])


@cache
def shipped_repositories() -> tuple[str, ...]:
    """Hub ids (owner/name) of every shipped config.json, backbones and gates, sorted."""
    return tuple(sorted(file.parent.relative_to(CONFIGS).as_posix() for file in CONFIGS.glob("*/*/config.json")))


def shipped_folder(repo_id: str) -> Path | None:
    """Return the folder of a repository's shipped config.json; None if it is not shipped. Case does not matter."""
    found = {repository.lower(): repository for repository in shipped_repositories()}.get(repo_id.lower())
    return CONFIGS / found if found else None


def bundled_gates(name: str) -> Path | None:
    """Return the folder of gates that come with this program (`examples/…`); None if `name` is no such."""
    if not name.startswith("examples/"):
        return None
    return next((folder / name for folder in FOLDERS if (folder / name).is_dir()), None)
