"""2,000 forged session files."""

import fuzz_session


def test_forged_session_files() -> None:
    ends = fuzz_session.main(2000, 0)
    assert sum(ends.values()) == 2000
    assert ends["PackageError"] > 500
    assert ends["runs"] > 100
