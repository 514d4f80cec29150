"""Where each state tensor lies in the one allocation that holds the cache."""

from dataclasses import asdict, dataclass
from typing import Any

from trimkv_export.policy.state import CacheSpec

__all__ = ["ALIGNMENT", "Slab", "SlabEntry", "plan_slab"]

ALIGNMENT = 256  # bytes; what CUDA allocations and vector loads ask for


@dataclass(frozen=True)
class SlabEntry:
    """A state tensor of all rows: rows follow each other, `row_bytes` apart, from `offset`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class Slab:
    """Entries in order of offset, without overlap; gaps are below ALIGNMENT bytes."""

    entries: tuple[SlabEntry, ...]
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        """For `memory_plan.json`."""
        return {"alignment": ALIGNMENT, "nbytes": self.nbytes, "entries": [asdict(entry) for entry in self.entries]}


def plan_slab(cache: CacheSpec, rows: int = 1) -> Slab:
    """Lay out the state of `rows` sequences."""
    entries, offset = [], 0
    for tensor in cache.tensors(rows):
        size = tensor.nbytes
        entries.append(SlabEntry(tensor.name, tensor.shape, tensor.dtype, offset, size, size // rows))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return Slab(tuple(entries), offset)
