"""How much memory this machine can give a new process now, as Linux counts it."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from trimkv_export.backends.control_groups import group_folders
from trimkv_export.errors import OptionError

__all__ = ["available_memory", "host_memory", "meminfo"]

# Limit, use, and what of the use the kernel takes back before it refuses: files that were not read for a while.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@cache
def host_memory() -> int:
    """`available_memory` of this machine, read once: all plans of one command compare with the same figure."""
    return available_memory()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that a new process can take without swapping.

    The kernel's estimate (MemAvailable), or less where a control group limits this process: a container, a service.

    Args:
        root: where proc and sys lie.

    Raises:
        OptionError: /proc/meminfo does not say.
    """
    try:
        found = meminfo(root)["MemAvailable"]
    except (OSError, KeyError):
        raise OptionError(
            "/proc/meminfo does not say how much memory is available here; name another --device, or none"
        ) from None
    return max(0, min([found, *_left_to_groups(root)]))


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """What the kernel says of this machine's memory, in bytes, by its names.

    Raises:
        OSError: it says nothing.
    """
    return {name.removesuffix(":"): count * 1024 for name, count in _fields(root / "proc/meminfo").items()}


def _left_to_groups(root: Path) -> Iterator[int]:
    """What each control group with a limit, this process's and those around it, still lets it take."""
    for folder, second in group_folders("memory", root):
        names = V2 if second else V1
        try:
            limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names[:2])
            yield limit - used + _fields(folder / "memory.stat").get(names[2], 0)
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue


def _fields(path: Path) -> dict[str, int]:
    """Name and number of each line."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
