import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_export.policy import STATE_TENSORS, CacheSpec

small = st.integers(1, 40)


@given(small, small, small, small, small, st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(1, 5))
def test_bytes_follow_the_formula(
    layers: int, heads: int, depth: int, budget: int, interval: int, dtype: str, batch: int
) -> None:
    spec = CacheSpec(layers, heads, depth, budget, interval, dtype)
    s, streams = (4 if dtype == "float32" else 2), layers * heads
    slots = streams * budget
    row = slots * (2 * depth * s + 12) + 4 * (streams + 1) + streams * interval * (2 * depth * s + 4) + 16
    assert (spec.num_streams, spec.num_slots) == (streams, slots)
    assert spec.nbytes(batch) == batch * row == sum(tensor.nbytes for tensor in spec.tensors(batch))
    assert spec.full_cache_nbytes(100) == 100 * 2 * streams * depth * s


def test_the_example_of_the_design() -> None:
    spec = CacheSpec(36, 8, 128, 256, 32, "float16")
    assert spec.nbytes() == pytest.approx(43.4e6, abs=0.05e6)
    assert spec.full_cache_nbytes(32768) == pytest.approx(4.83e9, abs=0.005e9)


def test_shapes_and_order() -> None:
    tensors = CacheSpec(3, 2, 8, 5, 4, "float16").tensors(7)
    assert tuple(tensor.name for tensor in tensors) == STATE_TENSORS
    assert {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors} == {
        "pool_key": ((7, 30, 8), "float16"),
        "pool_value": ((7, 30, 8), "float16"),
        "pool_log_beta": ((7, 30), "float32"),
        "pool_position": ((7, 30), "int32"),
        "slot_index": ((7, 30), "int32"),
        "stream_start": ((7, 7), "int32"),
        "recent_key": ((7, 3, 2, 4, 8), "float16"),
        "recent_value": ((7, 3, 2, 4, 8), "float16"),
        "recent_log_beta": ((7, 3, 2, 4), "float32"),
        "counters": ((7, 4), "int32"),
    }
