import numpy as np
import pytest

from trimkv_export.evaluation.policies import RANDOM_LOOKAHEAD, EvaluatedPolicy, log_betas
from trimkv_export.policy import retention_scores

STREAMS, POSITIONS = 400, 512


@pytest.mark.parametrize("policy", [EvaluatedPolicy.GLOBAL, EvaluatedPolicy.PER_HEAD, EvaluatedPolicy.FULL])
def test_the_gates_decide(policy: EvaluatedPolicy) -> None:
    assert log_betas(policy, 2, 8, 0) is None


def test_recent_and_sinks() -> None:
    recent = log_betas(EvaluatedPolicy.RECENT, 2, 6, 0)
    sinks = log_betas(EvaluatedPolicy.SINKS_RECENT, 2, 6, 0)
    np.testing.assert_array_equal(recent, np.full((2, 6), -1))
    np.testing.assert_array_equal(sinks, [[0, 0, 0, 0, -1, -1]] * 2)


def test_random_depends_on_the_seed_alone() -> None:
    first, same, other = (log_betas(EvaluatedPolicy.RANDOM, 3, 5, seed) for seed in (1, 1, 2))
    assert first is not None
    assert other is not None
    np.testing.assert_array_equal(first, same)
    assert first.dtype == np.float32
    assert np.all(first <= 0)
    assert len({*first.ravel(), *other.ravel()}) == 30


@pytest.mark.parametrize("budget", [4, 64])
def test_random_keeps_an_even_sample(budget: int) -> None:
    """After evictions all along the way, tokens of every age are there equally often."""
    table = log_betas(EvaluatedPolicy.RANDOM, STREAMS, POSITIONS, 0)
    assert table is not None
    position = np.broadcast_to(np.arange(POSITIONS, dtype=np.int32), table.shape)
    kept = np.zeros(table.shape, bool)
    for seen in range(64, POSITIONS + 1, 64):
        kept[:, seen - 64 : seen] = True
        score = np.where(kept, retention_scores(table, position, seen, RANDOM_LOOKAHEAD), -np.inf)
        kept = np.zeros(table.shape, bool)
        np.put_along_axis(kept, np.argsort(-score, axis=1)[:, :budget], True, axis=1)
    share = kept.reshape(STREAMS, 8, -1).sum(axis=(0, 2)) / (STREAMS * budget / 8)
    assert np.all(abs(share - 1) < 4 * (STREAMS * budget / 8) ** -0.5)
    assert np.all(kept.sum(axis=0) < 2 * STREAMS * budget / POSITIONS + 20)
