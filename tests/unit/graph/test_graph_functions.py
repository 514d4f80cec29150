"""The portable bodies and the native kernels in ONNX Runtime equal the NumPy cache at every step."""

import numpy as np
import pytest
from function_harness import LEVELS, Harness, decay
from support import KERNELS

from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.policy import CacheSpec

# What a configuration can be made of; each comes in place and copied, and at every optimisation level.
CONFIGURATIONS = 36


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with both."""
    monkeypatch.setattr(Harness, "native", request.param == "native")


def random_configuration(rng: np.random.Generator) -> tuple[CacheSpec, EvictionConfig, int]:
    """L and H 1-4, G 1-4, D 2-16, M 1-12, b 1-8, both policies, minimum per head, lookahead."""
    layers, heads, group = (int(rng.integers(1, 5)) for _ in range(3))
    budget, interval = int(rng.integers(1, 13)), int(rng.integers(1, 9))
    policy = Policy.GLOBAL if rng.random() < 0.6 else Policy.PER_HEAD
    minimum = int(rng.integers(0, budget + 1)) if policy is Policy.GLOBAL and rng.random() < 0.5 else 0
    lookahead = 1 if rng.random() < 0.6 else int(rng.integers(2, 20))
    depth = 2 * int(rng.integers(1, 9))
    return (
        CacheSpec(layers, heads, depth, budget, interval),
        EvictionConfig(policy, budget, interval, minimum, lookahead),
        group,
    )


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_random_runs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec, config, group = random_configuration(rng)
    level = list(LEVELS)[seed % 3]
    harness = Harness(spec, config, group, in_place=seed % 4 != 3, level=level)
    lowest = max(1, config.min_tokens_per_head)
    budget = int(rng.integers(lowest, config.budget + 1)) if seed % 2 else None
    lengths = np.where(rng.random(24) < 0.6, 1, rng.integers(1, 25, 24)).tolist()
    for index, tokens in enumerate(lengths):
        padding = index % 3
        shape = spec.num_layers, tokens + padding, spec.num_kv_heads
        log_beta = decay(rng, *shape, ties=seed % 5 < 2)
        harness.step(rng, tokens, padding=padding, budget=budget, log_beta=log_beta)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("policy", "minimum", "lookahead"), [("global", 0, 1), ("global", 2, 5), ("per_head", 0, 1)])
def test_every_mode_at_every_level(policy: str, minimum: int, lookahead: int, in_place: bool, level: str) -> None:
    config = EvictionConfig(Policy(policy), 5, 3, minimum, lookahead)
    harness = Harness(CacheSpec(2, 2, 4, 5, 3), config, 2, in_place=in_place, level=level)
    rng = np.random.default_rng(0)
    for tokens in (1, 1, 4, 1, 1, 1, 1, 9, 1, 2, 1, 1, 1):
        harness.step(rng, tokens)
    assert harness.reference.state["counters"][3] >= 3


@pytest.mark.parametrize("in_place", [True, False])
def test_one_stream_holds_everything(in_place: bool) -> None:
    layers, heads, budget = 2, 3, 6
    harness = Harness(
        CacheSpec(layers, heads, 4, budget, 2), EvictionConfig(Policy.GLOBAL, budget, 2), 2, in_place=in_place
    )
    rng = np.random.default_rng(0)
    for tokens in (1, 7, 30, 1, 1, 1, 1, 40, 1, 1, 1):
        log_beta = np.full((layers, tokens, heads), -50)
        log_beta[1, :, 1] = 0
        harness.step(rng, tokens, log_beta=log_beta)
        held = np.diff(harness.state["stream_start"][0])
        if tokens >= 30:
            owner = min(harness.reference.tokens_seen, layers * heads * budget)
            assert held[4] == owner
            assert (np.delete(held, 4) == 0).sum() >= 5 - (owner < layers * heads * budget)


@pytest.mark.parametrize("policy", Policy)
def test_steps_much_longer_than_the_pool(policy: Policy) -> None:
    harness = Harness(CacheSpec(2, 2, 4, 1, 1), EvictionConfig(policy, 1, 1))
    rng = np.random.default_rng(0)
    for tokens in (200, 1, 150, 1, 1, 100):
        harness.step(rng, tokens, padding=tokens % 7)


def test_every_score_tied() -> None:
    harness = Harness(CacheSpec(2, 2, 4, 4, 3), EvictionConfig(Policy.GLOBAL, 4, 3))
    rng = np.random.default_rng(0)
    for step, tokens in enumerate((9, 1, 1, 1, 1, 1, 1, 20, 1, 1, 1)):
        harness.step(rng, tokens, log_beta=np.full((2, tokens, 2), -0.0 if step % 2 else 0.0))
    assert harness.reference.kept()[:, 2].min() == harness.reference.tokens_seen - 4


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("policy", Policy)
def test_what_an_earlier_conversation_left_is_never_read(policy: Policy, in_place: bool) -> None:
    harness = Harness(CacheSpec(2, 2, 4, 5, 4), EvictionConfig(policy, 5, 4), 2, in_place=in_place)
    rng = np.random.default_rng(0)
    for poison in (False, True, True):
        for tokens in (1, 3, 1, 1, 1, 12, 1, 1):  # recent tokens before the pool was ever full, and after
            harness.step(rng, tokens)
        harness.reset(poison=poison)
    harness.step(rng, 2, padding=3)


def test_a_pool_built_larger_than_the_budget_in_use() -> None:
    harness = Harness(CacheSpec(2, 2, 4, 12, 5), EvictionConfig(Policy.GLOBAL, 12, 5))
    rng = np.random.default_rng(0)
    for _ in range(30):
        harness.step(rng, 1, budget=3)
        assert harness.state["counters"][0, 2] == 0  # the pool has room for every token until the next eviction
        assert harness.state["counters"][0, 1] < 4 * (3 + 5)


def test_the_budget_may_change_between_steps() -> None:
    harness = Harness(CacheSpec(2, 2, 4, 9, 3), EvictionConfig(Policy.GLOBAL, 9, 3, 1))
    rng = np.random.default_rng(0)
    for budget in rng.integers(1, 10, 40).tolist():
        harness.step(rng, int(rng.integers(1, 6)), budget=budget)


@pytest.mark.parametrize("magnitude", [0.0, -0.0, -1e-12, -1e-9, -1e-6, -50.0])
def test_extreme_log_betas_with_lookahead(magnitude: float) -> None:
    config = EvictionConfig(Policy.GLOBAL, 4, 2, lookahead_steps=16)
    harness = Harness(CacheSpec(1, 3, 4, 4, 2), config)
    rng = np.random.default_rng(0)
    for tokens in (5, 1, 1, 1, 8, 1, 1):
        harness.step(rng, tokens, log_beta=magnitude * rng.integers(1, 3, (1, tokens, 3)))
