"""run --check-plan: what a run took, against the plan in its package."""

import json
from pathlib import Path

import pytest
from support import Cli, copy_package, seal

from trimkv_export.cli import plan_check
from trimkv_export.cli.resident import status_bytes


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had just started: tests hold much that a run does not."""
    monkeypatch.setattr(plan_check, "AT_START", status_bytes("VmHWM") - 60_000_000)


def test_a_run_within_its_plan(cli: Cli, package: Path, fresh: None) -> None:
    done = cli("run", package, "--prompt", "abc", "--max-new-tokens", "2", "--check-plan", "--json")
    assert done.code == 0
    found, planned = json.loads(done.out)["plan"], json.loads((package / "memory_plan.json").read_text())["plan"]
    assert found["planned_bytes"] == planned["total_bytes"] == sum(found["parts"].values())
    assert found["cache_bytes"] == found["planned_cache_bytes"] == planned["cache_bytes"]
    assert found["measured_share"] == found["measured_bytes"] / found["planned_bytes"] <= 1.05
    assert done.err.startswith("plan ")


def test_reality_beyond_the_plan(cli: Cli, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_check, "AT_START", status_bytes("VmHWM") - 200_000_000)
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
