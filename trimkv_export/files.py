"""Files that people give: text, JSON and YAML, read with one clear error; and files that are written, linked or copied.

What is read is an ordinary file of a sensible size, so that nothing in a stranger's folder keeps a reader waiting or
feeds it without end. A path that somebody typed may also be a pipe that the shell made for it, `<(…)`.
"""

import contextlib
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trimkv_export.errors import OptionError, OutputError, TrimKVError
from trimkv_export.words import first_line, shorten

__all__ = [
    "LFS_POINTER",
    "decode_text",
    "emptied",
    "is_file",
    "is_folder",
    "link_or_copy",
    "open_regular",
    "read_json_object",
    "read_regular",
    "read_text",
    "read_yaml",
    "require_writable",
    "writable",
]

# Of a JSON or text file in a checkpoint or a package: twenty times the largest tokenizer.json that is known.
MAX_TEXT_BYTES = 512 << 20
# What Git puts in place of a large file that it has not fetched.
LFS_POINTER = b"version https://git-lfs"
# Of a YAML file: a recipe has some hundred bytes.
MAX_YAML_BYTES = 1 << 20
MAX_YAML_VALUES = 1 << 17


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a name that the system cannot have, or may not look at, is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long, in a folder without permission; a NUL byte, a lone surrogate
        return False


def is_file(path: Path) -> bool:
    """Whether there is such an ordinary file, or a link to one; else as `is_folder`."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[io.BufferedReader]:
    """Open an ordinary file for reading.

    Raises OSError, also for a pipe, a device or a folder; it never waits for one.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as fault:  # a NUL byte, a lone surrogate
        raise OSError(str(fault)) from None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is not an ordinary file")
        yield file


def read_regular(path: Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of an ordinary file of at most `most` bytes. Raises OSError, as `open_regular` and for a larger one."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(f"it has {size:,} bytes, and at most {most:,} are sensible")
        return file.read(most)


def _read_given(path: Path, most: int) -> bytes:
    """As `read_regular`, and the pipes that a shell gives a program in place of a file."""
    if path.is_absolute() and (path == Path("/dev/stdin") or path.parent in _SHELL_PIPES):
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise OSError(f"it has more than {most:,} bytes")
        return content
    return read_regular(path, most)


_SHELL_PIPES = (Path("/dev/fd"), Path("/proc/self/fd"))


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
        content = _read_given(path, MAX_TEXT_BYTES)
    except OSError as fault:
        raise error(f"{what} {path}: cannot be read: {fault.strerror or fault}") from None
    return decode_text(content, f"{what} {path}", error)


def decode_text(content: bytes, what: str, error: type[TrimKVError] = OptionError) -> str:
    """Bytes as UTF-8 text, without the byte-order mark that some editors write first.

    Raises:
        TrimKVError: of the type `error`, with the first bad byte; they are not UTF-8.
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
        content = json.loads(read_regular(path).decode("utf-8-sig"))
    except OSError as fault:
        if optional and isinstance(fault, FileNotFoundError):
            return {}
        raise error(f"{path}: cannot be read ({fault.strerror or fault}): check its permissions") from fault
    except (ValueError, RecursionError) as fault:  # covers invalid UTF-8
        raise error(f"{path}: is not JSON ({first_line(fault)}): {advice}") from fault
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
        """Refuses a key that is there twice, where SafeLoader lets the last one win, and counts what aliases stand for:
        ten lines of them can mean a billion values.
        """

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
            node = super().compose_node(parent, index)
            if alias and node not in self.sizes:
                raise yaml.MarkedYAMLError(problem="an alias stands for what it is part of", problem_mark=mark)
            if not alias:
                parts = [] if isinstance(node, yaml.ScalarNode) else node.value
                flat = (each for part in parts for each in (part if isinstance(part, tuple) else (part,)))
                self.sizes[node] = 1 + sum(self.sizes[each] for each in flat)
            if self.sizes[node] > MAX_YAML_VALUES:
                problem = f"its aliases stand for more than {MAX_YAML_VALUES:,} values"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            return node

        def __init__(self, stream: bytes) -> None:
            super().__init__(stream)
            self.sizes: dict[Any, int] = {}

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str):  # else a list or an object, which no dict takes as a key
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {shorten(key.value)} is there twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        loader.flatten_mapping(node)
        return dict(loader.construct_pairs(node, deep=True))

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(_read_given(path, MAX_YAML_BYTES), Loader)  # noqa: S506 (it is a SafeLoader)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error})") from None
    # TypeError: a list as a key. ValueError: a date that does not exist.
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise OptionError(f"{path}{line}: is not the YAML expected here: {problem[:200]}") from None


def require_writable(path: Path) -> None:
    """Refuse, before the work, a file that could not be written after it. Nothing is created.

    Raises:
        OutputError: it is a folder, a device, a pipe or another thing that is no ordinary file; its folder is missing,
            or there is no permission.
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
        if path.is_symlink():
            raise OutputError(f"{path}: is a symbolic link to nothing: name another file") from None
        if not there.is_dir():
            raise OutputError(f"{path}: cannot be written: there is no folder {there}; make it first") from None
    except (OSError, ValueError) as fault:  # a name too long, a path with a NUL byte
        raise OutputError(f"{path}: cannot be written: {getattr(fault, 'strerror', None) or fault}") from None
    if not os.access(there, os.W_OK):
        raise OutputError(f"{path}: cannot be written: permission denied")


@contextlib.contextmanager
def writable(path: Path, what: str, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write a file that a user named: it appears whole, or what was there stays.

    The content goes to a hidden file of the same folder, which is renamed at the end. A symbolic link is followed.

    Args:
        path: the file.
        what: begins the reason, such as "the session cannot be saved".
        mode: permissions of a new file, less the process's umask; a file that was there keeps its own.

    Raises:
        OutputError: as `require_writable`, or writing failed.
    """
    require_writable(path)
    try:
        target = path.resolve()
        hidden = target.with_name(f".{secrets.token_hex(8)}.writing")
        kept = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        try:
            with os.fdopen(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
                if kept is not None:
                    os.fchmod(file.fileno(), kept)
                yield file
            require_writable(path)  # it may have become something else meanwhile
            hidden.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                hidden.unlink()
            raise
    except OSError as fault:
        raise OutputError(f"{path}: {what}: {fault.strerror or fault}") from None


def emptied(path: Path) -> Path:
    """The path, with nothing there: what is written now goes to a new file, not into one that others share.

    Raises OSError.
    """
    path.unlink(missing_ok=True)
    return path


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that cannot be done.

    Symbolic links are followed: they would tie the target to a place.

    Raises:
        OSError: the target cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), emptied(target))
    except OSError:
        shutil.copyfile(source, target)
