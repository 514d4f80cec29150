"""Which entries an eviction keeps (docs/design.md, section 3)."""

import numpy as np
from numpy.typing import NDArray

from trimkv_export.config import EvictionConfig, Policy

__all__ = ["must_evict", "select"]


def must_evict(total: int, num_streams: int, config: EvictionConfig, budget: int | None = None) -> bool:
    """Whether `total` live entries call for an eviction: total >= L·H·(M + b)."""
    kept = config.budget if budget is None else budget
    return total >= num_streams * (kept + config.evict_every)


def select(
    score: NDArray[np.float32],
    position: NDArray[np.int32],
    stream: NDArray[np.int32],
    num_streams: int,
    config: EvictionConfig,
    budget: int | None = None,
) -> NDArray[np.bool_]:
    """Mark the entries to keep. The order is total: higher score, then newer position, then lower stream.

    Args:
        score: [entries].
        position: [entries].
        stream: [entries].
        num_streams: L·H.
        config: policy, and the budget that the package was built with.
        budget: a smaller one; None is the package's own.

    Returns:
        Whether each entry stays, [entries].
    """
    per_stream = config.budget if budget is None else budget
    best_first = np.lexsort((stream, -position.astype(np.int64), -score))
    keep = np.zeros(score.shape, bool)
    minimum = config.min_tokens_per_head
    if config.policy is Policy.GLOBAL and not minimum:
        keep[best_first[: num_streams * per_stream]] = True
        return keep

    if config.policy is Policy.PER_HEAD:
        quota = np.full(num_streams, per_stream)
    else:
        winners = best_first[: num_streams * (per_stream - minimum)]
        quota = np.bincount(stream[winners], minlength=num_streams) + minimum
    by_stream = best_first[np.argsort(stream[best_first], kind="stable")]
    first = np.searchsorted(stream[by_stream], np.arange(num_streams))
    rank = np.arange(len(by_stream)) - first[stream[by_stream]]
    keep[by_stream] = rank < quota[stream[by_stream]]
    return keep
