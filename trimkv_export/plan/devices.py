"""Devices by name: memory, bandwidth and software, as a plan needs them. The data are in devices.yaml."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from trimkv_export.errors import OptionError
from trimkv_export.plan.device_file import read_devices

__all__ = ["DeviceProfile", "Software", "device", "devices"]

SHIPPED = Path(__file__).with_name("devices.yaml")
ESTIMATE = "estimate:"


@dataclass(frozen=True)
class Software:
    """Versions that belong together, such as "12.6"; `jetpack` on a Jetson only."""

    cuda: str
    tensorrt: str
    jetpack: str | None = None


@dataclass(frozen=True)
class DeviceProfile:
    """A device.

    Attributes:
        name: what `--device` takes.
        title: the product's name.
        kind: "jetson", "gpu" or "cpu".
        aliases: other names that `--device` takes.
        memory_bytes: total memory as the driver or the kernel reports it; None for the machine at hand: `host_memory`.
        bandwidth: bytes a second, the peak; None if unknown.
        compute_capability: such as "8.7"; None without a GPU.
        precisions: what matrix products run in; int4 is weight-only.
        unified_memory: whether the GPU has no memory of its own.
        software: the oldest first.
        reserve_bytes: of `memory_bytes`, taken on an idle device before the first weight: driver, system without a
            desktop, CUDA context and libraries of one process.
        desktop_bytes: taken by a desktop session beside that.
        sources: where each figure is from; "estimate: …" where no sheet says it.
    """

    name: str
    title: str
    kind: str
    aliases: tuple[str, ...]
    memory_bytes: int | None
    bandwidth: int | None
    compute_capability: str | None
    precisions: tuple[str, ...]
    unified_memory: bool
    software: tuple[Software, ...]
    reserve_bytes: int
    desktop_bytes: int
    sources: Mapping[str, str] = field(hash=False)

    def reserve(self, *, desktop: bool = False) -> int:
        """Bytes that no plan can have, with or without a desktop session."""
        return self.reserve_bytes + (self.desktop_bytes if desktop else 0)

    @property
    def estimates(self) -> tuple[str, ...]:
        """The figures that no sheet or report says, sorted."""
        return tuple(sorted(figure for figure, source in self.sources.items() if ESTIMATE in source))


@cache
def devices() -> tuple[DeviceProfile, ...]:
    """Every device that ships with the package, in the file's order: Jetson, cards, cpu."""
    return load_devices(SHIPPED)


def load_devices(path: Path) -> tuple[DeviceProfile, ...]:
    """Read the devices of a YAML file. Raises OptionError, naming the file, the device and the key."""
    return tuple(_profile(values) for values in read_devices(path))


def device(name: str) -> DeviceProfile:
    """Return a device by its name or an alias; case, blanks and underscores do not matter.

    Raises OptionError with the nearest names and the list of all.
    """
    found = {known: profile for profile in devices() for known in (profile.name, *profile.aliases)}
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    if wanted in found:
        return found[wanted]
    near = difflib.get_close_matches(wanted, found, n=6, cutoff=0.5)
    names = list(dict.fromkeys(found[known].name for known in near))[:3]
    hint = f"; did you mean {' or '.join(map(repr, names))}?" if names else "."
    raise OptionError(
        f"there is no device {name[:100]!r}{hint} The devices are {', '.join(profile.name for profile in devices())}"
    )


def _profile(values: Mapping[str, Any]) -> DeviceProfile:
    return DeviceProfile(
        name=values["name"],
        title=values["title"],
        kind=values["kind"],
        aliases=tuple(values["aliases"]),
        memory_bytes=values["memory"],
        bandwidth=values["bandwidth"],
        compute_capability=values["compute_capability"],
        precisions=tuple(values["precisions"]),
        unified_memory=values["unified_memory"],
        software=tuple(Software(**versions) for versions in values["software"]),
        reserve_bytes=values["reserve"],
        desktop_bytes=values["desktop"],
        sources=values["sources"],
    )
