import math
from typing import Any

import pytest

from trimkv_export.errors import OptionError
from trimkv_export.training.options import TrainingOptions

GOOD: dict[str, Any] = {"kind": "rg10", "budget": 16, "steps": 10, "context": 64}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("kind", "rg4", "kind must be one of rg10, rg, got 'rg4'"),
        ("precision", "fp16", "got 'fp16'"),
        ("budget", 0, "budget must be a whole number from 1"),
        ("budget", 64, "budget must be below the context (64), got 64"),
        ("budget", 1.5, "got 1.5"),
        ("steps", 0, "steps"),
        ("context", 1, "context"),
        ("width", 0, "width"),
        ("rows", 0, "rows"),
        ("positions", -1, "positions"),
        ("seed", -1, "seed"),
        ("seed", True, "got True"),
        ("learning_rate", 0.0, "learning-rate must be above 0"),
        ("learning_rate", math.nan, "learning-rate must be a number, got nan"),
        ("learning_rate", "1e-3", "got '1e-3'"),
        ("bias", 31.0, "bias must be from -30 to 30, got 31.0"),
        ("capacity_weight", -1.0, "capacity-weight"),
        ("capacity_weight", math.inf, "got inf"),
        ("chat_share", 1.1, "chat-share must be from 0 to 1, got 1.1"),
    ],
)
def test_bad_values_are_refused(name: str, value: object, said: str) -> None:
    with pytest.raises(OptionError) as raised:
        TrainingOptions(**GOOD | {name: value})
    assert said in str(raised.value)


@pytest.mark.parametrize("steps", [1, 2, 19, 400, 5000])
def test_the_rate_rises_and_falls_to_nothing(steps: int) -> None:
    options = TrainingOptions(**GOOD | {"steps": steps})
    rates = [options.rate(step) for step in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) <= options.learning_rate
    assert min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] <= options.learning_rate * max(1.5 / steps, 0)
