"""Rotary position embeddings: the kinds of Hugging Face's `rope_type`, each as its inverse frequencies."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.checkpoint.config_keys import is_empty
from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base.reader import ConfigReader
from trimkv_export.words import shorten

__all__ = ["Rope", "read_mrope", "read_rope"]

ORIGINAL = "original_max_position_embeddings"
FACTORS = "short_factor", "long_factor"

Frequencies = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first 2·R numbers of each head, applied to their halves.

    Attributes:
        rope_type: Hugging Face's name of the kind.
        inverse_frequencies: R angles per position, in radians; values of float32.
        attention_scaling: what cosine and sine are multiplied by.
        axes: with M-RoPE, the axis whose position each frequency takes: 0 time, 1 height, 2 width. None: a token has
            one position.
        max_position: positions that these frequencies are for, where that is less than the model's own.
    """

    rope_type: str
    inverse_frequencies: tuple[float, ...]
    attention_scaling: float = 1.0
    axes: tuple[int, ...] | None = None
    max_position: int | None = None

    @property
    def rotary_dim(self) -> int:
        """2·R: how many numbers of a head turn."""
        return 2 * len(self.inverse_frequencies)


def read_rope(
    read: ConfigReader,
    head_dim: int,
    default_theta: float | None = 10000.0,
    *,
    whole: bool = False,
    kinds: Mapping[str, str] | None = None,
) -> Rope:
    """The embedding that `rope_scaling`, `rope_parameters` (transformers 5) or `rope_theta` alone describe.

    Args:
        read: the decoder's config.
        head_dim: numbers of a head.
        default_theta: for configs that have none; None insists on one.
        whole: whether the family always turns the whole of each head. transformers 5 passes over
            `partial_rotary_factor` there, and transformers 4 fails, so another than 1 is refused.
        kinds: the names that a family has for `KINDS`, where that is not all of them.

    Raises:
        CheckpointError: a bad value.
        UnsupportedModelError: a kind or a share of the head that the family does not have, or two places that disagree.
    """
    parameters, names = _parameters(read, default_theta), kinds or dict(zip(KINDS, KINDS, strict=True)) | ALIASES
    named = parameters.raw("rope_type", parameters.raw("type", "default"))
    kind = names.get(named) if isinstance(named, str) else None
    if kind is None:
        raise UnsupportedModelError(
            f"{read.where}: rope_type {shorten(named)} is not supported; supported: "
            f"{', '.join(sorted(set(names.values())))}"
        )
    for key in ("factor", "attention_factor"):
        if parameters.config.get(key) == 1:  # says nothing, also of a kind that does not read it
            parameters.get(key)
    theta = _own(parameters, read, "rope_theta", default_theta)
    share = _own(parameters, read, "partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UnsupportedModelError(
            f"{read.where}: rotary embedding needs an even head_dim, got {rotary_dim} of {head_dim} "
            f"(partial_rotary_factor {share:g})"
        )
    if share != 1 and whole:
        raise UnsupportedModelError(
            f"{read.where}: partial_rotary_factor {share:g} is not supported for this family, which turns whole heads: "
            "transformers 5 passes over it, and transformers 4 fails; set it to 1 if the model was trained so"
        )
    with np.errstate(all="ignore"):  # `_RopeReader.rope` looks at what comes out
        return KINDS[kind](_RopeReader(read, parameters, theta, rotary_dim))


def read_mrope(
    read: ConfigReader,
    head_dim: int,
    default_theta: float | None,
    default_section: tuple[int, int, int],
    *,
    interleaved: bool = True,
) -> Rope:
    """M-RoPE from the same places: a token has a position in time, height and width, and each frequency takes one.

    Args:
        read: the decoder's config.
        head_dim: numbers of a head.
        default_theta: as for `read_rope`.
        default_section: frequencies of each axis, for configs without `mrope_section`.
        interleaved: the axes take turns (t h w t h w …) until a section is used up, and time takes what is left;
            otherwise each axis has a block of frequencies.
    """
    rope, parameters = read_rope(read, head_dim, default_theta, whole=True), _parameters(read, default_theta)
    if parameters.raw("mrope_interleaved", interleaved) is not interleaved:
        raise parameters.unsupported("mrope_interleaved", str(interleaved).lower())
    section, count = parameters.raw("mrope_section", default_section), len(rope.inverse_frequencies)
    if (
        not isinstance(section, list | tuple)
        or not all(type(size) is int and size >= 0 for size in section)
        or len(section) != 3
        or sum(section) != count
    ):
        raise CheckpointError(
            f"{read.where}: mrope_section must be three whole numbers that sum to {count}, half the head_dim of "
            f"{head_dim}; got {shorten(section)}"
        )
    if not interleaved:
        return replace(rope, axes=tuple(np.repeat(np.arange(3), section).tolist()))
    turn, axis = np.divmod(np.arange(count), 3)
    return replace(rope, axes=tuple(np.where(turn < np.array(section)[axis], axis, 0).tolist()))


def _parameters(read: ConfigReader, default_theta: float | None) -> ConfigReader:
    """The object that describes the embedding: of two, `rope_scaling`, as in transformers.

    What only the other says would be lost without a word, so the two must not disagree.
    """
    scaling, other = read.get("rope_scaling"), read.get("rope_parameters")
    if not scaling:
        return read.section("rope_parameters") if other else ConfigReader({}, read.where)
    parameters = read.section("rope_scaling")
    for key, value in other.items() if isinstance(other, dict) else ():
        taken = parameters.get(key, read.get(key, default_theta if key == "rope_theta" else None))
        if key not in ("rope_type", "type") and value != taken and not is_empty(value):
            raise UnsupportedModelError(
                f"{read.where}: rope_parameters.{shorten(key)[1:-1]} is {shorten(value)}, and {shorten(taken)} where "
                "rope_scaling is, which goes before it; say all in one of the two"
            )
    return parameters


def _own(parameters: ConfigReader, read: ConfigReader, key: str, default: float | None) -> float:
    """A number of the parameters, or else of the config next to them, where older versions write it."""
    read.get(key)  # read in any case
    return read.number(key, default) if parameters.get(key) is None else parameters.number(key)


@dataclass(frozen=True)
class _RopeReader:
    """What the kinds below read from: the decoder's config, and the parameters in it."""

    read: ConfigReader
    parameters: ConfigReader
    theta: float
    rotary_dim: int

    def powers(self) -> Frequencies:
        """theta^(2i/D), in float32 as transformers computes it; the inverse frequencies are one over these."""
        exponent = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        return np.float32(self.theta) ** exponent

    def max_position(self) -> int:
        return self.read.integer("max_position_embeddings")

    def trained(self) -> ConfigReader:
        """The reader of `ORIGINAL`: the config itself goes before the parameters, as in transformers."""
        self.parameters.get(ORIGINAL)  # counts as read, for the other says the same or goes before it
        return self.read if self.read.get(ORIGINAL) is not None else self.parameters

    def original(self) -> int:
        """Positions of the first training, before it was stretched; all of them where the config does not say."""
        trained = self.trained()
        return trained.integer(ORIGINAL) if trained.get(ORIGINAL) is not None else self.max_position()

    def factor(self) -> float:
        """How far positions were stretched."""
        if self.parameters.get("factor") is None:
            return self.max_position() / self.original()
        return self.parameters.number("factor")

    def attention_factor(self, computed: float) -> float:
        """What cosine and sine are multiplied by: what the config says, else what its kind comes to."""
        key = "attention_factor"
        return computed if self.parameters.get(key) is None else self.parameters.number(key)

    def rope(self, kind: str, frequencies: Frequencies, scaling: float = 1.0, max_position: int | None = None) -> Rope:
        """The embedding; CheckpointError where values that are each allowed give no usable angles together."""
        frequencies = frequencies.astype(np.float32)
        if not (np.isfinite(frequencies) & (frequencies > 0)).all() or not np.isfinite(np.float32(scaling)):
            raise CheckpointError(
                f"{self.read.where}: rope_theta {self.theta:g} with {shorten(dict(self.parameters.config), 300)} gives "
                "angles outside the range of float32"
            )
        return Rope(kind, tuple(frequencies.tolist()), scaling, None, max_position)


def _default(read: _RopeReader) -> Rope:
    return read.rope("default", 1 / read.powers())


def _linear(read: _RopeReader) -> Rope:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""
    return read.rope("linear", 1 / read.powers() / np.float32(read.parameters.number("factor")))


def _llama3(read: _RopeReader) -> Rope:
    """Llama 3.1: long waves are slowed by `factor`, short ones stay, those between are mixed."""
    factor, original = np.float32(read.parameters.number("factor")), read.original()
    low, high = read.parameters.number("low_freq_factor"), read.parameters.number("high_freq_factor")
    if high <= low:
        raise read.parameters.bad("high_freq_factor", f"above low_freq_factor ({low})")
    frequencies = 1 / read.powers()
    turns = np.float32(original) / (np.float32(2 * math.pi) / frequencies)  # in the original context
    kept = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return read.rope("llama3", (1 - kept) * frequencies / factor + kept * frequencies)


def _yarn(read: _RopeReader) -> Rope:
    """YaRN (arXiv 2309.00071): a ramp over the dimensions from the plain frequencies to those slowed by `factor`."""
    parameters, factor, original = read.parameters, read.factor(), read.original()
    if read.theta <= 1:
        raise CheckpointError(f"{read.read.where}: 'rope_theta' must be above 1 for yarn, got {read.theta:g}")

    def dimension(rotations: float) -> float:
        """The dimension whose wave turns that often in the original context."""
        turned = math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(read.theta))
        return read.rotary_dim * turned

    low, high = dimension(parameters.number("beta_fast", 32.0)), dimension(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, read.rotary_dim - 1)
    high += 0.001 if low == high else 0  # no division by zero
    ramp = (np.arange(read.rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    slowed = np.clip(ramp, 0, 1)
    powers = read.powers()

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scaling = temperature(1.0)
    weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if all(weights):
        scaling = temperature(parameters.number("mscale")) / temperature(parameters.number("mscale_all_dim"))
    if not is_empty(share := parameters.get("attn_factor")) and share != 1:
        meant = f", {share * scaling:g} as there," if type(share) in (int, float) else ""
        raise UnsupportedModelError(
            f"{read.read.where}: attn_factor {shorten(share)} is not supported: transformers passes over it, and vLLM "
            f"multiplies cosine and sine by it too; remove it to follow transformers, or say attention_factor{meant} "
            "in its place"
        )
    frequencies = slowed / (np.float32(factor) * powers) + (1 - slowed) * (1 / powers)
    return read.rope("yarn", frequencies, read.attention_factor(scaling))


def _longrope(read: _RopeReader) -> Rope:
    """LongRoPE (arXiv 2402.13753): a factor for each frequency, with one list up to the original context, one beyond.

    A cache keeps turned keys, so a package has one list, for the context that it is built for.
    """
    trained, factor, count = read.trained(), read.factor(), read.rotary_dim // 2
    original = trained.integer(ORIGINAL)
    if original == 1:
        raise trained.bad(ORIGINAL, "above 1 for longrope")
    scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short = (read.read.context or read.max_position()) <= original
    for key in FACTORS:
        read.parameters.get(key)  # the package has one of them, and both are known
    factors = read.parameters.numbers(FACTORS[not short], count)
    frequencies = 1 / (np.array(factors, np.float32) * read.powers())
    return read.rope("longrope", frequencies, read.attention_factor(scaling), original if short else None)


KINDS: dict[str, Callable[[_RopeReader], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
ALIASES = {"mrope": "default", "su": "longrope"}  # older configs of Qwen2-VL and Phi-3
