"""Values of a config.json into dataclasses: each must be of its field's type, and numbers of a sensible size."""

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from trimkv_export.compat import StrEnum
from trimkv_export.errors import OptionError
from trimkv_export.words import shorten

__all__ = ["read_fields"]

MOST = 1 << 53  # JSON's whole numbers are exact up to here; bytes of the largest models are far below
LONGEST_TEXT, LONGEST_LIST = 4096, 65536

Made = TypeVar("Made")


def read_fields(cls: type[Made], values: Any, path: str = "") -> Made:
    """Make a dataclass from an object of a JSON file. Lists stay lists; a field with a default may be absent.

    Args:
        cls: the dataclass.
        values: the object; keys of other names are refused.
        path: what the object is called in errors; "" is the file itself.

    Raises:
        OptionError: a value is missing, unknown or of another type; its place and value are named.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"{path or 'the file'} must be an object, got {shorten(values)}")
    hints, made = _hints(cls), {}  # type: ignore[arg-type] # mypy takes a class for not hashable
    known = {each.name: each for each in fields(cls)}  # type: ignore[arg-type] # a dataclass, as said
    for name in values:
        if name not in known:
            raise OptionError(f"{_below(path, name)} is not known, and is {shorten(values[name])}")
    for name, each in known.items():
        if name in values:
            made[name] = _value(hints[name], values[name], _below(path, name))
        elif each.default is MISSING and each.default_factory is MISSING:
            raise OptionError(f"{_below(path, name)} is missing")
    return cls(**made)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _below(path: str, name: str) -> str:
    name = name if name.isidentifier() else shorten(name)
    return f"{path}.{name}" if path else name


def _value(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (each for each in get_args(kind) if each is not type(None))
        origin = get_origin(kind)
    if origin is Sequence:
        (inner,) = get_args(kind)
        if not isinstance(value, list) or len(value) > LONGEST_LIST:
            raise OptionError(f"{path} must be a list of at most {LONGEST_LIST:,} values, got {shorten(value)}")
        return [_value(inner, each, f"{path}[{index}]") for index, each in enumerate(value)]
    if origin is Mapping:
        _, inner = get_args(kind)
        if not isinstance(value, dict) or len(value) > LONGEST_LIST:
            raise OptionError(f"{path} must be an object of at most {LONGEST_LIST:,} keys, got {shorten(value)}")
        return {name: _value(inner, each, _below(path, name)) for name, each in value.items()}
    if kind is Any:
        return value
    if is_dataclass(kind):
        return read_fields(kind, value, path)  # type: ignore[arg-type] # mypy takes it for an instance
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise OptionError(f"{path} must be one of {', '.join(kind)}, got {shorten(value)}")
        return kind(value)
    if not _fits(kind, value):
        raise OptionError(f"{path} must be {_WORDS[kind]}, got {shorten(value)}")
    return value


_WORDS = {
    bool: "true or false",
    int: f"a whole number from 0 to {MOST:,}",
    float: "a finite number",
    str: f"a text of at most {LONGEST_TEXT:,} characters",
}


def _fits(kind: type, value: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return type(value) is int and 0 <= value <= MOST
    if kind is float:
        return type(value) in (int, float) and abs(value) <= MOST and math.isfinite(value)
    return isinstance(value, str) and len(value) <= LONGEST_TEXT
