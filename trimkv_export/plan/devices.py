"""Devices by name: memory, bandwidth and number formats, as a plan needs them. The data are in devices.yaml."""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from trimkv_export.errors import OptionError
from trimkv_export.files import read_yaml
from trimkv_export.words import did_you_mean, shorten

__all__ = ["SHIPPED", "DeviceProfile", "device", "devices"]

SHIPPED = Path(__file__).with_name("devices.yaml")
UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class DeviceProfile:
    """A device.

    Attributes:
        name: what `--device` takes.
        title: the product's name.
        kind: "jetson", "gpu" or "cpu".
        memory_bytes: total memory as the driver or the kernel reports it; None for the machine at hand: `host_memory`.
        bandwidth: bytes a second, the peak; None if unknown.
        compute_capability: such as "8.7"; None without a GPU.
        precisions: what matrix products run in; int4 is weight-only.
        unified_memory: whether the GPU has no memory of its own.
        reserve_bytes: of `memory_bytes`, taken on an idle device before the first weight: driver, system without a
            desktop, CUDA context and libraries of one process.
        aliases: other names that `--device` takes.
    """

    name: str
    title: str
    kind: str
    memory_bytes: int | None
    bandwidth: int | None
    compute_capability: str | None
    precisions: tuple[str, ...]
    unified_memory: bool
    reserve_bytes: int
    aliases: tuple[str, ...] = ()


@cache
def devices() -> tuple[DeviceProfile, ...]:
    """Every device that ships with the package, in the file's order: Jetson, cards, cpu."""
    return tuple(_profile(**values) for values in read_yaml(SHIPPED)["devices"])


def device(name: str) -> DeviceProfile:
    """Return a device by its name or an alias; case, blanks and underscores do not matter.

    Raises:
        OptionError: there is no such device; the message has the nearest names and the list of all.
    """
    found = {known: profile for profile in devices() for known in (profile.name, *profile.aliases)}
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    if wanted in found:
        return found[wanted]
    hint = did_you_mean(wanted, found, cutoff=0.5)
    raise OptionError(
        f"there is no device {shorten(name, 100)}{f'; {hint}' if hint else '.'} "
        f"The devices are {', '.join(profile.name for profile in devices())}"
    )


def _profile(*, memory: str | None, bandwidth: str | None, reserve: str, sources: Any, **values: Any) -> DeviceProfile:
    """A device of the file, whose `sources` are for its readers."""
    del sources
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return DeviceProfile(
        **values, memory_bytes=_size(memory), bandwidth=_size(bandwidth), reserve_bytes=_size(reserve) or 0
    )


def _size(text: str | None) -> int | None:
    """Bytes of "7471 MiB", or bytes a second of "51.2 GB/s", exactly."""
    if text is None:
        return None
    number, unit = text.removesuffix("/s").split()
    return int(Fraction(number) * UNITS[unit])
