"""The memory plan: sizes and offsets, known before the first token. No framework is imported here."""

from trimkv_export.memory.devices import DeviceProfile, Software, device, devices
from trimkv_export.memory.slab import ALIGNMENT, Slab, SlabEntry, plan_slab

__all__ = [
    "ALIGNMENT",
    "DeviceProfile",
    "Slab",
    "SlabEntry",
    "Software",
    "device",
    "devices",
    "plan_slab",
]
