"""Check a package without the official code: engine against the NumPy decoder and policy, on random tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trimkv_export.config import Precision
from trimkv_export.policy import Eviction
from trimkv_export.runtime import Engine
from trimkv_export.verify.reference import ReferenceDecoder

__all__ = ["SelfCheckReport", "check_engine"]

# Largest difference of logits, as a share of the largest logit, and of scores that count as tied.
TOLERANCE = {Precision.FP32: 2e-4, Precision.FP16: 3e-2, Precision.BF16: 1e-1}
# A smaller budget than the package's makes evictions happen within few tokens.
CHECK_BUDGET = 16
MIN_EVICTIONS = 3


@dataclass(frozen=True)
class SelfCheckReport:
    """Result of a self-check.

    near_ties: steps whose kept sets differ, but only in entries whose scores are equal to rounding.
    """

    steps: int
    tokens: int
    budget: int
    evictions: int
    kept_mismatches: int
    near_ties: int
    max_logit_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """No kept set differs beyond rounding, logits within the tolerance."""
        return self.kept_mismatches == 0 and self.max_logit_difference <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """For `verify --json`."""
        return {**vars(self), "passed": self.passed}


def check_engine(engine: Engine, seed: int = 0) -> SelfCheckReport:
    """Feed random tokens in chunks and single steps, comparing logits and kept entries after each step.

    Before each step the reference takes over the engine's cache, so that rounding does not add up over the steps.
    """
    config = engine.config
    rng = np.random.default_rng(seed)
    reference = ReferenceDecoder(engine.package)
    tolerance = TOLERANCE[config.precision]
    budget = max(1, config.eviction.min_tokens_per_head, min(config.eviction.budget, CHECK_BUDGET))
    chunk = min(config.prefill_chunk, max(32, config.eviction.evict_every))
    # None: to the token before an eviction is due, so that the next one must bring it.
    lengths = [min(5, chunk), 1, chunk, None, 1, chunk, 1, min(3, chunk), chunk]
    streams, limit = config.cache.num_streams, budget + config.eviction.evict_every
    steps = mismatches = near_ties = 0
    worst = 0.0
    with engine.session(budget) as session:
        while steps < len(lengths) or session.evictions < MIN_EVICTIONS:
            due = limit - len(session.kept()) // streams
            length = lengths[steps % len(lengths)] or max(1, min(chunk, due - 1))
            tokens = [int(t) for t in rng.integers(0, config.model.vocab_size, length)]
            for name, array in session.state.items():
                reference.cache.state[name][...] = array
            expected, eviction = reference.step(tokens, budget)
            logits = session.step(tokens)
            steps += 1
            difference = np.abs(logits - expected).max() / max(1.0, float(np.abs(expected).max()))
            worst = float(np.maximum(worst, difference))  # NaN stays NaN, and fails
            if not np.array_equal(session.kept(), reference.cache.kept()):
                if eviction is not None and _tied(engine, session.kept(), eviction, tolerance):
                    near_ties += 1
                else:
                    mismatches += 1
        return SelfCheckReport(
            steps, session.tokens_seen, budget, session.evictions, mismatches, near_ties, worst, tolerance
        )


def _tied(engine: Engine, kept: np.ndarray, eviction: Eviction, tolerance: float) -> bool:
    """Whether every entry that only one side kept has a counterpart of the same score on the other."""
    heads = engine.config.model.num_kv_heads
    engine_kept = set(zip((kept[:, 0] * heads + kept[:, 1]).tolist(), kept[:, 2].tolist(), strict=True))
    only: dict[bool, list[float]] = {True: [], False: []}
    entries = zip(eviction.stream.tolist(), eviction.position.tolist(), eviction.score, eviction.keep, strict=True)
    for stream, position, score, keep in entries:
        if ((stream, position) in engine_kept) != keep:
            only[bool(keep)].append(float(score))
    ours, theirs = sorted(only[True]), sorted(only[False])
    return len(ours) == len(theirs) and bool(np.allclose(ours, theirs, rtol=tolerance, atol=1e-6))
