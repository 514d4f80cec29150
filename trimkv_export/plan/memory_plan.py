"""The memory plan: every byte before the first token, what fits, and what would.

Parts come in as numbers and functions, so this file knows no graph, no runtime and no device. All sizes are bytes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache as memoized
from typing import Any

from trimkv_export.checks import require_whole
from trimkv_export.config import MAX_BUDGET, MAX_COUNT
from trimkv_export.policy import CacheSpec
from trimkv_export.policy.slab import plan_slab

__all__ = [
    "MemoryPlan",
    "Phase",
    "Workload",
    "cache_read_bytes",
    "largest",
    "plan_memory",
    "tokens_per_second",
]

# Of the pool, what attention reads for each token; the rest is read at an eviction only.
READ_EACH_TOKEN = ("pool_key", "pool_value", "slot_index")


def _nothing(_batch: int, _tokens: int) -> int:
    return 0


@dataclass(frozen=True)
class Workload:
    """What a plan is made of.

    Attributes:
        weight_bytes: weights of decoder and gates as they lie on the device, without the vision tower's.
        cache: the cache of one sequence; its budget is the plan's.
        activation_bytes: (batch, tokens a row in one step, budget) -> bytes of one decoder step. It may not fall when
            an argument grows.
        batch: sequences at a time.
        prefill_chunk: C, the most tokens a row in one step.
        context: tokens at which a full cache is compared.
        vision_bytes: the vision tower, its weights and its activations.
        io_bytes: (batch, tokens a row in one step) -> bytes of inputs and outputs. It may not fall either.
        reserve_bytes: what system, driver and runtime take.
        weight_read_bytes: weights that a decode step reads: not an embedding of which it takes one row. None: all.

    Raises:
        OptionError: a value cannot be planned with.
    """

    weight_bytes: int
    cache: CacheSpec
    activation_bytes: Callable[[int, int, int], int]
    batch: int = 1
    prefill_chunk: int = 256
    context: int = 32768
    vision_bytes: int = 0
    io_bytes: Callable[[int, int], int] = _nothing
    reserve_bytes: int = 0
    weight_read_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("batch", self.batch, 1, MAX_COUNT),
            ("budget", self.cache.budget, 1, MAX_BUDGET),
            ("prefill-chunk", self.prefill_chunk, 1, MAX_COUNT),
            ("context", self.context, 1, 1 << 40),
            ("weights, bytes", self.weight_bytes, 0, 1 << 60),
            ("vision tower, bytes", self.vision_bytes, 0, 1 << 60),
            ("reserve, bytes", self.reserve_bytes, 0, 1 << 60),
        ):
            require_whole(name, value, low, high)


@dataclass(frozen=True)
class Phase:
    """What differs between prefill and decode, and the total then."""

    activation_bytes: int
    io_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Every part in bytes; the parts add up to `total_bytes`.

    Attributes:
        weight_bytes: decoder and gates.
        cache_bytes: the slab of all sequences, as it is allocated.
        activation_bytes: of the larger phase; both share one block.
        vision_bytes: the vision tower, weights and activations.
        io_bytes: inputs and outputs.
        reserve_bytes: system, driver and runtime.
        total_bytes: the sum of these.
        device_bytes: memory of the device; None if there is none to compare with. So are the next four then.
        fits: whether the total is no more than that.
        headroom_bytes: what is left; negative if it does not fit.
        max_sequences: the most sequences of this budget that fit, 0 if none does; at most MAX_COUNT.
        max_budget: the largest budget that fits with this batch, 0 if none does; at most MAX_BUDGET.
        full_cache_max_context: the most tokens that each sequence of a full cache could have in place of the pool; at
            one more it would stop fitting.
        full_cache_bytes: a full cache of `full_cache_context` tokens for all sequences.
        full_cache_context: tokens a sequence.
        prefill: at the widest step.
        decode: at one token a row.
        batch: sequences.
        budget: kept entries a stream on average.
        prefill_chunk: most tokens a row in one step.
        tokens_per_second: of all sequences together, if nothing but reading memory took time; None without a
            bandwidth. So is the next then.
        full_cache_tokens_per_second: the same with a full cache of `full_cache_context` tokens.
    """

    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    vision_bytes: int
    io_bytes: int
    reserve_bytes: int
    total_bytes: int
    device_bytes: int | None
    fits: bool | None
    headroom_bytes: int | None
    max_sequences: int | None
    max_budget: int | None
    full_cache_max_context: int | None
    full_cache_bytes: int
    full_cache_context: int
    prefill: Phase
    decode: Phase
    batch: int
    budget: int
    prefill_chunk: int
    tokens_per_second: float | None
    full_cache_tokens_per_second: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan_memory(work: Workload, *, device_bytes: int | None = None, bandwidth: int | None = None) -> MemoryPlan:
    """Make the plan of a workload.

    Args:
        work: what is planned.
        device_bytes: all memory of the device; what system and driver take of it belongs in `work.reserve_bytes`.
        bandwidth: bytes a second.
    """
    # A graph may stand behind it, and the searches ask for the same shapes again.
    work = replace(work, activation_bytes=memoized(work.activation_bytes))
    parts, batch = _parts(work), work.batch
    total = sum(parts.values())
    full_cache = work.cache.full_cache_nbytes(work.context)
    solved: dict[str, Any] = dict.fromkeys(
        ("fits", "headroom_bytes", "max_sequences", "max_budget", "full_cache_max_context")
    )
    if device_bytes is not None:
        free = device_bytes - (total - parts["cache_bytes"])
        solved = {
            "fits": total <= device_bytes,
            "headroom_bytes": device_bytes - total,
            "max_sequences": largest(lambda batch: _total(replace(work, batch=batch)) <= device_bytes, MAX_COUNT),
            "max_budget": largest(
                lambda budget: _total(replace(work, cache=replace(work.cache, budget=budget))) <= device_bytes,
                MAX_BUDGET,
            ),
            "full_cache_max_context": max(free, 0) // (batch * work.cache.full_cache_nbytes(1)),
        }
    speed = full_speed = None
    if bandwidth is not None:
        read = work.weight_bytes if work.weight_read_bytes is None else work.weight_read_bytes
        speed = tokens_per_second(bandwidth, read, cache_read_bytes(work.cache), batch)
        full_speed = tokens_per_second(bandwidth, read, full_cache, batch)
    sizes: dict[str, Any] = parts | solved
    return MemoryPlan(
        **sizes,
        total_bytes=total,
        device_bytes=device_bytes,
        full_cache_bytes=batch * full_cache,
        full_cache_context=work.context,
        prefill=_phase(work, parts, work.prefill_chunk),
        decode=_phase(work, parts, 1),
        batch=batch,
        budget=work.cache.budget,
        prefill_chunk=work.prefill_chunk,
        tokens_per_second=speed,
        full_cache_tokens_per_second=full_speed,
    )


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest whole number from 1 to `limit` for which `holds` is true, 0 if there is none.

    `holds` must be true up to some number and false beyond. It is asked about 2·log2 of the answer times.
    """
    low, high = 0, 1
    while high <= limit and holds(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)  # `holds` at low (or low is 0), and not at high (or high is out of range)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def tokens_per_second(bandwidth: int, weight_read_bytes: int, cache_read_bytes: int, batch: int = 1) -> float:
    """Decode speed of all sequences together if nothing but reading weights and caches took time: an upper bound.

    A step reads the weights once and each sequence's `cache_read_bytes`, and makes `batch` tokens.
    """
    return batch * bandwidth / max(weight_read_bytes + batch * cache_read_bytes, 1)


def cache_read_bytes(cache: CacheSpec) -> int:
    """Bytes of a full pool that a decode step reads for one sequence: keys, values and the slots' order."""
    return sum(tensor.nbytes for tensor in cache.tensors() if tensor.name in READ_EACH_TOKEN)


def _parts(work: Workload) -> dict[str, int]:
    """The parts that add up to the total."""
    prefill, decode = (_activations(work, tokens) for tokens in (work.prefill_chunk, 1))
    return {
        "weight_bytes": work.weight_bytes,
        "cache_bytes": plan_slab(work.cache, work.batch).nbytes,
        "activation_bytes": max(prefill, decode),
        "vision_bytes": work.vision_bytes,
        "io_bytes": max(work.io_bytes(work.batch, tokens) for tokens in (work.prefill_chunk, 1)),
        "reserve_bytes": work.reserve_bytes,
    }


def _total(work: Workload) -> int:
    return sum(_parts(work).values())


def _activations(work: Workload, tokens: int) -> int:
    return work.activation_bytes(work.batch, tokens, work.cache.budget)


def _phase(work: Workload, parts: dict[str, int], tokens: int) -> Phase:
    """A phase's own activations, and everything that is allocated then."""
    activations, transfers = _activations(work, tokens), work.io_bytes(work.batch, tokens)
    constant = sum(parts[name] for name in ("weight_bytes", "cache_bytes", "vision_bytes", "reserve_bytes"))
    return Phase(activations, transfers, constant + activations + transfers)
