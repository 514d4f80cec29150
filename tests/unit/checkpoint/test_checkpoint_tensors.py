import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimkv_export.checkpoint.tensors import TensorInfo, numpy_dtype
from trimkv_export.dtypes import ITEM_BYTES
from trimkv_export.errors import CheckpointError, MissingDependencyError


def test_item_bytes_are_numpys() -> None:
    assert {name: numpy_dtype(name).itemsize for name in ITEM_BYTES} == ITEM_BYTES


def test_read_takes_the_range(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"\xff" * 3 + np.arange(6, dtype="<f4").tobytes() + b"\xff")
    np.testing.assert_array_equal(
        TensorInfo("a", "float32", (2, 3), file, 3, 24).read(), np.arange(6.0, dtype=np.float32).reshape(2, 3)
    )
    assert TensorInfo("b", "float32", (), file, 7, 4).read() == 1.0
    assert TensorInfo("c", "float16", (0, 5), file, 3, 0).read().shape == (0, 5)


def test_read_of_a_file_that_shrank(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match=r"'a' has 6 of its 8 bytes"):
        TensorInfo("a", "float32", (2,), file, 4, 8).read()


def test_read_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
        TensorInfo("a", "float32", (2,), tmp_path / "gone", 0, 8).read()


def test_bfloat16_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ml_dtypes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trimkv-export\[export\]'"):
        numpy_dtype("bfloat16")
