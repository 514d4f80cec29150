"""The two kinds of memory a cache can lie in; device memory is tried on ONNX Runtime's CPU allocator."""

import mmap
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_export.plan import Workload, plan_memory
from trimkv_export.policy import ALIGNMENT, STATE_TENSORS, CacheSpec, plan_slab
from trimkv_export.runtime import Engine
from trimkv_export.runtime import engine as engine_module
from trimkv_export.runtime.cache_memory import CacheMemory, DeviceMemory, HostMemory

SPEC = CacheSpec(num_layers=2, num_kv_heads=3, head_dim=4, budget=5, evict_every=2, kv_dtype="bfloat16")


@pytest.fixture(params=["host", "device"])
def memory(request: pytest.FixtureRequest) -> CacheMemory:
    slab = plan_slab(SPEC, 3)
    return HostMemory(slab) if request.param == "host" else DeviceMemory(slab, "cpu", onnxruntime)


def test_rows_are_written_and_read_alone(memory: CacheMemory) -> None:
    size = SPEC.nbytes()
    payloads = [bytes(np.random.default_rng(row).integers(0, 256, size, np.uint8)) for row in range(3)]
    for row in (2, 0, 1):
        memory.write(row, payloads[row])
    for row in range(3):
        found = memory.read(row)
        assert b"".join(array.tobytes() for array in found.values()) == payloads[row]
        assert [found[t.name].shape for t in SPEC.tensors()] == [t.shape[1:] for t in SPEC.tensors()]
        assert list(memory.read(row, "counters", "pool_key")) == ["counters", "pool_key"]


small = st.integers(1, 9)


@settings(max_examples=50)
@given(small, small, st.integers(1, 64), small, small, st.sampled_from(["float32", "float16", "bfloat16"]), small)
def test_planned_is_allocated_to_the_byte(
    layers: int, heads: int, depth: int, budget: int, interval: int, dtype: str, rows: int
) -> None:
    spec = CacheSpec(layers, heads, depth, budget, interval, dtype)
    planned = plan_memory(Workload(0, spec, lambda *_: 0, batch=rows)).cache_bytes
    with patch("mmap.mmap", wraps=mmap.mmap) as mapped:
        memory = HostMemory(plan_slab(spec, rows))
    (call,) = mapped.call_args_list
    assert call.args == (-1, planned)
    held = sum(array.nbytes for row in range(rows) for array in memory.read(row).values())
    assert held == spec.nbytes(rows)
    assert 0 <= planned - held < ALIGNMENT * len(STATE_TENSORS)


def test_a_reset_empties_one_row(memory: CacheMemory) -> None:
    for row in range(3):
        memory.write(row, b"\x01" * SPEC.nbytes())
    memory.reset(1)
    for row in range(3):
        counters, start = memory.read(row, "counters", "stream_start").values()
        assert (not counters.any() and not start.any()) == (row == 1)


def test_rows_lie_side_by_side(memory: CacheMemory) -> None:
    for tensor in SPEC.tensors():
        steps = {memory.address(tensor.name, row + 1) - memory.address(tensor.name, row) for row in range(2)}
        assert steps == {tensor.nbytes}


def test_an_engine_on_device_memory(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Engine.open(package, max_sessions=2) as host:
        monkeypatch.setattr(engine_module, "HostMemory", lambda slab: DeviceMemory(slab, "cpu", onnxruntime))
        with Engine.open(package, max_sessions=2) as device:
            tokens = list(range(40))
            for engine in (host, device):
                engine.session().step([7])  # so that the next session has another row
            sessions = [host.session(), device.session()]
            for part in (tokens[:16], tokens[16:17], tokens[17:30], tokens[30:31], tokens[31:40]):
                ours, theirs = (session.step(part) for session in sessions)
                assert np.array_equal(ours, theirs)
                assert np.array_equal(sessions[0].kept(), sessions[1].kept())
            sessions[1].save(tmp_path / "saved")
            sessions[1].close()
            restored = device.restore(tmp_path / "saved")
            assert restored.tokens_seen == 40
            assert np.array_equal(restored.step([1]), sessions[0].step([1]))
            restored.reset()
            assert (restored.tokens_seen, restored.evictions, len(restored.kept())) == (0, 0, 0)
