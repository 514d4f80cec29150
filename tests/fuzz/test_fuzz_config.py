"""2,000 changed config.json files; `make fuzz` tries more."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_config import main


def test_changed_configs() -> None:
    ends = main(2000, seed=20)
    assert sum(ends.values()) == 2000
    assert ends["runs"] > 20
    assert ends["PackageError"] > 1000
