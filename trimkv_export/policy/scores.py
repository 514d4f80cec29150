"""Retention scores: how much an entry is expected to matter from now on (docs/design.md, section 3)."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["retention_scores"]

# Below this magnitude of log β, (1 − βᵏ) / (1 − β) is k to within float32, and 1 − β itself cancels.
LOOKAHEAD_LIMIT = 1e-9


def retention_scores(
    log_beta: NDArray[np.float32], position: NDArray[np.int32], tokens_seen: int, lookahead_steps: int = 1
) -> NDArray[np.float32]:
    """Score entries after n tokens; the highest scores stay.

    k = 1: (n + 1 − p)·log β.  k > 1: (n + 2 − p)·log β + log(1 − βᵏ) − log(1 − β), the sum of β^(age + j) for
    0 ≤ j < k as a logarithm. Products are float32 as in the official `compress`; the difference of logarithms is
    taken in float64, because 1 − β cancels for the β near 1 that trained gates give.

    Args:
        log_beta: log β of the entries, of any shape.
        position: their positions p, of the same shape.
        tokens_seen: n.
        lookahead_steps: k.
    """
    if lookahead_steps == 1:
        return log_beta * (np.int64(tokens_seen) + 1 - position).astype(np.float32)
    decay = log_beta * (np.int64(tokens_seen) + 2 - position).astype(np.float32)
    x = log_beta.astype(np.float64)
    near_one = x > -LOOKAHEAD_LIMIT
    x = np.where(near_one, -1.0, x)
    horizon = np.log(np.expm1(lookahead_steps * x) / np.expm1(x))
    return decay + np.where(near_one, np.log(lookahead_steps), horizon).astype(np.float32)
