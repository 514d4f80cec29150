import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_export.policy import ALIGNMENT, STATE_TENSORS, CacheSpec, plan_slab

small = st.integers(1, 12)


@given(small, small, small, small, small, st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(1, 4))
def test_entries_are_aligned_and_apart(
    layers: int, heads: int, depth: int, budget: int, interval: int, dtype: str, rows: int
) -> None:
    cache = CacheSpec(layers, heads, depth, budget, interval, dtype)
    slab = plan_slab(cache, rows)
    assert tuple(entry.name for entry in slab.entries) == STATE_TENSORS
    end = 0
    for entry, tensor in zip(slab.entries, cache.tensors(rows), strict=True):
        assert entry.offset % ALIGNMENT == 0
        assert 0 <= entry.offset - end < ALIGNMENT
        assert (entry.shape, entry.dtype, entry.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)
        assert entry.row_bytes * rows == entry.nbytes
        end = entry.offset + entry.nbytes
    assert 0 <= slab.nbytes - end < ALIGNMENT
    assert 0 <= slab.nbytes - cache.nbytes(rows) < ALIGNMENT * len(STATE_TENSORS)


def test_the_plan_is_json() -> None:
    slab = plan_slab(CacheSpec(2, 2, 4, 8, 4))
    content = json.loads(json.dumps(slab.as_dict()))
    assert content["nbytes"] == slab.nbytes
    assert content["entries"][1] == {
        "name": "pool_value",
        "shape": [1, 32, 4],
        "dtype": "float32",
        "offset": 512,
        "nbytes": 512,
        "row_bytes": 512,
    }


@pytest.mark.parametrize("module", ["plan", "policy", "package"])
def test_imports_no_framework(module: str) -> None:
    code = f"import sys, trimkv_export.{module}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"onnx", "onnxruntime", "torch", "transformers", "ml_dtypes", "tokenizers"} & set(found)
