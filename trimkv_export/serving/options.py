"""The settings of a served model: fields here, `parameters` of config.pbtxt in Triton."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trimkv_export.compat import Self
from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine
from trimkv_export.text.sampling import SamplingOptions

__all__ = ["ServingOptions"]

MOST = 2**31 - 1


@dataclass(frozen=True)
class ServingOptions:
    """How a package is served. Times in seconds; where a field says so, 0 stands for a default.

    provider: as for `Engine.open`.
    threads: of a step; 0: as many as the process may keep busy.
    budget: kept entries per stream, at most the package's; 0 is the package's.
    max_sequences: rows of the cache: requests that run at a time.
    queue_limit: requests that wait for a row; more are refused.
    prefill_chunk: most tokens of a prompt between two decode steps, at most the package's; 0 is the package's.
    max_prompt_bytes: of a request's text.
    max_images, max_image_bytes: of a request; bytes of each, as its file has them.
    max_tokens: most that a request may ask for.
    default_max_tokens, temperature, top_p, top_k, repetition_penalty: of a request that does not say.
    timeout: from a request's arrival to its last token; 0 is no limit.
    max_conversations: kept at a time, each with a copy of its cache row in memory; 0 turns them off.
    conversation_expiry: a conversation that is not used for so long is forgotten.

    Raises OptionError when a value is out of range.
    """

    provider: str = "cpu"
    threads: int = 0
    budget: int = 0
    max_sequences: int = 16
    queue_limit: int = 128
    prefill_chunk: int = 0
    max_prompt_bytes: int = 4 << 20
    max_images: int = 16
    max_image_bytes: int = 32 << 20
    max_tokens: int = 32768
    default_max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    timeout: float = 600.0
    max_conversations: int = 64
    conversation_expiry: float = 600.0

    def __post_init__(self) -> None:
        if self.provider not in ("cpu", "cuda", "tensorrt"):
            raise OptionError(f"provider must be cpu, cuda or tensorrt, got {self.provider!r}")
        lowest = {"max_sequences": 1, "max_prompt_bytes": 1, "max_tokens": 1, "default_max_tokens": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                low = lowest.get(field.name, 0)
                if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST:
                    raise OptionError(f"{field.name} must be a whole number from {low} to {MOST}, got {value!r}")
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
        """The options of `parameters`, all of them text. Raises OptionError for an unknown one or a bad value."""
        kinds: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        values = {}
        for name, text in texts.items():
            if name not in kinds:
                raise OptionError(f"unknown parameter {name!r}; known are {', '.join(kinds)}")
            try:
                values[name] = kinds[name](text)
            except ValueError:
                kind = "a whole number" if kinds[name] is int else "a number"
                raise OptionError(f"parameter {name} must be {kind}, got {text!r}") from None
        return cls(**values)

    def open_engine(self, package: Path) -> Engine:
        """Open a package as these options say. Raises as `Engine.open`."""
        return Engine.open(package, self.provider, max_sessions=self.max_sequences, threads=self.threads or None)

    def parameters(self) -> dict[str, str]:
        """The inverse of `from_parameters`: every field as text."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}
