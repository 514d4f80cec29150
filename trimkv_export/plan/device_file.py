"""Read and check a YAML file of devices; `devices.yaml` says what the keys mean."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from trimkv_export.errors import OptionError
from trimkv_export.files import read_yaml

__all__ = ["read_devices"]

KINDS = ("jetson", "gpu", "cpu")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4")
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
VERSION = re.compile(r"\d{1,3}\.\d{1,3}")
SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?) ?([A-Za-z]+)(/s)?")
UNITS = {"B": 1} | {
    prefix + unit: base**power
    for unit, base, prefixes in (("B", 1000, "kMGT"), ("iB", 1024, "KMGT"))
    for power, prefix in enumerate(prefixes, 1)
}


class _FaultError(Exception):
    """What is wrong, without the place."""


def read_devices(path: Path) -> list[dict[str, Any]]:
    """Return the devices of a file, checked: every key there, sizes in bytes, a source for every figure.

    Raises OptionError, naming the file, the device and the key, and quoting the value.
    """
    content = read_yaml(path)
    where = f"{path}"
    try:
        _check_keys(content, required=("devices",), optional=("sources",))
        common = _texts(content.get("sources", {}), "sources")
        if not isinstance(content["devices"], list) or not content["devices"]:
            raise _FaultError(f"'devices' must be a list of devices, got {_quote(content['devices'])}")
        checked, owners = [], dict[str, str]()
        for index, values in enumerate(content["devices"]):
            where = f"{path}: device {index + 1}"
            if isinstance(values, dict) and isinstance(values.get("name"), str):
                where += f" ({values['name'][:40]!r})"
            device = _device(values, common)
            for name in (device["name"], *device["aliases"]):
                if name in owners:
                    raise _FaultError(f"the name {name!r} is taken by {owners[name]!r}")
                owners[name] = device["name"]
            checked.append(device)
    except _FaultError as fault:
        raise OptionError(f"{where}: {fault}") from None
    return checked


def _device(values: Any, common: Mapping[str, str]) -> dict[str, Any]:
    _check_keys(values, required=FIELDS, optional=DEFAULTS)
    values = DEFAULTS | values
    out = {key: check(values[key], key) for key, check in (FIELDS | OPTIONAL_FIELDS).items()}
    if out["kind"] == "cpu":
        if out["compute_capability"] is not None:
            raise _FaultError(f"'compute_capability' must be null on a cpu, got {_quote(out['compute_capability'])}")
    elif None in (out["memory"], out["bandwidth"], out["compute_capability"]):
        raise _FaultError("'memory', 'bandwidth' and 'compute_capability' may be null on a cpu only")
    for versions in out["software"]:
        if ("jetpack" in versions) != (out["kind"] == "jetson"):
            raise _FaultError("'software' names a jetpack on a jetson, and only there")
    if out["memory"] is not None and out["reserve"] + out["desktop"] >= out["memory"]:
        raise _FaultError("'reserve' and 'desktop' leave nothing of 'memory'")
    figures = [key for key in SOURCED if key == "reserve" or out[key] not in (None, [], 0)]
    sources = {key: source for key, source in common.items() if key in figures} | out["sources"]
    if missing := [key for key in figures if key not in sources]:
        raise _FaultError(f"'sources' has nothing for {', '.join(map(repr, missing))}")
    if idle := [key for key in sources if key not in figures]:
        raise _FaultError(f"'sources' is about {', '.join(map(repr, idle))}, which this device has not")
    return out | {"sources": sources}


def _check_keys(values: Any, *, required: Collection[str], optional: Collection[str]) -> None:
    if not isinstance(values, dict):
        raise _FaultError(f"must be keys and values, got {_quote(values)}")
    known = [*required, *optional]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise _FaultError(f"the key {_quote(key)} is not known" + (f"; did you mean {near[0]!r}?" if near else ""))
    missing = [key for key in required if key not in values]
    if missing:
        raise _FaultError(f"lacks {', '.join(map(repr, missing))}")


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _FaultError(f"'{key}' must be a text, got {_quote(value)}")
    return value.strip()


def _texts(value: Any, key: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _FaultError(f"'{key}' must be figures and where they are from, got {_quote(value)}")
    for figure in value:
        if figure not in SOURCED:
            raise _FaultError(f"'{key}' is about {', '.join(SOURCED)}, got {_quote(figure)}")
    return {figure: _text(source, f"{key}.{figure}") for figure, source in value.items()}


def _name(value: Any, key: str) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise _FaultError(f"'{key}' must be small letters and digits with single dashes between, got {_quote(value)}")
    return value


def _names(value: Any, key: str) -> list[str]:
    if not isinstance(value, list):
        raise _FaultError(f"'{key}' must be a list, got {_quote(value)}")
    return [_name(name, key) for name in value]


def _one_of(choices: tuple[str, ...]) -> Callable[[Any, str], str]:
    def check(value: Any, key: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _FaultError(f"'{key}' must be one of {', '.join(choices)}, got {_quote(value)}")
        return value

    return check


def _precisions(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
        raise _FaultError(f"'{key}' must be a list without repetition, got {_quote(value)}")
    return [_one_of(PRECISIONS)(precision, key) for precision in value]


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise _FaultError(f"'{key}' must be true or false, got {_quote(value)}")
    return value


def _version(value: Any, key: str) -> str:
    if not isinstance(value, str) or not VERSION.fullmatch(value):
        raise _FaultError(f"""'{key}' must be a version in quotes, such as "12.6", got {_quote(value)}""")
    return value


def _software(value: Any, key: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise _FaultError(f"'{key}' must be a list of versions, got {_quote(value)}")
    for versions in value:
        try:
            _check_keys(versions, required=("cuda", "tensorrt"), optional=("jetpack",))
        except _FaultError as fault:
            raise _FaultError(f"'{key}' {fault}") from None
        for name, version in versions.items():
            _version(version, f"{key}.{name}")
    return value


def _size(value: Any, key: str, *, per_second: bool = False) -> int:
    """Bytes of "102.4 GB/s" or "7471 MiB", exactly."""
    match = SIZE.fullmatch(value) if isinstance(value, str) else None
    known = match and match[2] in UNITS and bool(match[3]) == per_second
    size = Fraction(match[1]) * UNITS[match[2]] if match and known else None
    if size is None or size.denominator != 1:
        example = "'102.4 GB/s'" if per_second else "'7471 MiB' or '1400 MB'"
        raise _FaultError(f"'{key}' must be whole bytes as a number and a unit, such as {example}, got {_quote(value)}")
    return int(size)


def _size_or_none(value: Any, key: str) -> int | None:
    return None if value is None else _above_zero(_size(value, key), key)


def _speed_or_none(value: Any, key: str) -> int | None:
    return None if value is None else _above_zero(_size(value, key, per_second=True), key)


def _above_zero(value: int, key: str) -> int:
    if value < 1:
        raise _FaultError(f"'{key}' must be above 0, got {value}")
    return value


FIELDS: dict[str, Callable[[Any, str], Any]] = {
    "name": _name,
    "title": _text,
    "kind": _one_of(KINDS),
    "memory": _size_or_none,
    "bandwidth": _speed_or_none,
    "compute_capability": lambda value, key: None if value is None else _version(value, key),
    "precisions": _precisions,
    "unified_memory": _flag,
    "software": _software,
    "reserve": _size,
    "sources": _texts,
}
OPTIONAL_FIELDS: dict[str, Callable[[Any, str], Any]] = {"aliases": _names, "desktop": _size}
DEFAULTS: dict[str, Any] = {"aliases": [], "desktop": "0 B"}
SOURCED = ("memory", "bandwidth", "compute_capability", "precisions", "software", "reserve", "desktop")
