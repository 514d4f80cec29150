"""Sessions that come and go, for a while: benchmarks/session_soak.py in short."""

import json
import subprocess
import sys
from pathlib import Path

from support import ROOT


def test_rows_stay_apart_and_memory_flat(package: Path) -> None:
    script = ROOT / "benchmarks" / "session_soak.py"
    done = subprocess.run(
        [sys.executable, script, package, "--steps", "6000"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["steps"] >= 6000
    actions = {"step", "batch", "generate", "create", "save", "restore", "copy", "close", "drop"}
    assert set(report["actions"]) == actions
