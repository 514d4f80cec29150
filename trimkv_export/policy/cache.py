"""The fixed pool in plain NumPy: the readable specification of PoolAttention and PoolUpdate.

Slow and short on purpose. The portable ONNX bodies and the native kernels are tested against it, slot by slot: where
docs/design.md leaves an order open (which free slot a survivor takes, the order of `slot_index`), this file decides it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.config import EvictionConfig
from trimkv_export.policy.scores import retention_scores
from trimkv_export.policy.selection import must_evict, select
from trimkv_export.policy.state import CacheSpec

__all__ = ["Eviction", "ReferenceCache", "kept_entries", "slot_streams"]

Array = NDArray[np.float32]
State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Eviction:
    """One eviction: score, position, stream and whether it stays, of every live entry; each [entries]."""

    score: NDArray[np.float32]
    position: NDArray[np.int32]
    stream: NDArray[np.int32]
    keep: NDArray[np.bool_]


def slot_streams(state: State, spec: CacheSpec) -> NDArray[np.int32]:
    """Stream of every pool slot of one sequence, [N]; L·H where the slot is free. `state` has no batch dimension."""
    start, streams = state["stream_start"], spec.num_streams
    out = np.full(spec.num_slots, streams, np.int32)
    out[state["slot_index"][: start[streams]]] = np.repeat(np.arange(streams, dtype=np.int32), np.diff(start))
    return out


def kept_entries(state: State, spec: CacheSpec) -> NDArray[np.int32]:
    """Every live entry of one sequence as rows (layer, KV head, position), sorted: [entries, 3]."""
    streams, heads = spec.num_streams, spec.num_kv_heads
    seen, _, recent_tokens, _ = (int(count) for count in state["counters"])
    owner = slot_streams(state, spec)
    live = owner < streams
    recent = np.arange(seen - recent_tokens, seen)
    stream = np.concatenate([owner[live], np.repeat(np.arange(streams), recent_tokens)])
    position = np.concatenate([state["pool_position"][live], np.tile(recent, streams)])
    rows = np.stack([stream // heads, stream % heads, position], axis=1).astype(np.int32)
    return rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]


class ReferenceCache:
    """The cache of one sequence (one batch row); keys and values are float32 whatever the package stores.

    `state` maps the names of STATE_TENSORS to arrays without the batch dimension.
    """

    def __init__(self, spec: CacheSpec, config: EvictionConfig) -> None:
        self.spec, self.config = spec, config
        self.state: dict[str, NDArray[np.generic]] = {
            tensor.name: np.zeros(tensor.shape[1:], np.int32 if tensor.dtype == "int32" else np.float32)
            for tensor in spec.tensors()
        }

    @property
    def tokens_seen(self) -> int:
        """n, tokens fed so far."""
        return int(self.state["counters"][0])

    @property
    def recent_tokens(self) -> int:
        """Tokens that do not fit in the pool yet."""
        return int(self.state["counters"][2])

    def kept(self) -> NDArray[np.int32]:
        """Every live entry as rows (layer, KV head, position), sorted: [entries, 3]."""
        return kept_entries(self.state, self.spec)

    def attend(self, layer: int, query: Array, key: Array, value: Array, scale: float) -> Array:
        """PoolAttention: each query attends to its stream's live entries and the step's own tokens up to itself.

        Args:
            layer: of the decoder.
            query: [S, H·G, D], with RoPE applied.
            key: [S, H, D], with RoPE applied.
            value: [S, H, D].
            scale: what logits are multiplied by.

        Returns:
            [S, H·G, D].
        """
        steps, heads = key.shape[0], self.spec.num_kv_heads
        group = query.shape[1] // heads
        causal = np.tril(np.ones((steps, steps), bool))
        out = np.empty_like(query)
        for head in range(heads):
            stream = layer * heads + head
            start, end = self.state["stream_start"][stream : stream + 2]
            slots, recent = self.state["slot_index"][start:end], self.recent_tokens
            keys = np.concatenate(
                [self.state["pool_key"][slots], self.state["recent_key"][layer, head, :recent], key[:, head]]
            )
            values = np.concatenate(
                [self.state["pool_value"][slots], self.state["recent_value"][layer, head, :recent], value[:, head]]
            )
            visible = np.concatenate([np.ones((steps, len(keys) - steps), bool), causal], axis=1)
            for query_head in range(head * group, (head + 1) * group):
                logits = np.where(visible, query[:, query_head] @ keys.T * scale, -np.inf)
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                out[:, query_head] = (weights / weights.sum(axis=1, keepdims=True)) @ values
        return out

    def update(self, key: Array, value: Array, log_beta: Array, budget: int | None = None) -> Eviction | None:
        """PoolUpdate: take in one step's entries, then evict if due.

        Args:
            key: [L, S, H, D].
            value: [L, S, H, D].
            log_beta: [L, S, H].
            budget: M of this step; None is the package's own.

        Returns:
            What the eviction saw and chose, None if there was none.
        """
        spec, state, streams = self.spec, self.state, self.spec.num_streams
        seen, _, recent, evictions = (int(count) for count in state["counters"])
        steps = key.shape[1]
        outside = recent + steps  # tokens outside the pool
        seen += steps

        # Entries outside the pool, token by token, stream by stream: [outside · L·H].
        new_key, new_value = (a.transpose(1, 0, 2, 3).reshape(steps, streams, -1) for a in (key, value))
        new_log_beta = log_beta.transpose(1, 0, 2).reshape(steps, streams)

        def with_recent(name: str, new: Array) -> Array:
            old = state[name].reshape(streams, spec.evict_every, *new.shape[2:])[:, :recent]
            return np.concatenate([old.swapaxes(0, 1), new]).reshape(outside * streams, *new.shape[2:])

        out_key = with_recent("recent_key", new_key)
        out_value = with_recent("recent_value", new_value)
        out_log_beta = with_recent("recent_log_beta", new_log_beta)
        out_position = np.repeat(np.arange(seen - outside, seen, dtype=np.int32), streams)
        out_stream = np.tile(np.arange(streams, dtype=np.int32), outside)

        owner = slot_streams(state, spec)
        slots = np.flatnonzero(owner < streams)
        total = len(slots) + outside * streams
        eviction = None
        if evicting := must_evict(total, streams, self.config, budget):
            log_betas = np.concatenate([state["pool_log_beta"][slots], out_log_beta]).astype(np.float32)
            position = np.concatenate([state["pool_position"][slots], out_position]).astype(np.int32)
            stream = np.concatenate([owner[slots], out_stream]).astype(np.int32)
            score = retention_scores(log_betas, position, seen, self.config.lookahead_steps)
            keep = select(score, position, stream, streams, self.config, budget)
            eviction = Eviction(score, position, stream, keep)
            owner[slots[~keep[: len(slots)]]] = streams
            moving, moved_tokens = np.flatnonzero(keep[len(slots) :]), outside
        else:
            moved_tokens = min(outside, (spec.num_slots - len(slots)) // streams)
            moving = np.arange(moved_tokens * streams)

        free = np.flatnonzero(owner == streams)[: len(moving)]
        owner[free] = out_stream[moving]
        state["pool_key"][free] = out_key[moving]
        state["pool_value"][free] = out_value[moving]
        state["pool_log_beta"][free] = out_log_beta[moving]
        state["pool_position"][free] = out_position[moving]
        state["slot_index"][:] = np.argsort(owner, kind="stable")
        state["stream_start"][:] = np.searchsorted(np.sort(owner), np.arange(streams + 1))

        rest = slice(moved_tokens * streams, None)
        recent = outside - moved_tokens
        for name, entries in (
            ("recent_key", out_key), ("recent_value", out_value), ("recent_log_beta", out_log_beta)
        ):  # fmt: skip
            tensor = state[name].reshape(streams, spec.evict_every, *entries.shape[1:])
            tensor[:, :recent] = entries[rest].reshape(recent, streams, *entries.shape[1:]).swapaxes(0, 1)
        state["counters"][:] = (seen, (owner < streams).sum(), recent, evictions + evicting)
        return eviction
