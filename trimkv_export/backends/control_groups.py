"""The control groups of this process: a container, a service, and what they are in."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["group_folders"]


def group_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """Where limits on this process may stand: the folders of its groups and of those around them.

    Args:
        controller: "memory" or "cpu".
        root: where proc and sys lie.

    Yields:
        A folder, which need not exist, and whether it is of version 2 of control groups.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be the host's; then only the mount's own folder is there, and it is ours.
        for part in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield mount / part.relative_to("/"), not controllers
