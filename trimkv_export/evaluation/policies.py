"""The policies that `eval` compares, and the log-retentions of those that do not look at what a token is.

A policy that goes by a token's position alone is a table of log-retentions by position, in place of the gates': the
operators then evict as for any package, each head for itself, by log_beta * (n + 1 - p) (design.md, section 3).
"""

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["SINKS", "EvaluatedPolicy", "log_betas"]

# Of StreamingLLM (arXiv 2309.17453).
SINKS = 4
# Magnitudes of the random policy's log-retentions, as powers of ten: all that float32 has, less what a product with an
# age needs.
LOWEST, HIGHEST = -37.0, 38.0


class EvaluatedPolicy(StrEnum):
    """What decides which entries stay.

    GLOBAL, PER_HEAD: the gates, over all heads or in each one. RECENT: each head keeps the newest tokens.
    SINKS_RECENT: the first four and the newest. RANDOM: a random choice, each head its own. FULL: nothing is evicted.
    """

    GLOBAL = "global"
    PER_HEAD = "per_head"
    RECENT = "recent"
    SINKS_RECENT = "sinks+recent"
    RANDOM = "random"
    FULL = "full"


def log_betas(policy: EvaluatedPolicy, streams: int, positions: int, seed: int) -> NDArray[np.float32] | None:
    """Log-retention of a token by stream and position, [streams, positions]; None where the gates decide.

    RECENT: -1, so that the score is minus the age. SINKS_RECENT: 0 for the sinks, whose score stays the highest.
    RANDOM: -10^u, u uniform over some 70 powers of ten: what an entry draws decides, since ages differ by far less. A
    token of age a is kept as if u were larger by log10(a): among 2,048 tokens the oldest are kept at random up to a
    fifth more seldom than tokens of age 100.
    """
    match policy:
        case EvaluatedPolicy.RECENT:
            return np.full((streams, positions), -1, np.float32)
        case EvaluatedPolicy.SINKS_RECENT:
            row = np.where(np.arange(positions) < SINKS, 0, -1).astype(np.float32)
            return np.tile(row, (streams, 1))
        case EvaluatedPolicy.RANDOM:
            highest = HIGHEST - np.log10(positions + 1)
            power = np.random.default_rng(seed).uniform(LOWEST, highest, (streams, positions))
            return (-(10**power)).astype(np.float32)
    return None
