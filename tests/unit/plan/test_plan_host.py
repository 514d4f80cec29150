"""What this machine can give now, from files as Linux writes them."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from trimkv_export.errors import OptionError
from trimkv_export.plan.host import available_memory, host_memory

MB = 1 << 20
MEMINFO = "MemTotal:       16384000 kB\nMemFree:          100 kB\nMemAvailable:    8192 kB\nHugePages_Total:       0\n"
V1_UNLIMITED = "9223372036854771712\n"


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in ({"proc/meminfo": MEMINFO} | dict(files)).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, used: int, names: tuple[str, str, str]) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/{folder}{names[0]}": limit,
        f"sys/fs/cgroup/{folder}{names[1]}": f"{used}\n",
        f"sys/fs/cgroup/{folder}memory.stat": f"anon 7\n{names[2]} {MB}\n",
    }


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("files", "megabytes"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n"}, 8),
        # A limit of the group itself, of one around it, and one above what is there.
        ({"proc/self/cgroup": "0::/a/b\n"} | group("a/b/", f"{6 * MB}\n", 2 * MB, V2), 5),
        ({"proc/self/cgroup": "0::/a/b\n"} | group("a/b/", "max\n", MB, V2) | group("a/", f"{4 * MB}", 2 * MB, V2), 3),
        ({"proc/self/cgroup": "0::/a\n"} | group("a/", f"{60 * MB}\n", 2 * MB, V2), 8),
        # A container that sees the path of its host.
        ({"proc/self/cgroup": "0::/docker/12\n"} | group("", f"{3 * MB}\n", MB, V2), 3),
        ({"proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/12\n0::/\n"} | group("memory/", f"{3 * MB}", 2 * MB, V1), 2),
        ({"proc/self/cgroup": "4:hugetlb,memory:/x\n"} | group("memory/x/", V1_UNLIMITED, 2 * MB, V1), 8),
        # Already above its limit.
        ({"proc/self/cgroup": "0::/a\n"} | group("a/", f"{MB}\n", 9 * MB, V2), 0),
    ],
)
def test_what_is_available(tmp_path: Path, files: Mapping[str, str], megabytes: int) -> None:
    assert available_memory(machine(tmp_path, files)) == megabytes * MB


@pytest.mark.parametrize("meminfo", [None, "MemTotal: 5 kB\n"])
def test_a_machine_that_does_not_say(tmp_path: Path, meminfo: str | None) -> None:
    if meminfo is not None:
        machine(tmp_path, {"proc/meminfo": meminfo})
    with pytest.raises(OptionError, match="does not say how much memory is available"):
        available_memory(tmp_path)


def test_this_machine() -> None:
    assert 0 < host_memory() == host_memory()
