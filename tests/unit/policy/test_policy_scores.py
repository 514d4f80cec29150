import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_export.policy import retention_scores

SEEN = 40
POSITIONS = np.array([0, 7, 38, 39], np.int32)


def expected_use(log_beta: float, age: int, steps: int) -> float:
    """log of the sum of beta^(age + j) for 0 <= j < steps, added up in float64."""
    return log_beta * age + float(np.log(np.exp(log_beta * np.arange(steps)).sum()))


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 4096])
@pytest.mark.parametrize("log_beta", [0.0, -0.0, -1e-12, -0.9e-9, -1.1e-9, -1e-6, -0.01, -0.7, -3.0, -50.0])
def test_equals_the_direct_sum(log_beta: float, steps: int) -> None:
    beta = np.full(4, log_beta, np.float32)
    scores = retention_scores(beta, POSITIONS, SEEN, steps)
    oldest = SEEN + 1 if steps == 1 else SEEN + 2
    expected = [expected_use(float(beta[0]), oldest - int(p), steps) for p in POSITIONS]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=3e-7, atol=1e-12)


@given(st.floats(-20, 0, width=32), st.integers(0, 1 << 24), st.integers(0, 1 << 24))
def test_one_step_is_one_float32_product(log_beta: float, position: int, age: int) -> None:
    score = retention_scores(np.array([log_beta], np.float32), np.array([position], np.int32), position + age)
    assert score[0] == np.float32(log_beta) * np.float32(age + 1)


def test_positions_near_the_int32_limit() -> None:
    last = np.iinfo(np.int32).max
    for steps, ahead in ((1, 1), (8, 2)):
        score = retention_scores(np.array([-1], np.float32), np.zeros(1, np.int32), last, steps)
        np.testing.assert_allclose(score, -(last + ahead), rtol=1e-6)


@given(st.integers(1, 200), st.floats(-20, -0.125, width=32))
def test_older_entries_score_lower(steps: int, log_beta: float) -> None:
    assert (np.diff(retention_scores(np.full(4, log_beta, np.float32), POSITIONS, SEEN, steps)) > 0).all()
