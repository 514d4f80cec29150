"""The choice of the next token: the logits processors of Hugging Face transformers, in their order, in NumPy.

    repetition penalty → temperature → top-k → top-p → min-p → draw

Temperature 0 is greedy: the highest logit after the repetition penalty, the lowest id on a tie.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt

from trimkv_export.checks import require_whole
from trimkv_export.errors import EngineError, OptionError
from trimkv_export.words import shorten

__all__ = ["Sampler", "SamplingOptions"]


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose the next token. Each default leaves its rule off; together they are greedy decoding.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keeps the most likely tokens that together have this probability; 0 leaves one token.
        top_k: keeps this many most likely tokens, and those that tie with the last; 0 is off.
        min_p: keeps tokens at least this fraction as likely as the most likely one.
        repetition_penalty: logits of tokens seen before are divided by it if positive, multiplied if negative.
        seed: of the draws; None takes one from the operating system.

    Raises:
        OptionError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        require_whole("top_k", self.top_k)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            require_whole("seed", self.seed)


class Sampler:
    """Chooses the tokens of one generation.

    A repetition penalty is for the prompt's tokens too: give them to `observe`. The tokens that the sampler chooses
    count without that. It remembers which tokens there were, not where: at most one number per vocabulary entry.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._seen: set[int] = set()

    def observe(self, tokens: Iterable[int]) -> None:
        """Count `tokens` as seen. Ids without a logit, such as placeholders of images, have no effect."""
        if self._options.repetition_penalty != 1.0:
            self._seen.update(map(int, tokens))

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, for logits [V]. They are left unchanged.

        Raises:
            EngineError: they contain NaN or infinity, other than -inf for a token that cannot be chosen.
        """
        if self._options.temperature == 0.0:
            token = int(np.argmax(self._penalized(logits)))
        else:
            cumulative = np.cumsum(self.probabilities(logits))
            # Below the total even after rounding, so that the first entry above it exists and has probability > 0.
            drawn = min(self._random.random() * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
            token = int(np.searchsorted(cumulative, drawn, side="right"))
        self.observe([token])
        return token

    def probabilities(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The distribution [V] from which a call draws; tokens that the options rule out have probability 0."""
        options = self._options
        scores = self._penalized(logits).astype(np.float64)
        scores -= scores.max()
        if options.temperature > 0.0:
            with np.errstate(over="ignore"):  # to -inf, for a temperature next to 0
                scores /= options.temperature
        else:
            scores[np.arange(len(scores)) != np.argmax(scores)] = -np.inf
        if 0 < options.top_k < len(scores):
            scores[scores < np.partition(scores, -options.top_k)[-options.top_k]] = -np.inf
        weights: npt.NDArray[np.float64] = np.exp(scores)  # the highest is 1, here and below
        if options.top_p < 1.0:
            weights[_beyond_top_p(weights, options.top_p)] = 0.0
        weights[weights < options.min_p] = 0.0
        weights /= weights.sum()
        return weights

    def _penalized(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.floating]:
        """The logits after the repetition penalty; the argument itself where nothing changes."""
        if logits.ndim != 1 or not len(logits):
            raise EngineError(f"the engine must give the logits of one token, shape [V], got {list(logits.shape)}")
        highest = logits[np.argmax(logits)]  # NaN if there is any
        if not np.isfinite(highest):
            raise EngineError(f"the engine gave logits that cannot be used: their maximum is {highest}")
        if not self._seen:
            return logits
        seen = np.fromiter(self._seen, np.int64, len(self._seen))
        seen = seen[(seen >= 0) & (seen < len(logits))]
        scores = logits.astype(np.float64)
        penalty = self._options.repetition_penalty
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        return scores


def _beyond_top_p(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Indices of the least likely tokens, as many as together have probability 1 - top_p or less; never all."""
    tail = (1.0 - top_p) * weights.sum()
    # Tokens that have no more than the mean share of the tail are surely in it: only the others need sorting.
    small = weights <= tail / len(weights)
    small[np.argmax(weights)] = False
    candidates = np.flatnonzero(~small)
    candidates = candidates[np.argsort(weights[candidates], kind="stable")]
    cumulative = weights[small].sum() + np.cumsum(weights[candidates])
    dropped = candidates[:-1][cumulative[:-1] <= tail]
    return np.concatenate([np.flatnonzero(small), dropped])


def _require_number(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, Real) or math.isnan(value) or not low <= value <= high:
        raise OptionError(f"{name} must be a number from {low:g} to {high:g}, got {shorten(value)}")
