"""The memory plan: sizes and offsets, known before the first token. No framework is imported here."""

from trimkv_export.memory.devices import DeviceProfile, Software, device, devices
from trimkv_export.memory.host import host_memory
from trimkv_export.memory.lifetimes import Lifetime, Peak, Placement, lifetimes_of, peak, place
from trimkv_export.memory.plan import MemoryPlan, Phase, Workload, max_budget, max_sequences, plan_memory
from trimkv_export.memory.slab import ALIGNMENT, Slab, SlabEntry, plan_slab

__all__ = [
    "ALIGNMENT",
    "DeviceProfile",
    "Lifetime",
    "MemoryPlan",
    "Peak",
    "Phase",
    "Placement",
    "Slab",
    "SlabEntry",
    "Software",
    "Workload",
    "device",
    "devices",
    "host_memory",
    "lifetimes_of",
    "max_budget",
    "max_sequences",
    "peak",
    "place",
    "plan_memory",
    "plan_slab",
]
