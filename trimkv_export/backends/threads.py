"""How many threads a step takes: by default as many as this process may keep busy.

The number is always given to ONNX Runtime. Left alone it takes one thread for each core of the machine and ties each to
one, which fails with error lines where a container has fewer; and threads beyond a container's quota only make it wait.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trimkv_export.backends.control_groups import group_folders
from trimkv_export.checks import require_whole

__all__ = ["MAX_THREADS", "ThreadLimits", "step_threads", "thread_limits"]

MAX_THREADS = 1024


@dataclass(frozen=True)
class ThreadLimits:
    """What bounds the threads of this process.

    Attributes:
        processors: that it may run on.
        quota: processors' worth of time that its control groups give it; None is no limit.
    """

    processors: int
    quota: float | None

    @property
    def default(self) -> int:
        """Threads of a step: the smaller of the two, at least 1."""
        allowed = self.processors if self.quota is None else min(self.processors, int(self.quota))
        return max(1, min(allowed, MAX_THREADS))


def thread_limits(root: Path = Path("/")) -> ThreadLimits:
    """Read the limits of this process. root: where proc and sys lie."""
    # Not on every system; sched_getaffinity also fails in some sandboxes.
    try:
        processors = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        processors = os.cpu_count() or 1
    return ThreadLimits(processors, min(_quotas(root), default=None))


def step_threads(asked: int | None) -> int:
    """Threads of a step: those asked for, or by default those of `thread_limits`.

    Raises:
        OptionError: `asked` is not a whole number from 1 to MAX_THREADS.
    """
    if asked is None:
        return thread_limits().default
    return require_whole("threads", asked, 1, MAX_THREADS)


def _quotas(root: Path) -> Iterator[float]:
    """The quota of each control group that has one."""
    for folder, second in group_folders("cpu", root):
        try:
            if second:
                quota, period = map(int, (folder / "cpu.max").read_text(encoding="ascii").split())
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = (int((folder / name).read_text(encoding="ascii")) for name in names)
        except (OSError, ValueError):  # no such group, or its quota is "max"
            continue
        if quota > 0 and period > 0:  # -1 is no limit
            yield quota / period
