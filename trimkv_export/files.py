"""Files that people give: text, JSON and YAML, read with one clear error; and files that are linked or copied."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from trimkv_export.errors import OptionError, OutputError, TrimKVError
from trimkv_export.words import shorten

__all__ = ["decode_text", "link_or_copy", "read_json_object", "read_text", "read_yaml", "require_writable"]


def read_text(path: Path, what: str, error: type[TrimKVError] = OptionError) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Args:
        path: the file.
        what: begins the message, such as "--text" or "the task file".
        error: the type that is raised.

    Raises:
        TrimKVError: of the type `error`; the file cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as fault:  # ValueError: a path with a NUL byte
        raise error(f"{what} {path}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from None
    return decode_text(content, f"{what} {path}", error)


def decode_text(content: bytes, what: str, error: type[TrimKVError] = OptionError) -> str:
    """Bytes as UTF-8 text, without the byte-order mark that some editors write first.

    Raises:
        TrimKVError: of the type `error`, with the first bad byte; they are no UTF-8.
    """
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as fault:
        raise error(f"{what}: is not UTF-8 text: byte {content[fault.start]:#04x} at {fault.start}") from None


def read_json_object(path: Path, error: type[TrimKVError], advice: str, *, optional: bool = False) -> dict[str, Any]:
    """The object in a UTF-8 JSON file.

    Args:
        path: the file.
        error: the type that is raised.
        advice: what to do, at the end of the message.
        optional: return {} where there is no such file.

    Raises:
        TrimKVError: of the type `error`; the file cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as fault:
        if optional and isinstance(fault, FileNotFoundError):
            return {}
        raise error(f"{path}: cannot be read ({fault.strerror or fault}): check its permissions") from fault
    except (ValueError, RecursionError) as fault:  # covers invalid UTF-8
        reason = str(fault).splitlines()[0][:100]
        raise error(f"{path}: is not JSON ({reason}): {advice}") from fault
    if not isinstance(content, dict):
        raise error(f"{path}: is a JSON {type(content).__name__}, not an object: {advice}")
    return content


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values only, and no key twice.

    Raises:
        OptionError: it cannot be read or is not such YAML; the line is named.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that is there twice; SafeLoader lets the last one win."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for index, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:index]):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shorten(key.value)} is there twice", problem_mark=key.start_mark
                )
        loader.flatten_mapping(node)
        return dict(loader.construct_pairs(node, deep=True))

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(path.read_bytes(), Loader)  # noqa: S506 (it is a SafeLoader)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error})") from None
    # TypeError: a list as a key. ValueError: a date that does not exist.
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise OptionError(f"{path}{line}: is not the YAML expected here: {problem}") from None


def require_writable(path: Path) -> None:
    """Refuse, before the work, a file that could not be written after it. Nothing is created.

    Raises:
        OutputError: it is a folder, a device or a pipe, its folder is missing, or there is no permission.
    """
    there = path
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise OutputError(f"{path}: is a folder: name a file in it")
        if not stat.S_ISREG(mode):  # files are replaced as a whole, and /dev/full would be, too
            raise OutputError(f"{path}: is a device or a pipe: name an ordinary file")
    except FileNotFoundError:
        there = path.parent
        if not there.is_dir():
            raise OutputError(f"{path}: cannot be written: there is no folder {there}; make it first") from None
    except (OSError, ValueError) as fault:  # a name too long, a path with a NUL byte
        raise OutputError(f"{path}: cannot be written: {getattr(fault, 'strerror', None) or fault}") from None
    if not os.access(there, os.W_OK):
        raise OutputError(f"{path}: cannot be written: permission denied")


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that cannot be. Symbolic links are followed: they would tie it to a place.

    Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
