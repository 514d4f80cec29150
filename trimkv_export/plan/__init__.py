"""The memory plan: every byte before the first token, and what fits a device."""

from trimkv_export.plan.devices import DeviceProfile, Software, device, devices
from trimkv_export.plan.host import host_memory
from trimkv_export.plan.lifetimes import Lifetime, Peak, lifetimes_of, peak
from trimkv_export.plan.memory_plan import MemoryPlan, Phase, Workload, max_budget, max_sequences, plan_memory

__all__ = [
    "DeviceProfile",
    "Lifetime",
    "MemoryPlan",
    "Peak",
    "Phase",
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
]
