"""Check a package without the official code: engine against NumPy model and policy, on random tokens and pictures."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.config import Precision
from trimkv_export.policy import Eviction
from trimkv_export.runtime import Engine
from trimkv_export.runtime.vision_tower import VisionTower
from trimkv_export.verify.conversation import Conversation, Picture, Turn
from trimkv_export.verify.reference import ReferenceDecoder, VisualTokens
from trimkv_export.verify.reference_vision import ReferenceTower
from trimkv_export.verify.rounding import rounds_inputs
from trimkv_export.verify.stored_weights import Array

__all__ = ["SelfCheckReport", "check_engine"]

# Largest difference of logits and of the vision tower's outputs, as a share of the largest value, and of scores that
# count as tied.
TOLERANCE = {Precision.FP32: 2e-4, Precision.FP16: 3e-2, Precision.BF16: 1e-1}
# Kernels for quantised weights round their inputs to int8 (graph/functions/quantized.py). This holds for small random
# models; of a trained one, `check_package` judges the two apart.
QUANTIZED_TOLERANCE = 1e-1
# A smaller budget than the package's makes evictions happen within few tokens.
CHECK_BUDGET = 16
MIN_EVICTIONS = 3
# Pictures by the step in which they join the conversation: temporal patches, rows and columns in tokens, where the
# package takes them that large. The borders of the first steps cut the first one, whatever the prefill chunk. In steps
# of 16 tokens or more two begin together, and text is decoded between pictures.
PICTURES = {0: ((1, 2, 5),), 2: ((1, 4, 2),), 5: ((1, 1, 1), (2, 3, 2))}


@dataclass(frozen=True)
class SelfCheckReport:
    """Result of a self-check.

    Attributes:
        steps: steps that were compared.
        tokens: tokens that were fed in them.
        budget: of the session; smaller than the package's, so that evictions happen soon.
        evictions: how many there were.
        kept_mismatches: steps after which other entries are kept, beyond rounding.
        near_ties: steps whose kept sets differ, but only in entries whose scores are equal to rounding.
        max_logit_difference: the largest, as a share of the largest logit (of 1 if that is smaller).
        pictures: images and videos among the tokens.
        max_visual_difference: the same of what the vision tower computes for them.
        tolerance: the largest of these differences that passes.
        rounding_difference: of quantised packages, how far logits on a text are from those with exact inputs
            (`verify.rounding`); None where no inputs are rounded.
        rounding_tolerance: the largest such difference that passes.
    """

    steps: int
    tokens: int
    budget: int
    evictions: int
    kept_mismatches: int
    near_ties: int
    max_logit_difference: float
    pictures: int
    max_visual_difference: float
    tolerance: float
    rounding_difference: float | None = None
    rounding_tolerance: float | None = None

    @property
    def passed(self) -> bool:
        """Whether no kept set differs beyond rounding, and all differences are within the tolerance."""
        return (
            self.kept_mismatches == 0
            and self.max_logit_difference <= self.tolerance
            and self.max_visual_difference <= self.tolerance
            and (self.rounding_difference is None or self.rounding_difference <= (self.rounding_tolerance or 0))
        )

    def as_dict(self) -> dict[str, Any]:
        """For `verify --json`; what is about pictures and rounding is left out where there are none."""
        left_out = () if self.pictures else ("pictures", "max_visual_difference")
        if self.rounding_difference is None:
            left_out = (*left_out, "rounding_difference", "rounding_tolerance")
        return {name: value for name, value in vars(self).items() if name not in left_out} | {"passed": self.passed}


def check_engine(engine: Engine, seed: int = 0, *, exact: bool = False) -> SelfCheckReport:
    """Feed random tokens in chunks and single steps, and compare logits and kept entries after each step.

    Before each step the reference takes over the engine's cache, so that rounding does not add up over the steps. An
    engine that was opened with its vision tower is fed pictures too, and the tower's outputs are compared on their own.

    Args:
        engine: the engine; it needs one free session.
        seed: of the random tokens.
        exact: it is one of `rounding.exact_package`, which is held to the tolerance of its floats.
    """
    config = engine.config
    conversation = Conversation(config, np.random.default_rng(seed))
    sight = None if engine.vision is None else _Sight(engine, engine.vision)
    reference = ReferenceDecoder(engine.package)
    rounded = rounds_inputs(config.quantization) and not exact
    tolerance = QUANTIZED_TOLERANCE if rounded else TOLERANCE[config.precision]
    budget = max(1, config.eviction.min_tokens_per_head, min(config.eviction.budget, CHECK_BUDGET))
    chunk = min(config.prefill_chunk, max(32, config.eviction.evict_every))
    # None: to the token before an eviction is due, so that the next one must bring it.
    lengths = [min(5, chunk), 1, chunk, None, 1, chunk, 1, min(3, chunk), chunk]
    streams, limit = config.cache.num_streams, budget + config.eviction.evict_every
    steps = mismatches = near_ties = 0
    worst = 0.0
    with engine.session(budget) as session:
        while steps < len(lengths) or session.evictions < MIN_EVICTIONS or conversation.pending:
            due = limit - len(session.kept()) // streams
            length = lengths[steps % len(lengths)] or max(1, min(chunk, due - 1))
            if sight is not None:
                for sizes in PICTURES.get(steps, ()):
                    sight.see(conversation.add_picture(sight.info, *sizes))
            turn = conversation.take(length)
            for name, array in session.state.items():
                reference.cache.state[name][...] = array
            visual = None if sight is None else sight.tokens(turn)
            expected, eviction = reference.step(turn.tokens, budget, turn.positions, visual)
            logits = session.step(turn.tokens, turn.pixel_values, turn.image_grid_thw)
            steps += 1
            worst = float(np.maximum(worst, _difference(logits, expected)))  # NaN stays NaN, and fails
            if not np.array_equal(session.kept(), reference.cache.kept()):
                if eviction is not None and _tied(engine, session.kept(), eviction, tolerance):
                    near_ties += 1
                else:
                    mismatches += 1
        return SelfCheckReport(
            steps=steps,
            tokens=session.tokens_seen,
            budget=budget,
            evictions=session.evictions,
            kept_mismatches=mismatches,
            near_ties=near_ties,
            max_logit_difference=worst,
            pictures=len(conversation.pictures),
            max_visual_difference=0.0 if sight is None else sight.worst,
            tolerance=tolerance,
        )


class _Sight:
    """The vision tower of the engine, and the reference's, whose outputs go into the reference decoder.

    Attributes:
        info: of the tower.
        worst: the largest difference so far.
    """

    def __init__(self, engine: Engine, tower: VisionTower) -> None:
        self.info, self.worst = tower.info, 0.0
        self._tower, self._reference = tower, ReferenceTower(engine.package, tower.info)
        width, layers = engine.config.model.hidden_size, engine.config.model.deepstack_layers
        self._embeds = np.empty((0, width), np.float32)
        self._deepstack = np.empty((layers, 0, width), np.float32)

    def see(self, picture: Picture) -> None:
        """Encode the next picture with both."""
        embeds, deepstack = self._reference.encode(picture.patches, picture.grid)
        found = self._tower.encode(picture.patches, picture.grid)
        pairs = [(found.embeds, embeds), *zip(found.deepstack, deepstack, strict=True)]
        self.worst = float(np.maximum(self.worst, np.max([_difference(ours, wanted) for ours, wanted in pairs])))
        self._embeds = np.concatenate([self._embeds, embeds])
        self._deepstack = np.concatenate([self._deepstack, deepstack], axis=1)

    def tokens(self, turn: Turn) -> VisualTokens | None:
        """What a step has of the pictures; None if it has nothing."""
        if not turn.place.size:
            return None
        return VisualTokens(turn.place, self._embeds[turn.number], self._deepstack[:, turn.number])


def _difference(found: NDArray[Any], expected: Array) -> float:
    """The largest difference, as a share of the largest value expected (of 1 if that is smaller)."""
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))


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
