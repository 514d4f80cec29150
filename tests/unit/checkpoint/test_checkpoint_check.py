from pathlib import Path

import pytest

from trimkv_export.checkpoint.check import check_tensors, quote_some
from trimkv_export.checkpoint.tensors import TensorInfo
from trimkv_export.errors import CheckpointError

WHERE = Path("model")


def info(name: str, shape: tuple[int, ...], dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name, dtype, shape, WHERE, 0, 0)


def found(*names: str) -> dict[str, TensorInfo]:
    return {name: info(name, (2,)) for name in names}


def test_exact_match_passes() -> None:
    check_tensors(found("a", "b"), {"a": (2,), "b": (2,)}, where=WHERE)
    check_tensors(found("a", "inv_freq"), {"a": (2,)}, where=WHERE, ignore=lambda name: name == "inv_freq")


def test_missing_and_unexpected_are_both_named() -> None:
    with pytest.raises(CheckpointError, match=r"^model: missing 'b', 'c'; unexpected 'x': "):
        check_tensors(found("a", "x"), {"a": (2,), "b": (2,), "c": (2,)}, where=WHERE)


def test_many_names_are_cut() -> None:
    assert quote_some("abcde") == "'a', 'b', 'c', 'd', 'e'"
    assert quote_some("abcdefgh") == "'a', 'b', 'c', 'd', 'e' and 3 more"


def test_shape() -> None:
    with pytest.raises(CheckpointError, match=r"wrong shape: 'a' is \[2\], expected \[3, 2\]"):
        check_tensors(found("a"), {"a": (3, 2)}, where=WHERE)


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn"])
def test_dtype(dtype: str) -> None:
    with pytest.raises(CheckpointError, match=rf"wrong dtype: 'a' is {dtype}: .*float32, float16, bfloat16"):
        check_tensors({"a": info("a", (2,), dtype)}, {"a": (2,)}, where=WHERE)
