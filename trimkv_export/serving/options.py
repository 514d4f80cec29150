"""The settings of a served model: fields here, options of `trimkv-export triton`, `parameters` of config.pbtxt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trimkv_export.checks import require_whole
from trimkv_export.compat import Self
from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine
from trimkv_export.text.sampling import SamplingOptions
from trimkv_export.words import shorten

__all__ = ["ServingOptions"]

MOST = 2**31 - 1


def _option(default: Any, about: str, low: int = 0) -> Any:
    """A field; `low` is the least value of a whole number."""
    return field(default=default, metadata={"help": about, "low": low})


@dataclass(frozen=True)
class ServingOptions:
    """How a package is served. What a field means is in its metadata, under "help".

    Raises:
        OptionError: a value is out of range.
    """

    provider: str = _option("cpu", "The model runs here: cpu, cuda or tensorrt.")
    threads: int = _option(0, "One step uses this many threads; 0 takes as many as the process may keep busy.")
    budget: int = _option(0, "Each stream keeps this many entries on average; 0 keeps what the package was built for.")
    max_sequences: int = _option(16, "This many requests run at a time; each has a row of the cache.", 1)
    queue_limit: int = _option(128, "This many requests may wait for a row; more are refused.")
    prefill_chunk: int = _option(
        0, "A prompt is read in chunks of this many tokens, with a decode step after each; 0 takes the package's."
    )
    max_prompt_bytes: int = _option(4 << 20, "The text of a request may have this many bytes.", 1)
    max_images: int = _option(16, "A request may have this many images.")
    max_image_bytes: int = _option(32 << 20, "Each image file of a request may have this many bytes.")
    max_tokens: int = _option(32768, "A request may ask for this many tokens.", 1)
    default_max_tokens: int = _option(256, "A request that does not say how many tokens it wants gets this many.", 1)
    temperature: float = _option(
        0.0, "A request that names no temperature has this one; 0 always takes the likeliest token."
    )
    top_p: float = _option(
        1.0, "A request that names no top_p draws from the likeliest tokens that together have this probability."
    )
    top_k: int = _option(0, "A request that names no top_k draws from this many likeliest tokens; 0 is off.")
    repetition_penalty: float = _option(
        1.0, "A request that names no penalty has the logits of tokens seen before divided by this; 1 is off."
    )
    timeout: float = _option(600.0, "A request may take this many seconds, its wait included; 0 sets no limit.")
    max_conversations: int = _option(
        64, "This many conversations are kept between turns, each as large as a row of the cache; 0 keeps none."
    )
    conversation_expiry: float = _option(600.0, "A conversation that is not used for this many seconds is forgotten.")

    def __post_init__(self) -> None:
        if self.provider not in ("cpu", "cuda", "tensorrt"):
            raise OptionError(f"provider must be cpu, cuda or tensorrt, got {shorten(self.provider)}")
        for option in fields(self):
            if option.type is int:
                require_whole(option.name, getattr(self, option.name), option.metadata["low"], MOST)
        for name in ("timeout", "conversation_expiry"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"{name} must be a number of seconds, 0 or more, got {value!r}")
        SamplingOptions(self.temperature, self.top_p, self.top_k, repetition_penalty=self.repetition_penalty)
        if self.default_max_tokens > self.max_tokens:
            raise OptionError(
                f"default_max_tokens must not be above max_tokens, {self.max_tokens}; got {self.default_max_tokens}"
            )

    @classmethod
    def from_parameters(cls, texts: Mapping[str, str]) -> Self:
        """The options of `parameters`, all of them text.

        Raises:
            OptionError: a parameter is not known, or its value cannot be used.
        """
        kinds: dict[str, Any] = {option.name: option.type for option in fields(cls)}
        values = {}
        for name, text in texts.items():
            if name not in kinds:
                raise OptionError(f"unknown parameter {shorten(name)}; known are {', '.join(kinds)}")
            try:
                values[name] = kinds[name](text)
            except ValueError:
                kind = "a whole number" if kinds[name] is int else "a number"
                raise OptionError(f"parameter {name} must be {kind}, got {shorten(text)}") from None
        return cls(**values)

    def open_engine(self, package: Path) -> Engine:
        """Open a package as these options say, with `Engine.open` and its errors."""
        return Engine.open(package, self.provider, max_sessions=self.max_sequences, threads=self.threads or None)

    def parameters(self) -> dict[str, str]:
        """The inverse of `from_parameters`: every field as text."""
        return {option.name: str(getattr(self, option.name)) for option in fields(self)}
