"""Typed access to a Hugging Face config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base.limits import LIMITS, MAX_INT32
from trimkv_export.words import shorten

__all__ = ["ConfigReader"]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")
FLOAT32_MIN, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class ConfigReader:
    """Typed access to a Hugging Face config.json or an object in it; errors name the file, the key and the value.

    context: the longest context that the package is for; None means as long as the model was made for.
    """

    def __init__(self, config: Mapping[str, Any], where: Path, context: int | None = None, path: str = "") -> None:
        self.config, self.where, self.context = config, where, context
        self._path = path

    def bad(self, key: str, wanted: str) -> CheckpointError:
        """The error for a value that is not what was `wanted`."""
        value = shorten(self.config.get(key), 400)
        return CheckpointError(f"{self.where}: '{self._path}{key}' must be {wanted}, got {value}")

    def unsupported(self, key: str, supported: str) -> UnsupportedModelError:
        """The error for a value that this version does not have; `supported` says what it has."""
        return UnsupportedModelError(
            f"{self.where}: {self._path}{key} {shorten(self.config.get(key))} is not supported; supported: {supported}"
        )

    def section(self, key: str) -> "ConfigReader":
        """The reader of an object in this one."""
        value = self.config.get(key)
        if not isinstance(value, dict):
            raise self.bad(key, "an object")
        return ConfigReader(value, self.where, self.context, f"{self._path}{key}.")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above 0, of the size that `limits` allows, or else that int32 holds, as it does positions."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.bad(key, "a whole number above 0")
        if value > MAX_INT32:
            raise self.bad(key, "below 2^31")
        if value > LIMITS.get(key, MAX_INT32):
            raise self.unsupported(key, f"at most {LIMITS[key]:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0 that float32 holds, which is what graphs compute with."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.bad(key, "a number above 0")
        if not FLOAT32_MIN <= value <= FLOAT32_MAX:
            raise self.bad(key, "in the range of float32")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def token_id(self, key: str, default: int, vocab_size: int) -> int:
        """A token of the vocabulary."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self.bad(key, f"a token id from 0 to {vocab_size - 1} (default {default})")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0 that float32 holds."""
        values = self.config.get(key)
        if (
            not isinstance(values, list | tuple)
            or len(values) != count
            or not all(type(value) in (int, float) and FLOAT32_MIN <= value <= FLOAT32_MAX for value in values)
        ):
            raise self.bad(key, f"a list of {count} numbers above 0, in the range of float32")
        return tuple(map(float, values))

    def activation(self, default: str = "silu", key: str = "hidden_act") -> str:
        """An activation, one of those the graph has."""
        value = self.config.get(key)
        value = default if value is None else value
        if value not in ACTIVATIONS:
            raise self.unsupported(key, ", ".join(ACTIVATIONS))
        return str(value)
