"""Recipes: the options of a build in a YAML file, such as those in engines/."""

from collections.abc import Mapping
from pathlib import Path

from trimkv_export.config import Recipe, options_of
from trimkv_export.errors import OptionError
from trimkv_export.files import read_yaml
from trimkv_export.plan import device
from trimkv_export.words import did_you_mean, shorten

__all__ = ["read_recipe", "recipe_names"]

# Of an installed package, and of the source tree.
FOLDERS = (Path(__file__).parents[1] / "engines", Path(__file__).parents[2] / "engines")
REQUIRED = ("model", "budget", "precision", "device")


def recipe_names() -> dict[str, Path]:
    """The recipes that come with this program: name -> file, sorted."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_recipe(name: str | Path) -> Recipe:
    """The recipe of that name, or in that YAML file.

    Raises:
        OptionError: there is no such recipe; the file, which is named, cannot be read, has a key that is not known,
            lacks one, or has a value that cannot be used, such as an unknown device.
    """
    path = _find(name)
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise OptionError(f"{path}: a recipe is keys and values, such as 'budget: 256', got {shorten(content)}")
    known = [option.name for option in options_of(Recipe)]
    for key in content:
        if key not in known:
            hint = did_you_mean(str(key).replace("-", "_"), known, most=1) or f"the keys are {', '.join(known)}"
            raise OptionError(f"{path}: the key {shorten(key)} (value {shorten(content[key])}) is not known; {hint}")
    if missing := [key for key in REQUIRED if content.get(key) is None]:
        raise OptionError(f"{path}: lacks {', '.join(map(repr, missing))}")
    try:
        recipe = Recipe(**content)
        device(content["device"])
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None
    return recipe


def _find(name: str | Path) -> Path:
    names, path = recipe_names(), Path(name)
    if str(name) in names and not path.is_file():
        return names[str(name)]
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    hint = did_you_mean(str(name), names)
    raise OptionError(
        f"there is no recipe {shorten(str(name))}; {f'{hint} ' if hint else ''}The recipes are {', '.join(names)}; a "
        "file of your own may have any name with .yaml"
    )
