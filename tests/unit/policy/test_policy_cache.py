"""The reference cache: recorded runs of the official code, invariants, and attention against a dense softmax."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import GOLDEN, GOLDEN_VISUAL

from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.policy import CacheSpec, ReferenceCache


@pytest.mark.parametrize("case", GOLDEN + GOLDEN_VISUAL, ids=lambda path: path.name)
def test_keeps_what_the_official_code_kept(case: Path) -> None:
    arguments = json.loads((case / "case.json").read_text())
    with np.load(case / "trace.npz") as trace:
        log_beta, chunks = trace["log_beta"], trace["chunks"].tolist()
        kept = [trace[f"step_{step}_kept"] for step in range(len(chunks))]
    config = EvictionConfig(
        Policy.GLOBAL if arguments["gate"] == "rg10" else Policy.PER_HEAD,
        arguments["budget"],
        max(1, arguments["buffer"]),
        arguments["min_per_head"],
        arguments["lookahead"],
    )
    layers, heads, _ = log_beta.shape
    cache = ReferenceCache(CacheSpec(layers, heads, 1, config.budget, config.evict_every), config)
    for length, expected in zip(chunks, kept, strict=True):
        start = cache.tokens_seen
        step = log_beta[:, :, start : start + length].transpose(0, 2, 1)
        nothing = np.zeros((*step.shape, 1), np.float32)
        cache.update(nothing, nothing, step)
        np.testing.assert_array_equal(cache.kept(), expected)
    assert cache.state["counters"][3] > 2


@st.composite
def runs(draw: st.DrawFn) -> tuple[CacheSpec, EvictionConfig, int, list[int], int]:
    layers, heads, budget, interval = (draw(st.integers(1, top)) for top in (3, 3, 9, 6))
    policy = draw(st.sampled_from(Policy))
    used = draw(st.integers(1, budget))
    minimum = draw(st.integers(0, used)) if policy is Policy.GLOBAL else 0
    config = EvictionConfig(policy, budget, interval, minimum, draw(st.sampled_from([1, 1, 5])))
    steps = draw(st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=15))
    return CacheSpec(layers, heads, 2, budget, interval), config, used, steps, draw(st.integers(0, 99))


@settings(max_examples=150)
@given(runs())
def test_invariants(run: tuple[CacheSpec, EvictionConfig, int, list[int], int]) -> None:
    spec, config, budget, steps, seed = run
    rng = np.random.default_rng(seed)
    cache = ReferenceCache(spec, config)
    for length in steps:
        shape = (spec.num_layers, length, spec.num_kv_heads)
        rows = np.zeros((*shape, spec.head_dim), np.float32)
        log_beta = -np.abs(rng.integers(0, 4, shape)).astype(np.float32)
        before = {tuple(row) for row in cache.kept().tolist()}
        eviction = cache.update(rows, rows, log_beta, budget)

        seen, pool, recent, _ = cache.state["counters"].tolist()
        start = cache.state["stream_start"]
        kept = cache.kept()
        live = pool + recent * spec.num_streams
        assert 0 <= pool <= spec.num_slots
        assert 0 <= recent <= spec.evict_every
        assert live < spec.num_streams * (budget + spec.evict_every)
        assert (np.diff(start) >= 0).all()
        assert (start[0], start[-1]) == (0, pool)
        assert np.array_equal(np.sort(cache.state["slot_index"]), np.arange(spec.num_slots))
        assert len(np.unique(kept, axis=0)) == len(kept) == live  # positions of a stream are unique
        assert {tuple(row) for row in kept[kept[:, 2] < seen - length].tolist()} <= before
        assert ((kept[:, 2] >= 0) & (kept[:, 2] < seen)).all()
        if eviction:
            assert (recent, live) == (0, eviction.keep.sum())
            assert live <= spec.num_streams * budget
            assert len(eviction.keep) >= spec.num_streams * (budget + spec.evict_every)
    assert seen == sum(steps)


def dense_softmax(
    query: NDArray[np.float32], keys: NDArray[np.float32], values: NDArray[np.float32]
) -> NDArray[np.float64]:
    logits = keys.astype(np.float64) @ query * 0.3
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum() @ values)


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("group", [1, 3])
def test_attention_is_a_softmax_over_what_is_live(policy: Policy, group: int) -> None:
    layers, heads, depth = 2, 2, 6
    cache = ReferenceCache(CacheSpec(layers, heads, depth, 4, 3), EvictionConfig(policy, 4, 3))
    rng = np.random.default_rng(1)
    steps = [3, 1, 1, 9, 1, 1, 1, 20, 2]
    history = rng.standard_normal((2, layers, sum(steps), heads, depth), np.float32)
    for length in steps:
        own = np.arange(cache.tokens_seen, cache.tokens_seen + length)
        key, value = history[:, :, own]
        query = rng.standard_normal((layers, length, heads * group, depth), np.float32)
        kept = cache.kept()
        for layer in range(layers):
            out = cache.attend(layer, query[layer], key[layer], value[layer], 0.3)
            for head in range(heads * group):
                old = kept[(kept[:, 0] == layer) & (kept[:, 1] == head // group), 2]
                for step in range(length):
                    keys, values = history[:, layer, np.concatenate([old, own[: step + 1]]), head // group]
                    expected = dense_softmax(query[layer, step, head], keys, values)
                    np.testing.assert_allclose(out[step, head], expected, atol=2e-6)
        cache.update(key, value, -rng.exponential(1, (layers, length, heads)).astype(np.float32))
    assert cache.state["counters"][3] > 2
