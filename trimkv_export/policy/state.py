"""The cache state: ten tensors of a fixed size (docs/design.md, section 4)."""

from dataclasses import dataclass

from trimkv_export.dtypes import ITEM_BYTES

__all__ = ["STATE_TENSORS", "CacheSpec", "StateTensor"]

STATE_TENSORS = (
    "pool_key",
    "pool_value",
    "pool_log_beta",
    "pool_position",
    "slot_index",
    "stream_start",
    "recent_key",
    "recent_value",
    "recent_log_beta",
    "counters",
)


@dataclass(frozen=True)
class StateTensor:
    """Name, shape (with the batch first) and element type of one state tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        size = ITEM_BYTES[self.dtype]
        for dim in self.shape:
            size *= dim
        return size


@dataclass(frozen=True)
class CacheSpec:
    """Everything that decides the size of the cache; no length of any prompt is among it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    budget: int
    evict_every: int
    kv_dtype: str = "float32"

    @property
    def num_streams(self) -> int:
        """L·H, the number of (layer, KV head) pairs."""
        return self.num_layers * self.num_kv_heads

    @property
    def num_slots(self) -> int:
        """N = L·H·M, slots of the pool of one batch row."""
        return self.num_streams * self.budget

    def tensors(self, batch: int = 1) -> tuple[StateTensor, ...]:
        """The ten tensors in the order of STATE_TENSORS."""
        slots, depth = self.num_slots, self.head_dim
        recent = (batch, self.num_layers, self.num_kv_heads, self.evict_every)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "pool_key": ((batch, slots, depth), self.kv_dtype),
            "pool_value": ((batch, slots, depth), self.kv_dtype),
            "pool_log_beta": ((batch, slots), "float32"),
            "pool_position": ((batch, slots), "int32"),
            "slot_index": ((batch, slots), "int32"),
            "stream_start": ((batch, self.num_streams + 1), "int32"),
            "recent_key": ((*recent, depth), self.kv_dtype),
            "recent_value": ((*recent, depth), self.kv_dtype),
            "recent_log_beta": (recent, "float32"),
            "counters": ((batch, 4), "int32"),
        }
        return tuple(StateTensor(name, *shapes[name]) for name in STATE_TENSORS)

    def nbytes(self, batch: int = 1) -> int:
        """Bytes of the state without the slab's gaps: B · [N·(2·D·s + 12) + 4·(L·H + 1) + L·H·b·(2·D·s + 4) + 16]."""
        return sum(tensor.nbytes for tensor in self.tensors(batch))

    def full_cache_nbytes(self, tokens: int) -> int:
        """Bytes that an ordinary KV cache of `tokens` tokens needs: 2·L·H·D·s per token."""
        return 2 * self.num_streams * self.head_dim * ITEM_BYTES[self.kv_dtype] * tokens
