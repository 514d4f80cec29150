"""The memory plan: sizes and offsets, known before the first token. No framework is imported here."""

from trimkv_export.memory.devices import DeviceProfile, Software, device, devices
from trimkv_export.memory.lifetimes import Lifetime, Peak, Placement, lifetimes_of, peak, place
from trimkv_export.memory.slab import ALIGNMENT, Slab, SlabEntry, plan_slab

__all__ = [
    "ALIGNMENT",
    "DeviceProfile",
    "Lifetime",
    "Peak",
    "Placement",
    "Slab",
    "SlabEntry",
    "Software",
    "device",
    "devices",
    "lifetimes_of",
    "peak",
    "place",
    "plan_slab",
]
