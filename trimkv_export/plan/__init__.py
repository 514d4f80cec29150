"""The memory plan: every byte before the first token, and what fits a device."""

from trimkv_export.plan.devices import DeviceProfile, device, devices
from trimkv_export.plan.host import host_memory
from trimkv_export.plan.lifetimes import Peak
from trimkv_export.plan.memory_plan import MemoryPlan, Phase, Workload, plan_memory

__all__ = [
    "DeviceProfile",
    "MemoryPlan",
    "Peak",
    "Phase",
    "Workload",
    "device",
    "devices",
    "host_memory",
    "plan_memory",
]
