"""The invariants of a cache state: they hold of every state that steps make, and damage is told."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.policy import CacheSpec, ReferenceCache
from trimkv_export.policy.invariants import state_fault

SPEC = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=4, budget=5, evict_every=3)
State = dict[str, NDArray[Any]]


def cache_after(tokens: int, seed: int = 0, policy: Policy = Policy.GLOBAL, step: int = 1) -> ReferenceCache:
    """A cache that has taken random tokens in steps of `step`."""
    random = np.random.default_rng(seed)
    cache = ReferenceCache(SPEC, EvictionConfig(policy, SPEC.budget, SPEC.evict_every))
    while cache.tokens_seen < tokens:
        size = min(step, tokens - cache.tokens_seen)
        key, value = random.normal(size=(2, 2, size, 2, 4)).astype(np.float32)
        cache.update(key, value, -random.exponential(size=(2, size, 2)).astype(np.float32))
    return cache


@settings(max_examples=200)
@given(st.integers(0, 40), st.integers(0, 1000), st.sampled_from(Policy), st.integers(1, 12))
def test_steps_keep_the_invariants(tokens: int, seed: int, policy: Policy, step: int) -> None:
    assert state_fault(cache_after(tokens, seed, policy, step).state, SPEC) is None


def set_to(name: str, index: Any, value: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name][index] = value

    return change


# After 7 tokens: 5 in the pool (all 20 slots), 2 recent.
DAMAGE = {
    "counters seen": (set_to("counters", 0, -1), "counters"),
    "counters recent above b": (set_to("counters", 2, 4), "counters"),
    "counters recent below 0": (set_to("counters", 2, -1), "counters"),
    "counters evictions": (set_to("counters", 3, -1), "counters"),
    "a neighbour's keys": (set_to("counters", slice(None), [40, 0, 40, 0]), "counters"),
    "pool entries": (set_to("counters", 1, 19), "stream_start"),
    "stream_start begins late": (set_to("stream_start", 0, 1), "stream_start"),
    "stream_start falls": (set_to("stream_start", 2, 1), "stream_start"),
    "stream_start far away": (set_to("stream_start", 4, 1 << 30), "stream_start"),
    "too few tokens": (set_to("counters", 0, 5), "more than"),
    "slot below 0": (set_to("slot_index", 0, -1), "slot_index"),
    "slot above N": (set_to("slot_index", 3, 20), "slot_index"),
    "slot twice": (lambda state: state["slot_index"].__setitem__(0, state["slot_index"][1]), "slot_index"),
    "position of the future": (set_to("pool_position", 0, 5), "position"),
    "position below 0": (set_to("pool_position", 0, -1), "position"),
    "log-retention above 0": (set_to("pool_log_beta", 3, 0.5), "log-retention"),
    "log-retention NaN": (set_to("recent_log_beta", (1, 1, 1), np.nan), "log-retention"),
    "key": (set_to("pool_key", (2, 3), np.inf), "key"),
    "recent value": (set_to("recent_value", (0, 1, 0, 2), np.nan), "value"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told(name: str) -> None:
    change, said = DAMAGE[name]
    state: State = {key: value.copy() for key, value in cache_after(7).state.items()}
    assert state_fault(state, SPEC) is None
    change(state)
    fault = state_fault(state, SPEC)
    assert fault is not None
    assert said in fault


def test_what_is_not_live_may_be_anything() -> None:
    state: State = {key: value.copy() for key, value in cache_after(3).state.items()}
    free = state["slot_index"][12:]
    state["pool_key"][free] = np.nan
    state["recent_value"][:] = np.inf
    state["pool_position"][free] = -5
    assert state_fault(state, SPEC) is None


def test_waiting_beside_room() -> None:
    state: State = {key: value.copy() for key, value in cache_after(3).state.items()}
    state["counters"][:] = [5, 12, 2, 0]
    assert "room" in (state_fault(state, SPEC) or "")


def test_a_position_twice() -> None:
    state: State = {key: value.copy() for key, value in cache_after(4).state.items()}
    first, second = state["slot_index"][:2]
    state["pool_position"][second] = state["pool_position"][first]
    assert "twice" in (state_fault(state, SPEC) or "")


def test_bfloat16() -> None:
    spec = CacheSpec(2, 2, 4, 5, 3, kv_dtype="bfloat16")
    state: State = dict(cache_after(7).state)
    for name in ("pool_key", "pool_value", "recent_key", "recent_value"):
        state[name] = (state[name].view(np.uint32) >> 16).astype(np.uint16)
    assert state_fault(state, spec) is None
    state["pool_value"][4, 1] = 0xFF80
    assert state_fault(state, spec) == "a value is not finite"
