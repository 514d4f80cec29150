"""run --check-plan and bench --check-plan: what a run took, against the plan in its package."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import Cli, copy_package, seal

from trimkv_export.backends import process_memory
from trimkv_export.backends.process_memory import status_bytes
from trimkv_export.errors import EngineError, MissingDependencyError, OptionError, PackageError, VerificationError
from trimkv_export.package import Package
from trimkv_export.plan import check


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had just started: tests hold much that a run does not."""
    monkeypatch.setattr(process_memory, "AT_START", status_bytes("VmHWM") - 60_000_000)


def test_a_run_within_its_plan(cli: Cli, package: Path, fresh: None) -> None:
    done = cli("run", package, "--prompt", "abc", "--max-new-tokens", "2", "--check-plan", "--json")
    assert done.code == 0
    found, planned = json.loads(done.out)["plan"], json.loads((package / "memory_plan.json").read_text())["plan"]
    assert found["planned_bytes"] == planned["total_bytes"] == sum(found["parts"].values())
    assert found["cache_bytes"] == found["planned_cache_bytes"] == planned["cache_bytes"]
    assert found["measured_share"] == found["measured_bytes"] / found["planned_bytes"] <= 1.05
    assert done.err.startswith("plan ")


def test_reality_beyond_the_plan(cli: Cli, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "AT_START", status_bytes("VmHWM") - 200_000_000)
    done = cli("run", package, "--prompt", "abc", "--max-new-tokens", "2", "--check-plan")
    assert done.code == 9
    assert "of the plan's" in done.err.splitlines()[-1]


def test_a_cache_of_another_size(cli: Cli, package: Path, tmp_path: Path, fresh: None) -> None:
    changed = copy_package(package, tmp_path / "changed")
    plan = json.loads((changed / "memory_plan.json").read_text())
    plan["plan"]["cache_bytes"] += 256
    (changed / "memory_plan.json").write_text(json.dumps(plan))
    seal(changed)
    done = cli("run", changed, "--prompt", "abc", "--max-new-tokens", "2", "--check-plan")
    assert done.code == 9
    assert "bytes, planned were" in done.err


def test_a_package_without_a_plan_of_a_run(cli: Cli, package: Path, tmp_path: Path) -> None:
    old = copy_package(package, tmp_path / "old")
    plan = json.loads((old / "memory_plan.json").read_text())
    del plan["plan"]
    (old / "memory_plan.json").write_text(json.dumps(plan))
    seal(old)
    done = cli("run", old, "--prompt", "abc", "--max-new-tokens", "2", "--check-plan")
    assert done.code == 6
    assert "has no plan of a run; build the package again" in done.err


def test_bench_compares_too(cli: Cli, package: Path, fresh: None) -> None:
    done = cli("bench", package, "--prompt-tokens", "9", "--new-tokens", "2", "--check-plan", "--json")
    assert done.code == 0
    assert json.loads(done.out)["plan"]["measured_share"] <= 1.05


class FakeNvml:
    """NVML with one GPU that lists these (process, bytes)."""

    class NVMLError(Exception):
        pass

    def __init__(self, *processes: tuple[int, int | None]) -> None:
        self._processes = processes

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._processes]


@pytest.fixture
def gpu_package(package: Path, tmp_path: Path) -> Package:
    """A package with the plan of a GPU, for two sequences."""
    planned = copy_package(package, tmp_path / "planned")
    plan = json.loads((planned / "memory_plan.json").read_text())
    plan["device_plan"] = plan["plan"] | {"device": "h100", "batch": 2}
    (planned / "memory_plan.json").write_text(json.dumps(plan))
    seal(planned)
    return Package.open(planned)


def test_memory_of_a_gpu_is_that_of_this_process(gpu_package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = check.planned(gpu_package, "cuda", 2)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml((1, 10**12), (os.getpid(), 50_000_000)))
    found = check.compare(plan, plan["cache_bytes"], vision=True, provider="cuda")
    assert (found["planned_bytes"], found["measured_bytes"]) == (plan["total_bytes"], 50_000_000)
    check.require(found)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml((os.getpid(), int(plan["total_bytes"] * 1.06))))
    with pytest.raises(VerificationError, match="106% of the plan's"):
        check.require(check.compare(plan, plan["cache_bytes"], vision=True, provider="cuda"))


def test_a_plan_for_another_device_or_batch(gpu_package: Package, package: Path) -> None:
    with pytest.raises(OptionError, match=r"is for a batch of 2, this run's is 1; .* build with --max-batch 1"):
        check.planned(gpu_package, "cuda")
    with pytest.raises(PackageError, match=r"has no plan for a GPU.* build the package with --device"):
        check.planned(Package.open(package), "cuda")


def test_a_driver_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingDependencyError, match="nvidia-ml-py"):
        process_memory.gpu_bytes()
    for processes in ([(1, 5)], [(os.getpid(), None)]):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*processes))
        with pytest.raises(EngineError, match="does not list this process"):
            process_memory.gpu_bytes()
    failing = FakeNvml()
    monkeypatch.setattr(
        failing, "nvmlDeviceGetCount", lambda: (_ for _ in ()).throw(FakeNvml.NVMLError("Not Supported"))
    )
    monkeypatch.setitem(sys.modules, "pynvml", failing)
    with pytest.raises(EngineError, match="Not Supported"):
        process_memory.gpu_bytes()


@pytest.mark.parametrize("plan", [5, [], {}, {"batch": 1}, {"weight_bytes": "x"}, {"weight_bytes": 10**400}])
def test_a_plan_by_a_stranger(cli: Cli, package: Path, tmp_path: Path, plan: Any) -> None:
    changed = copy_package(package, tmp_path / "package")
    whole = json.loads((changed / "memory_plan.json").read_text())
    if isinstance(plan, dict) and "weight_bytes" in plan:
        plan = whole["plan"] | plan
    (changed / "memory_plan.json").write_text(json.dumps(whole | {"plan": plan}))
    seal(changed)
    done = cli("run", changed, "--prompt", "abc", "--max-new-tokens", "2", "--check-plan")
    assert (done.code, "memory_plan.json: plan is not a plan, but " in done.err) == (PackageError.exit_code, True)
