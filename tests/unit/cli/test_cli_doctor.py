"""What `doctor` tells of this machine and this installation."""

import importlib.metadata
import json

import pytest
from support import Cli

from trimkv_export import __version__
from trimkv_export.backends.threads import thread_limits


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["trimkv-export"] == __version__
    assert report["can_build"] is report["can_run"] is True
    assert report["memory_bytes"] > report["memory_available_bytes"] > 0
    assert "CPUExecutionProvider" in report["onnxruntime_providers"]
    text = cli("doctor")
    assert (text.code, text.err) == (0, "")
    assert "can run" in text.out
    assert report["threads"] == thread_limits().default
    assert f"{report['threads']} by default: {report['processors']} processors may be used, " in text.out
    declared = importlib.metadata.metadata("trimkv-export").get_all("Provides-Extra")
    assert declared
    assert sorted(report["extras"]) == sorted(declared)
    assert all(f"[{extra}]" in text.out for extra in declared)


def test_doctor_reads_extras_from_the_metadata(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "click>=8.1",
        "no-such-distribution[fast]>=1; extra == 'runtime'",
        'trimkv-export[runtime]; extra == "vision"',
        "pytest<10,>=8; (sys_platform == 'linux') and extra == 'vision'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
    report = json.loads(cli("doctor", "--json").out)
    assert report["extras"] == {
        "runtime": {"no-such-distribution": None},
        "vision": {"no-such-distribution": None, "pytest": pytest.__version__},
    }
    assert report["can_build"] is report["can_run"] is False
    missing = cli("doctor")
    assert missing.code == 0
    assert "no-such-distribution not installed" in missing.out
    assert "pip install 'trimkv-export[runtime]'" in missing.out


def test_doctor_without_an_installation(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert json.loads(cli("doctor", "--json").out)["extras"] == {}
