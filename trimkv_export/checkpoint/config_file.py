"""Read the JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from trimkv_export.errors import CheckpointError
from trimkv_export.files import is_file, is_folder, read_regular

__all__ = ["check_folder", "read_config", "read_json_object"]


def check_folder(path: Path) -> None:
    """Raise CheckpointError unless `path` is a folder."""
    if not is_folder(path):
        fault = "is a file, not a checkpoint folder" if is_file(path) else "does not exist"
        raise CheckpointError(f"{path}: {fault}: name the folder that holds config.json and the weights")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the object in `folder`/config.json as it is.

    Raises:
        CheckpointError: the file is missing, cannot be read, is not JSON, or is not an object.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: has no config.json: name the folder that holds config.json and the weights")
    return read_json_object(folder / "config.json")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object that the UTF-8 JSON file `path` holds.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or is not an object.
    """
    try:
        content = json.loads(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}): check its permissions") from error
    except (ValueError, RecursionError) as error:  # covers invalid UTF-8
        reason = str(error).splitlines()[0][:100]
        raise CheckpointError(f"{path}: is not JSON ({reason}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is a JSON {type(content).__name__}, not an object: fetch it again")
    return content
