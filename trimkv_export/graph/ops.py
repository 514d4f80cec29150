"""The contracts of the two operators (docs/design.md, section 5); bodies and kernels implement exactly this."""

from dataclasses import dataclass
from typing import Any

from trimkv_export.config import EvictionConfig
from trimkv_export.policy import STATE_TENSORS

__all__ = [
    "DOMAIN",
    "DOMAIN_VERSION",
    "POOL_ATTENTION",
    "POOL_ATTENTION_STATE",
    "POOL_UPDATE",
    "PoolAttentionAttributes",
    "PoolUpdateAttributes",
    "pool_update_inputs",
]

DOMAIN = "trimkv"
DOMAIN_VERSION = 1
POOL_ATTENTION = "PoolAttention"
POOL_UPDATE = "PoolUpdate"

# State that attention reads, in input order after query, key and value; step_tokens comes last.
POOL_ATTENTION_STATE = (
    "pool_key",
    "pool_value",
    "slot_index",
    "stream_start",
    "recent_key",
    "recent_value",
    "counters",
)


@dataclass(frozen=True)
class PoolAttentionAttributes:
    """Attributes of one PoolAttention node."""

    layer: int
    num_layers: int
    num_kv_heads: int
    scale: float

    def as_dict(self) -> dict[str, Any]:
        """Name -> value, as the node carries them."""
        return dict(vars(self))


@dataclass(frozen=True)
class PoolUpdateAttributes:
    """Attributes of the PoolUpdate node."""

    num_layers: int
    num_kv_heads: int
    eviction: EvictionConfig

    def as_dict(self) -> dict[str, Any]:
        """Name -> value, as the node carries them."""
        return {
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "evict_every": self.eviction.evict_every,
            "policy": str(self.eviction.policy),
            "min_tokens_per_head": self.eviction.min_tokens_per_head,
            "lookahead_steps": self.eviction.lookahead_steps,
        }


def pool_update_inputs(num_layers: int) -> list[str]:
    """Formal inputs of PoolUpdate, in order.

    `attended` is the last PoolAttention's output. It carries no data: it makes the one writer of the state run after
    the last reader, which nothing else does (that layer's key and value do not depend on its attention).
    """
    per_layer = [f"{kind}_{layer}" for kind in ("key", "value", "log_beta") for layer in range(num_layers)]
    return [*STATE_TENSORS, "step_tokens", "budget", "attended", *per_layer]
