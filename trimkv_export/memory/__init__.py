"""The memory plan: sizes, and offsets of the cache, known before the first token. No framework is imported here."""

from trimkv_export.memory.devices import DeviceProfile, Software, device, devices
from trimkv_export.memory.host import host_memory
from trimkv_export.memory.lifetimes import Lifetime, Peak, lifetimes_of, peak
from trimkv_export.memory.plan import MemoryPlan, Phase, Workload, max_budget, max_sequences, plan_memory
from trimkv_export.memory.slab import ALIGNMENT, Slab, SlabEntry, plan_slab

__all__ = [
    "ALIGNMENT",
    "DeviceProfile",
    "Lifetime",
    "MemoryPlan",
    "Peak",
    "Phase",
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
    "plan_memory",
    "plan_slab",
]
