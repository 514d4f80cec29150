"""The choice of the next token: the logits processors of Hugging Face transformers, in their order, in NumPy.

    logit bias → repetition penalty → presence and frequency penalty → temperature → top-k → top-p → min-p → draw

Presence and frequency penalty, which transformers lacks, are those of OpenAI's API and of vLLM. Temperature 0 is
greedy: the highest logit after bias and penalties, the lowest id on a tie.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
import numpy.typing as npt

from trimkv_export.checks import require_whole
from trimkv_export.errors import EngineError, OptionError
from trimkv_export.words import shorten

__all__ = ["Sampler", "SamplingOptions", "TokenHistory"]

MAX_PENALTY, MAX_BIAS = 2.0, 100.0
MAX_ID, MAX_DIGITS = 2**31 - 1, 20
# Scores whose maximum is taken first, in the search for the highest few.
GROUP = 64


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose the next token. Each default leaves its rule off; together they are greedy decoding.

    Attributes:
        temperature: divides the logits, 0 to 100; 0 takes the most likely token.
        top_p: the most likely tokens that together have this probability; 0 leaves one token.
        top_k: this many most likely tokens, and those that tie with the last; 0 and -1 are off.
        min_p: tokens at least this fraction as likely as the most likely one.
        repetition_penalty: logits of tokens that the conversation has are divided by it if positive, multiplied if
            negative; 0.01 to 100.
        seed: of the draws; None takes one from the operating system.
        presence_penalty: subtracted from the logit of each token that the model has chosen before, -2 to 2.
        frequency_penalty: subtracted from it for each time that it was chosen, -2 to 2.
        logit_bias: token id: what is added to its logit, -100 to 100. Ids may be texts of digits, as JSON has them.

    Raises:
        OptionError: a value is out of range; it is quoted.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        require_whole("top_k", self.top_k, -1)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            require_whole("seed", self.seed)
        _require_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _require_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on the tokens before."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)


class TokenHistory:
    """Which tokens a conversation has, and how often the model chose each: one word for each id, of fixed size.

    Attributes:
        words: [V] uint32. The highest bit says that the token was fed; the others count how often it was chosen.
    """

    FED = np.uint32(1 << 31)

    def __init__(self, vocab_size: int) -> None:
        self.words = np.zeros(vocab_size, np.uint32)

    def see(self, tokens: npt.ArrayLike) -> None:
        """Count tokens [n] as fed. Ids without a logit have no effect."""
        ids = np.asarray(tokens, np.int64)
        self.words[ids[(ids >= 0) & (ids < len(self.words))]] |= self.FED

    def count(self, token: int) -> None:
        """Count a token that was chosen."""
        if self.words[token] & ~self.FED < ~self.FED:
            self.words[token] += np.uint32(1)

    def clear(self) -> None:
        """Forget all."""
        self.words.fill(0)

    def seen(self) -> npt.NDArray[np.intp]:
        """Ids of all tokens that were fed or chosen, ascending."""
        return np.flatnonzero(self.words)

    def chosen(self, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.uint32]:
        """How often each of these was chosen."""
        return self.words[tokens] & ~self.FED


class Sampler:
    """Chooses the tokens of one generation."""

    def __init__(
        self, options: SamplingOptions, history: TokenHistory | None = None, ends: Collection[int] = ()
    ) -> None:
        """Begin a generation.

        Args:
            options: how to choose.
            history: what the conversation has so far, such as `Session.history`; None begins with nothing. Tokens
                that the sampler chooses are counted in it.
            ends: tokens that end the text. They are not part of it, so they are not counted.

        Raises:
            OptionError: `logit_bias` names a token that the history's vocabulary does not have.
        """
        self._options, self._history, self._ends = options, history, ends
        self._random = np.random.default_rng(options.seed)
        self._biased = np.fromiter(options.logit_bias, np.int64, len(options.logit_bias))
        self._bias = np.fromiter(options.logit_bias.values(), np.float64, len(options.logit_bias))
        if history is not None:
            self._check_bias(len(history.words))

    def _check_bias(self, vocab_size: int) -> None:
        if len(self._biased) and (highest := int(self._biased.max())) >= vocab_size:
            raise OptionError(f"logit_bias takes token ids from 0 to {vocab_size - 1}, got {highest}")

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, for logits [V]. They are left unchanged.

        Raises:
            EngineError: they contain NaN or infinity, other than -inf for a token that cannot be chosen.
        """
        if self._options.temperature == 0.0:
            token = int(np.argmax(self._changed(logits)))
        else:
            ids, weights = self._weights(logits)
            cumulative = np.cumsum(weights)
            # Below the total even after rounding, so that the first entry above it exists and has a weight.
            drawn = min(self._random.random() * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
            token = int(np.searchsorted(cumulative, drawn, side="right"))
            token = token if ids is None else int(ids[token])
        if self._history is not None and token not in self._ends:
            self._history.count(token)
        return token

    def probabilities(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The distribution [V] from which a call draws; tokens that the options rule out have probability 0."""
        ids, weights = self._weights(logits)
        weights /= weights.sum()
        if ids is None:
            return weights
        shares = np.zeros(len(logits))
        shares[ids] = weights
        return shares

    def _weights(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.intp] | None, npt.NDArray[np.float64]]:
        """Tokens that may be chosen, ids ascending, and their probabilities times a constant; None for ids is all."""
        options = self._options
        scores = self._changed(logits)
        ids = None
        if options.temperature == 0.0:
            ids = np.atleast_1d(np.argmax(scores))
        elif 0 < options.top_k < len(scores):
            ids = _highest(scores, options.top_k)
        chosen = scores.astype(np.float64) if ids is None else scores[ids].astype(np.float64)
        chosen -= chosen.max()
        if options.temperature > 0.0:
            with np.errstate(over="ignore"):  # to -inf, for a temperature next to 0
                chosen /= options.temperature
        weights: npt.NDArray[np.float64] = np.exp(chosen)  # the highest is 1, here and below
        if options.top_p < 1.0:
            weights[_beyond_top_p(weights, options.top_p)] = 0.0
        weights[weights < options.min_p] = 0.0
        return ids, weights

    def _changed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.floating]:
        """The logits after bias and penalties; the argument itself where nothing changes."""
        if logits.ndim != 1 or not len(logits):
            raise EngineError(f"the engine must give the logits of one token, shape [V], got {list(logits.shape)}")
        highest = logits[np.argmax(logits)]  # NaN if there is any
        if not np.isfinite(highest):
            raise EngineError(f"the engine gave logits that cannot be used: their maximum is {highest}")
        options = self._options
        if self._history is None:
            self._check_bias(len(logits))
            self._history = TokenHistory(len(logits))
        seen = self._history.seen() if options.penalizes else self._biased[:0]
        if not len(seen) and not len(self._biased):
            return logits
        scores = logits.astype(np.float64)
        scores[self._biased] += self._bias
        penalty, old = options.repetition_penalty, scores[seen]
        scores[seen] = np.where(old < 0, old * penalty, old / penalty)
        if options.presence_penalty or options.frequency_penalty:
            chosen = self._history.chosen(seen)
            scores[seen] -= options.presence_penalty * (chosen > 0) + options.frequency_penalty * chosen
        return scores


def _highest(scores: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Indices, ascending, of the `count` highest scores and of those that tie with the last; -inf is left out.

    The maxima of at least `count` groups are as high as the one in that place, so no score below it is among the
    highest: one pass over all of them, and exact work on the few that are left.
    """
    groups = len(scores) // GROUP
    if groups > count:
        maxima = scores[: groups * GROUP].reshape(GROUP, groups).max(axis=0)
        least = np.partition(maxima, -count)[-count]
        ids = np.flatnonzero(scores >= least)
    else:
        ids = np.arange(len(scores))
    values = scores[ids]
    if len(ids) > count:
        ids = ids[values >= np.partition(values, -count)[-count]]
    return ids[scores[ids] > -np.inf]


def _beyond_top_p(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Indices of the least likely tokens, as many as together have probability 1 - top_p or less; never all.

    Of equally likely ones the later go first.
    """
    tail = (1.0 - top_p) * weights.sum()
    # Tokens that have no more than the mean share of the tail are surely in it: only the others need sorting.
    small = weights <= tail / len(weights)
    small[np.argmax(weights)] = False
    candidates = np.flatnonzero(~small)[::-1]
    candidates = candidates[np.argsort(weights[candidates], kind="stable")]
    cumulative = weights[small].sum() + np.cumsum(weights[candidates])
    dropped = candidates[:-1][cumulative[:-1] <= tail]
    return np.concatenate([np.flatnonzero(small), dropped])


def _require_number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise OptionError(f"{name} must be a number from {low:g} to {high:g}, got {shorten(value)}")


def _read_bias(given: Mapping[int, float] | Mapping[str, float]) -> dict[int, float]:
    """A copy of a logit bias with ids as int."""
    if not isinstance(given, Mapping):
        raise OptionError(f"logit_bias must be a mapping of token ids to numbers, got {shorten(given)}")
    read: dict[int, float] = {}
    for token, bias in given.items():
        text = isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < MAX_DIGITS
        name = require_whole("a token id of logit_bias", int(token) if text else token, 0, MAX_ID)
        if name in read:
            raise OptionError(f"logit_bias has the token {name} twice; give it once")
        _require_number(f"logit_bias of token {name}", bias, -MAX_BIAS, MAX_BIAS)
        read[name] = float(bias)
    return read
