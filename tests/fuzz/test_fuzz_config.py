"""2,000 changed config.json files; `make fuzz` tries more."""

import fuzz_config


def test_changed_configs() -> None:
    ends = fuzz_config.main(2000, seed=20)
    assert sum(ends.values()) == 2000
    assert ends["runs"] > 20
    assert ends["PackageError"] > 1000
