"""Recipes: the options of a build in a YAML file, such as those in engines/."""

from pathlib import Path

from trimkv_export.config import Recipe
from trimkv_export.errors import OptionError
from trimkv_export.files import read_yaml
from trimkv_export.plan import device

__all__ = ["read_recipe"]


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises OptionError, naming the file; an unknown device is one too."""
    recipe = Recipe.parse(read_yaml(path), path)
    try:
        device(recipe.device)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None
    return recipe
