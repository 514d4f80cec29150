"""Typed access to a Hugging Face config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_export.checks import require_whole
from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base.limits import LIMITS, MAX_INT32
from trimkv_export.words import shorten

__all__ = ["ConfigReader"]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")
FLOAT32_MIN, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class ConfigReader:
    """Typed access to a Hugging Face config.json or an object in it; errors name the file, the key and the value.

    Attributes:
        config: the object.
        where: the file.
        context: the longest context that the package is for; None means as long as the model was made for.
    """

    def __init__(self, config: Mapping[str, Any], where: Path, context: int | None = None, path: str = "") -> None:
        self.config, self.where, self.context = config, where, context
        self._path = path

    def bad(self, key: str, wanted: str) -> CheckpointError:
        """The error for a value that is not what was `wanted`."""
        found = shorten(self.config.get(key), 400)
        return CheckpointError(f"{self.where}: '{self._path}{key}' must be {wanted}, got {found}")

    def unsupported(self, key: str, supported: str) -> UnsupportedModelError:
        """The error for a value that this version does not have; `supported` says what it has."""
        found = shorten(self.config.get(key), 200)
        return UnsupportedModelError(
            f"{self.where}: {self._path}{key} {found} is not supported; supported: {supported}"
        )

    def section(self, key: str) -> "ConfigReader":
        """The reader of an object in this one."""
        value = self.config.get(key)
        if not isinstance(value, dict):
            raise self.bad(key, "an object")
        return ConfigReader(value, self.where, self.context, f"{self._path}{key}.")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above 0, of the size that `limits` allows, or else that int32 holds, as it does positions."""
        value = self._whole(key, default, 1, MAX_INT32)
        if value > LIMITS.get(key, MAX_INT32) and self.config.get(key) is not None:
            raise self.unsupported(key, f"at most {LIMITS[key]:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0 that float32 holds, which is what graphs compute with."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.bad(key, "a number above 0")
        if not FLOAT32_MIN <= value <= FLOAT32_MAX:
            raise self.bad(key, "in the range of float32")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def token_id(self, key: str, default: int, vocab_size: int) -> int:
        """A token of the vocabulary."""
        return self._whole(key, default, 0, vocab_size - 1, f", a token id (default {default})")

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
        """An activation, one of those that the graph has."""
        value = self._value(key, default)
        if value not in ACTIVATIONS:
            raise self.unsupported(key, ", ".join(ACTIVATIONS))
        return str(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def _whole(self, key: str, default: int | None, low: int, high: int, why: str = "") -> int:
        name = f"{self.where}: '{self._path}{key}'"
        return require_whole(name, self._value(key, default), low, high, why, CheckpointError)
