"""`select` against a sort in plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.policy import must_evict, select

STREAMS = 3
Entry = tuple[float, int, int]  # score, position, stream


def brute_force(entries: list[Entry], config: EvictionConfig, budget: int) -> set[tuple[int, int]]:
    """(position, stream) of what stays, from the wording of docs/design.md section 3."""
    best_first = sorted(entries, key=lambda e: (-e[0], -e[1], e[2]))
    minimum = config.min_tokens_per_head
    if config.policy is Policy.PER_HEAD:
        quota = [budget] * STREAMS
    else:
        won = [stream for _, _, stream in best_first[: STREAMS * (budget - minimum)]]
        if not minimum:
            return {(p, s) for _, p, s in best_first[: STREAMS * budget]}
        quota = [won.count(stream) + minimum for stream in range(STREAMS)]
    own = [[(p, s) for _, p, s in best_first if s == stream] for stream in range(STREAMS)]
    return {entry for stream in range(STREAMS) for entry in own[stream][: quota[stream]]}


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Entry], EvictionConfig, int]:
    where = draw(st.sets(st.tuples(st.integers(0, 15), st.integers(0, STREAMS - 1)), max_size=40))
    scores = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0])  # few, so that most tie
    entries = [(draw(scores), position, stream) for position, stream in sorted(where)]
    policy = draw(st.sampled_from(Policy))
    budget = draw(st.integers(1, 6))
    minimum = draw(st.integers(0, budget)) if policy is Policy.GLOBAL else 0
    built = EvictionConfig(policy, budget + draw(st.integers(0, 3)), 4, minimum)
    return draw(st.permutations(entries)), built, budget


@given(cases())
def test_keeps_what_a_plain_sort_keeps(case: tuple[list[Entry], EvictionConfig, int]) -> None:
    entries, config, budget = case
    score, position, stream = np.array(entries, np.float32).reshape(-1, 3).T
    keep = select(score, position.astype(np.int32), stream.astype(np.int32), STREAMS, config, budget)
    kept = {(p, s) for (_, p, s), stays in zip(entries, keep, strict=True) if stays}
    assert kept == brute_force(entries, config, budget)


@pytest.mark.parametrize(
    ("entries", "loser"),
    [
        ([(-1.0, 4, 0), (-1.0, 5, 1), (-1.0, 5, 0), (-1.0, 3, 2)], 3),  # the oldest
        ([(-1.0, 5, 0), (-1.0, 5, 1), (-1.0, 5, 2), (-1.0, 6, 1)], 2),  # the highest stream
        ([(0.0, 1, 0), (-0.0, 2, 0), (0.0, 0, 2), (-0.0, 0, 1)], 2),  # zeros are equal
    ],
)
def test_ties_go_to_the_newer_then_to_the_lower_stream(entries: list[Entry], loser: int) -> None:
    score, position, stream = np.array(entries, np.float32).T
    config = EvictionConfig(Policy.GLOBAL, 1)  # one entry for each of three streams
    keep = select(score, position.astype(np.int32), stream.astype(np.int32), STREAMS, config)
    assert keep.tolist() == [index != loser for index in range(4)]


def test_a_stream_may_lose_everything_and_the_minimum_prevents_it() -> None:
    score = np.array([0] * 4 + [-9] * 4, np.float32)
    position, stream = np.array([0, 1, 2, 3] * 2, np.int32), np.array([0] * 4 + [1] * 4, np.int32)
    free = select(score, position, stream, 2, EvictionConfig(Policy.GLOBAL, 2))
    assert free.tolist() == [True] * 4 + [False] * 4
    kept = select(score, position, stream, 2, EvictionConfig(Policy.GLOBAL, 2, min_tokens_per_head=1))
    assert kept.tolist() == [False, True, True, True, False, False, False, True]


@pytest.mark.parametrize(("budget", "limit"), [(None, 3 * (8 + 4)), (5, 3 * (5 + 4))])
def test_eviction_is_due_at_the_budget_and_the_interval(budget: int | None, limit: int) -> None:
    config = EvictionConfig(Policy.GLOBAL, 8, 4)
    assert must_evict(limit, 3, config, budget)
    assert not must_evict(limit - 1, 3, config, budget)
