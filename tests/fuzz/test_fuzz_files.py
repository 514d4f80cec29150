"""2,000 changed tokenizers, templates and configurations."""

import fuzz_files


def test_changed_files() -> None:
    ends = fuzz_files.main(2000, seed=20)
    assert sum(ends.values()) == 2000
    assert ends["runs"] > 300
    assert ends["PackageError"] > 300
    assert ends["OptionError"] > 100
