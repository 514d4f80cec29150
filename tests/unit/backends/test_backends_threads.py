"""Threads by default, from what Linux says of this process."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trimkv_export.backends.threads import MAX_THREADS, ThreadLimits, step_threads, thread_limits
from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        # The group's own, and a smaller one around it.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "250000 100000\n",
            },
            2.5,
        ),
        # A container that sees the path of its host.
        ({"proc/self/cgroup": "0::/docker/12\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/\n0::/\n"} | v1("sys/fs/cgroup/cpu", -1), None),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n0::/\n"} | v1("sys/fs/cgroup/cpu/x", 20_000, 10_000), 2.0),
        ({"proc/self/cgroup": "4:cpuacct:/x\n3:cpu:/docker/1\n"} | v1("sys/fs/cgroup/cpu", 150_000), 1.5),
        ({"proc/self/cgroup": "4:cpuset:/x\n"} | v1("sys/fs/cgroup/cpu/x", 150_000), None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "garbage\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 0\n"}, None),
    ],
)
def test_quotas(tmp_path: Path, files: Mapping[str, str], quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert thread_limits(tmp_path) == ThreadLimits(len(os.sched_getaffinity(0)), quota)


@pytest.mark.parametrize(
    ("processors", "quota", "threads"),
    [(8, None, 8), (8, 2.0, 2), (8, 2.9, 2), (8, 0.5, 1), (2, 16.0, 2), (1, None, 1), (4096, None, MAX_THREADS)],
)
def test_the_smaller_is_the_default(processors: int, quota: float | None, threads: int) -> None:
    assert ThreadLimits(processors, quota).default == threads


def test_a_system_without_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: (_ for _ in ()).throw(OSError(38, "not implemented")))
    assert thread_limits(tmp_path).processors == os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert thread_limits(tmp_path) == ThreadLimits(1, None)


@pytest.mark.parametrize("asked", [0, -1, True, 1.5, "2", MAX_THREADS + 1, 99999999999])
def test_threads_that_cannot_be(asked: Any) -> None:
    with pytest.raises(OptionError, match="threads must be a whole number from 1 to 1024, got"):
        step_threads(asked)


def test_an_engine_always_says_how_many(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_threads(3) == 3
    for asked, found in ((None, thread_limits().default), (1, 1), (2, 2)):
        with Engine.open(package, threads=asked) as engine:
            assert engine.threads == found
            assert engine.backend.get_session_options().intra_op_num_threads == found
    monkeypatch.setattr("trimkv_export.backends.threads.thread_limits", lambda: ThreadLimits(7, 1.0))
    with Engine.open(package) as engine:
        assert engine.threads == 1
