"""The eviction policy in plain NumPy (docs/design.md, sections 3 and 4)."""

from trimkv_export.policy.cache import Eviction, ReferenceCache, kept_entries, slot_streams
from trimkv_export.policy.scores import retention_scores
from trimkv_export.policy.selection import must_evict, select
from trimkv_export.policy.slab import ALIGNMENT, Slab, SlabEntry, plan_slab
from trimkv_export.policy.state import STATE_TENSORS, CacheSpec, StateTensor

__all__ = [
    "ALIGNMENT",
    "STATE_TENSORS",
    "CacheSpec",
    "Eviction",
    "ReferenceCache",
    "Slab",
    "SlabEntry",
    "StateTensor",
    "kept_entries",
    "must_evict",
    "plan_slab",
    "retention_scores",
    "select",
    "slot_streams",
]
