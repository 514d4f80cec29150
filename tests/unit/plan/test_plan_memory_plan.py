import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_export.config import MAX_BUDGET, MAX_COUNT
from trimkv_export.errors import OptionError
from trimkv_export.plan import device
from trimkv_export.plan.memory_plan import (
    MemoryPlan,
    Workload,
    cache_read_bytes,
    largest,
    plan_memory,
    tokens_per_second,
)
from trimkv_export.policy import CacheSpec, plan_slab

PARTS = ("weight_bytes", "cache_bytes", "activation_bytes", "vision_bytes", "io_bytes", "reserve_bytes")
# Qwen3-VL-4B's decoder; docs/design.md, section 4, has its bytes.
VL_4B = CacheSpec(36, 8, 128, 256, 32, "float16")


def affine(base: int, row: int, token: int, entry: int, grain: int) -> Callable[[int, int, int], int]:
    """Activations as runtimes have them: rounded up to a grain."""

    def activation_bytes(batch: int, tokens: int, budget: int) -> int:
        size = base + batch * (row + tokens * token + budget * entry)
        return -(-size // grain) * grain

    return activation_bytes


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    small = st.integers(1, 6)
    size = st.integers(0, 5000)
    cache = CacheSpec(
        draw(small), draw(small), draw(st.integers(1, 40)), draw(st.integers(1, 300)), draw(small),
        draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    )  # fmt: skip
    return Workload(
        weight_bytes=draw(st.integers(0, 10**7)),
        cache=cache,
        activation_bytes=affine(
            draw(size), draw(size), draw(size), draw(size), draw(st.sampled_from([1, 256, 1 << 20]))
        ),
        batch=draw(st.integers(1, 20)),
        prefill_chunk=draw(st.integers(1, 64)),
        context=draw(st.integers(1, 10**5)),
        vision_bytes=draw(st.integers(0, 10**6)),
        io_bytes=lambda batch, tokens: batch * (8 * tokens + 100),
        reserve_bytes=draw(st.integers(0, 10**6)),
    )


devices_of = st.integers(0, 10**9)


def total(work: Workload) -> int:
    return plan_memory(work).total_bytes


@given(workloads(), devices_of)
@settings(max_examples=300)
def test_solutions_are_exact(work: Workload, memory: int) -> None:
    plan = plan_memory(work, device_bytes=memory)
    assert plan.max_budget is not None
    assert plan.max_sequences is not None
    assert plan.full_cache_max_context is not None
    budget, batch, context = plan.max_budget, plan.max_sequences, plan.full_cache_max_context
    if budget:
        assert total(replace(work, cache=replace(work.cache, budget=budget))) <= memory
    if budget < MAX_BUDGET:
        assert total(replace(work, cache=replace(work.cache, budget=budget + 1))) > memory
    if batch:
        assert total(replace(work, batch=batch)) <= memory
    if batch < MAX_COUNT:
        assert total(replace(work, batch=batch + 1)) > memory
    rest = plan.total_bytes - plan.cache_bytes
    if context:
        assert rest + work.batch * work.cache.full_cache_nbytes(context) <= memory
    assert rest + work.batch * work.cache.full_cache_nbytes(context + 1) > memory
    assert plan.fits == (work.cache.budget <= budget) == (work.batch <= batch)


@given(workloads(), devices_of)
def test_the_parts_add_up(work: Workload, memory: int) -> None:
    plan = plan_memory(work, device_bytes=memory, bandwidth=10**9)
    assert sum(getattr(plan, part) for part in PARTS) == plan.total_bytes
    assert plan.headroom_bytes == memory - plan.total_bytes
    assert plan.fits == (plan.headroom_bytes >= 0)
    assert plan.cache_bytes == plan_slab(work.cache, work.batch).nbytes
    assert plan.full_cache_bytes == work.batch * work.cache.full_cache_nbytes(work.context)
    phases = (plan.prefill, plan.decode)
    assert max(phase.total_bytes for phase in phases) == plan.total_bytes
    assert plan.activation_bytes == max(phase.activation_bytes for phase in phases)
    content = json.loads(json.dumps(plan.as_dict()))
    assert MemoryPlan(**content | {"prefill": plan.prefill, "decode": plan.decode}) == plan


@given(st.integers(0, 400), st.integers(0, 400))
def test_largest_is_that_of_a_count(border: int, limit: int) -> None:
    asked = []

    def holds(value: int) -> bool:
        asked.append(value)
        return value <= border

    assert largest(holds, limit) == min(border, limit)
    assert all(1 <= value <= limit for value in asked)
    assert len(asked) <= 2 * 9 + 1


def test_limits() -> None:
    work = Workload(0, CacheSpec(1, 1, 1, 4, 1), affine(0, 0, 0, 0, 1))
    plan = plan_memory(work, device_bytes=10**15)
    assert (plan.max_budget, plan.max_sequences) == (MAX_BUDGET, MAX_COUNT)
    plan = plan_memory(work, device_bytes=0)
    assert (plan.max_budget, plan.max_sequences) == (0, 0)


def test_activations_are_asked_for_once() -> None:
    asked = []

    def activation_bytes(*shape: int) -> int:
        asked.append(shape)
        return 1000 * shape[0]

    plan_memory(Workload(0, VL_4B, activation_bytes), device_bytes=10**10)
    assert len(asked) == len(set(asked)) < 120


def test_without_a_device() -> None:
    plan = plan_memory(Workload(10, VL_4B, affine(0, 0, 0, 0, 1)))
    assert {plan.device_bytes, plan.fits, plan.headroom_bytes, plan.max_budget, plan.max_sequences} == {None}
    assert {plan.tokens_per_second, plan.full_cache_tokens_per_second, plan.full_cache_max_context} == {None}


def test_figures_of_the_design() -> None:
    plan = plan_memory(Workload(0, VL_4B, affine(0, 0, 0, 0, 1)))
    assert plan.cache_bytes == pytest.approx(43.4e6, rel=0.001)
    assert plan.full_cache_bytes == pytest.approx(4.83e9, rel=0.001)


def test_a_board() -> None:
    board = device("orin-nano-8gb")
    work = Workload(
        weight_bytes=4_255_064_064,  # Qwen3-VL-2B in 16 bits
        cache=CacheSpec(28, 8, 128, 256, 32, "float16"),
        activation_bytes=affine(0, 0, 200_000, 0, 1),
        reserve_bytes=board.reserve_bytes,
    )
    plan = plan_memory(work, device_bytes=board.memory_bytes, bandwidth=board.bandwidth)
    assert plan.fits
    # About 2.1 GB are left, and a full cache takes 115 kB a token.
    assert plan.full_cache_max_context is not None
    assert 15_000 < plan.full_cache_max_context < 25_000
    assert not plan_memory(work, device_bytes=device("orin-nano-4gb").memory_bytes).fits
    assert plan.tokens_per_second == pytest.approx(23.9, abs=0.2)
    assert plan.full_cache_tokens_per_second == pytest.approx(12.8, abs=0.2)


def test_speed_is_bound_by_what_is_read() -> None:
    assert tokens_per_second(1000, 90, 10) == 10
    assert tokens_per_second(1000, 90, 10, batch=2) == pytest.approx(2 * 1000 / 110)
    read = cache_read_bytes(VL_4B)
    assert read == VL_4B.num_slots * (2 * 128 * 2 + 4)
    work = Workload(900, VL_4B, affine(0, 0, 0, 0, 1), batch=3, context=10, weight_read_bytes=500)
    plan = plan_memory(work, bandwidth=10**6)
    assert plan.tokens_per_second == pytest.approx(3e6 / (500 + 3 * read))
    assert plan.full_cache_tokens_per_second == pytest.approx(3e6 / (500 + 3 * VL_4B.full_cache_nbytes(10)))


# Measured by TensorRT Edge-LLM with int4 weights, batch 1, a context of a few hundred tokens.
@pytest.mark.parametrize(
    ("name", "parameters", "measured"),
    [
        ("orin-nano-8gb", 1_720_574_976, 36.5),
        ("orin-nx-16gb", 4_022_468_096, 32.2),
        ("agx-orin-64gb", 4_022_468_096, 55.3),
        ("agx-orin-64gb", 8_190_735_360, 32.1),
    ],
)
def test_measured_speeds_are_below_the_bound(name: str, parameters: int, measured: float) -> None:
    bandwidth = device(name).bandwidth
    assert bandwidth is not None
    assert measured < tokens_per_second(bandwidth, parameters // 2, 0) < 4 * measured


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 0}, "batch must be a whole number from 1 to 65536, got 0"),
        ({"batch": 10**9}, "batch must be .*, got 1000000000"),
        ({"batch": True}, "batch must be .*, got True"),
        ({"cache": replace(VL_4B, budget=0)}, "budget must be a whole number from 1 to 1048576, got 0"),
        ({"prefill_chunk": 0}, "prefill-chunk must be"),
        ({"context": -1}, "context must be"),
        ({"weight_bytes": -1}, "weights, bytes must be"),
        ({"reserve_bytes": 0.5}, "reserve, bytes must be .*, got 0.5"),
    ],
)
def test_bad_values(changes: dict[str, object], says: str) -> None:
    good = {"weight_bytes": 1, "cache": VL_4B, "activation_bytes": affine(0, 0, 0, 0, 1)}
    with pytest.raises(OptionError, match=says):
        Workload(**good | changes)  # type: ignore[arg-type]
