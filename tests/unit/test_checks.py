"""Checks of values that people give."""

from typing import Any

import numpy as np
import pytest

from trimkv_export.checks import require_whole
from trimkv_export.errors import CheckpointError, OptionError


@pytest.mark.parametrize("value", [1, np.int64(1), np.uint8(1)])
def test_whole_numbers_become_ints(value: Any) -> None:
    found = require_whole("n", value, 1, 1)
    assert (found, type(found)) == (1, int)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 4, np.float32(2), "x" * 99])
def test_others_are_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^n must be a whole number from 1 to 3, got .{1,61}$"):
        require_whole("n", value, 1, 3)


def test_the_room_names_the_error() -> None:
    with pytest.raises(CheckpointError, match=r"^a\.json: n must be a whole number of at least 1, always, got 0$"):
        require_whole("a.json: n", 0, 1, why=", always", error=CheckpointError)
