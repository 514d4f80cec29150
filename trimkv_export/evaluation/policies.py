"""The policies that `eval` compares, and the log-retentions of those that do not look at what a token is.

A policy that goes by a token's position alone is a table of log-retentions by position, in place of the gates': the
operators then evict as for any package, each head for itself, by log_beta * (n + 1 - p) (docs/design.md, section 3).
"""

import numpy as np
from numpy.typing import NDArray

from trimkv_export.compat import StrEnum

__all__ = ["RANDOM_LOOKAHEAD", "SINKS", "EvaluatedPolicy", "log_betas"]

# Of StreamingLLM (arXiv 2309.17453).
SINKS = 4
# The most that EvictionConfig takes: see `log_betas`.
RANDOM_LOOKAHEAD = 1 << 16


class EvaluatedPolicy(StrEnum):
    """What decides which entries stay.

    Attributes:
        GLOBAL: the gates, over all heads together.
        PER_HEAD: the gates, in each head.
        RECENT: each head keeps the newest tokens.
        SINKS_RECENT: each head keeps the first four and the newest.
        RANDOM: each head keeps a random choice of its own.
        FULL: nothing is evicted.
    """

    GLOBAL = "global"
    PER_HEAD = "per_head"
    RECENT = "recent"
    SINKS_RECENT = "sinks+recent"
    RANDOM = "random"
    FULL = "full"


def log_betas(policy: EvaluatedPolicy, streams: int, positions: int, seed: int) -> NDArray[np.float32] | None:
    """Return the log-retention of a token by stream and position, [streams, positions]; None where the gates decide.

    RECENT: -1, so that the score is minus the age. SINKS_RECENT: 0 for the sinks, whose score stays the highest.
    RANDOM: -x, x drawn evenly from [0, 1/k), to be scored with a lookahead of k = RANDOM_LOOKAHEAD steps. The score is
    then log(k) - x·(k/2 + age), but for terms in (x·k)²: an order by x, whatever the age, as long as that is far below
    k/2. So each token draws once how long it stays, and what is kept is an even sample of what was seen; of tokens of
    age 2,048 there are 6% fewer than of new ones.
    """
    match policy:
        case EvaluatedPolicy.RECENT:
            return np.full((streams, positions), -1, np.float32)
        case EvaluatedPolicy.SINKS_RECENT:
            row = np.where(np.arange(positions) < SINKS, 0, -1).astype(np.float32)
            return np.tile(row, (streams, 1))
        case EvaluatedPolicy.RANDOM:
            drawn = np.random.default_rng(seed).random((streams, positions), np.float32)
            return -drawn / np.float32(RANDOM_LOOKAHEAD)
    return None
