"""Read the config.json of a checkpoint folder."""

from pathlib import Path
from typing import Any

from trimkv_export.errors import CheckpointError
from trimkv_export.files import is_file, is_folder, read_json_object

__all__ = ["read_config"]


def read_config(folder: Path) -> dict[str, Any]:
    """Return the object in `folder`/config.json as it is.

    Raises:
        CheckpointError: there is no such folder or file, or the file cannot be read, is not JSON, or is not an object.
    """
    file = folder / "config.json"
    if not is_folder(folder) or not file.exists():
        missing = "has no config.json" if is_folder(folder) else "is a file, not a checkpoint folder"
        fault = missing if is_folder(folder) or is_file(folder) else "does not exist"
        raise CheckpointError(f"{folder}: {fault}: name the folder that holds config.json and the weights")
    return read_json_object(file, CheckpointError, "fetch it again")
