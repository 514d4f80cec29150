"""2,000 random requests to a model of text, and as many to one that sees."""

from pathlib import Path

import fuzz_requests
import pytest


@pytest.mark.parametrize("model", ["package", "visual_package"])
def test_random_requests(model: str, request: pytest.FixtureRequest) -> None:
    package: Path = request.getfixturevalue(model)
    outcomes = fuzz_requests.main(2000, 0, package)
    answered = sum(number for outcome, number in outcomes.items() if outcome.startswith("answered"))
    assert outcomes.total() == 2000
    assert answered > 300
    assert outcomes["refused: invalid"] > 300
