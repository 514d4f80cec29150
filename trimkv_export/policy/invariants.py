"""What holds of every cache state that steps have made (docs/design.md, section 4).

A state from elsewhere, such as a session file, is looked at here before a kernel reads it: kernels take slots and
counts as they find them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.policy.state import CacheSpec

__all__ = ["state_fault"]

State = Mapping[str, NDArray[Any]]


def state_fault(state: State, spec: CacheSpec) -> str | None:
    """Say what is wrong with the cache state of one sequence. Costs O(N·D).

    Args:
        state: the ten tensors without the batch dimension; bfloat16 as uint16. Their shapes are taken as right.
        spec: sizes of the cache.

    Returns:
        The first fault found, None for a sound state.
    """
    seen, entries, recent, evictions = (int(count) for count in state["counters"])
    start, streams, slots = state["stream_start"].astype(np.int64), spec.num_streams, spec.num_slots
    if not (0 <= recent <= min(spec.evict_every, seen) and 0 <= evictions <= seen):
        return f"counters {[seen, entries, recent, evictions]} cannot be"
    if start[0] != 0 or (np.diff(start) < 0).any() or start[-1] != entries or entries > slots:
        return f"stream_start does not lead from 0 to the pool's {entries} entries"
    if entries > streams * (seen - recent):
        return f"{entries} pool entries are more than {seen - recent} tokens have"
    if recent and slots - entries >= streams:
        return f"{recent} tokens wait outside a pool that has room for them"
    if entries == 0:  # a row that was reset; slot_index is that of an earlier conversation
        return "tokens were seen and none is live" if seen else None
    index = state["slot_index"]
    if index.min() < 0 or index.max() >= slots or (np.bincount(index, minlength=slots) != 1).any():
        return "slot_index does not name every slot once"
    live = index[:entries]
    position = state["pool_position"][live].astype(np.int64)
    if position.min() < 0 or position.max() >= seen - recent:
        return f"an entry has a position outside 0 to {seen - recent - 1}"
    stream = np.repeat(np.arange(streams), np.diff(start))
    if len(np.unique(stream * seen + position)) != entries:
        return "a stream has a position twice"
    log_betas = (state["pool_log_beta"][live], state["recent_log_beta"][..., :recent])
    if not all(np.isfinite(values).all() and (values <= 0).all() for values in log_betas):
        return "a log-retention is above 0 or not finite"
    for kind in ("key", "value"):
        near = state[f"recent_{kind}"][..., :recent, :]
        if not (_finite(state[f"pool_{kind}"][live], spec) and _finite(near, spec)):
            return f"a {kind} is not finite"
    return None


def _finite(values: NDArray[Any], spec: CacheSpec) -> bool:
    if spec.kv_dtype == "bfloat16":  # its exponent is all ones
        return bool(((values.view(np.uint16) & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all())
