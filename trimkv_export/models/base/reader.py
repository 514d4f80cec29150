"""Typed access to a Hugging Face config.json."""

from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_export.checkpoint.config_keys import refuse_unknown
from trimkv_export.checks import require_whole
from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base.limits import LIMITS, MAX_INT32
from trimkv_export.words import shorten

__all__ = ["ConfigReader"]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")
FLOAT32_MIN, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class ConfigReader:
    """Typed access to a Hugging Face config.json or an object in it; errors name the file, the key and the value.

    Which keys were read is remembered, for all objects of the file together, so that `refuse_rest` can name the others.

    Attributes:
        config: the object.
        where: the file.
        context: the longest context that the package is for; None means as long as the model was made for.
    """

    def __init__(self, config: Mapping[str, Any], where: Path, context: int | None = None, path: str = "") -> None:
        self.config, self.where, self.context = config, where, context
        self._path = path
        self._sections: dict[str, tuple[Mapping[str, Any], set[str]]] = {path: (config, set())}

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` where there is none or null."""
        self._sections[self._path][1].add(key)
        value = self.config.get(key)
        return default if value is None else value

    def raw(self, key: str, default: Any = None) -> Any:
        """As `get`, but null where null is written."""
        self._sections[self._path][1].add(key)
        return self.config.get(key, default)

    def with_defaults(self, defaults: Mapping[str, Any]) -> "ConfigReader":
        """The same object with values for keys that it lacks; one that is null stays so."""
        out = self._another({**defaults, **self.config}, self._path)
        self._sections[self._path] = out.config, self._sections[self._path][1]
        return out

    def keys_read(self, path: str) -> Set[str]:
        """The keys of the object at `path`, such as "text_config.", that were read; none where there is no such one."""
        return self._sections[path][1] if path in self._sections else set()

    def refuse_rest(self, harmless: Mapping[str, Collection[str]], *, only: str = "") -> None:
        """Refuse what was not read of this object and those in it.

        Args:
            harmless: for the last name of an object's path ("" for the file itself, and where it has no entry), the
                keys that do not matter there.
            only: the beginning of the paths that are looked at.

        Raises:
            UnsupportedModelError: as `refuse_unknown`.
        """
        for path, (found, read) in self._sections.items():
            if path.startswith(only):
                name = path.rstrip(".").rpartition(".")[2]
                refuse_unknown(found, read | set(harmless.get(name, harmless[""])), self.where, path)

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
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.bad(key, "an object")
        return self._another(value, f"{self._path}{key}.")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above 0, of the size that `limits` allows, or else that int32 holds, as it does positions."""
        value = self._whole(key, default, 1, MAX_INT32)
        if value > LIMITS.get(key, MAX_INT32) and self.get(key) is not None:
            raise self.unsupported(key, f"at most {LIMITS[key]:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0 that float32 holds, which is what graphs compute with."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.bad(key, "a number above 0")
        if not FLOAT32_MIN <= value <= FLOAT32_MAX:
            raise self.bad(key, "in the range of float32")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def token_id(self, key: str, default: int, vocab_size: int) -> int:
        """A token of the vocabulary."""
        return self._whole(key, default, 0, vocab_size - 1, f", a token id (default {default})")

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0 that float32 holds."""
        values = self.get(key)
        if (
            not isinstance(values, list | tuple)
            or len(values) != count
            or not all(type(value) in (int, float) and FLOAT32_MIN <= value <= FLOAT32_MAX for value in values)
        ):
            raise self.bad(key, f"a list of {count} numbers above 0, in the range of float32")
        return tuple(map(float, values))

    def activation(self, default: str = "silu", key: str = "hidden_act") -> str:
        """An activation, one of those that the graph has."""
        value = self.get(key, default)
        if value not in ACTIVATIONS:
            raise self.unsupported(key, ", ".join(ACTIVATIONS))
        return str(value)

    def _another(self, config: Mapping[str, Any], path: str) -> "ConfigReader":
        """A reader that remembers together with this one."""
        out = ConfigReader(config, self.where, self.context, path)
        self._sections.setdefault(path, out._sections[path])
        out._sections = self._sections
        return out

    def _whole(self, key: str, default: int | None, low: int, high: int, why: str = "") -> int:
        name = f"{self.where}: '{self._path}{key}'"
        return require_whole(name, self.get(key, default), low, high, why, CheckpointError)
