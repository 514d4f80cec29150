from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from trimkv_export.config import Quantization
from trimkv_export.quantization.rounding import SHARES, Adjustment, Rounding, pack, quantize, rounding_error, unpack


def rows(count: int = 6, columns: int = 128, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


def numbers(packed: NDArray[np.generic], bits: int) -> NDArray[np.int64]:
    values = packed.astype(np.int64)
    return values if bits == 8 else np.stack([values % 16, values // 16], -1).reshape(len(values), -1)


def restored(parts: dict[str, NDArray[np.generic]], bits: int, size: int) -> NDArray[np.float64]:
    scales = parts["scales"].astype(np.float64)
    zeros = numbers(parts["qzeros"], bits)[:, : scales.shape[1]] if "qzeros" in parts else np.int64(1 << (bits - 1))
    found = numbers(parts["qweight"], bits).reshape(*scales.shape, size)
    return ((found - np.atleast_2d(zeros)[..., None]) * scales[..., None]).reshape(len(scales), -1)


def by_largest_value(weights: NDArray[np.float32], form: Quantization) -> NDArray[np.float64]:
    """What a block's range gives, without zero points; the formula before scales were of least squares."""
    blocks = weights.astype(np.float64).reshape(len(weights), -1, form.block_size)
    half = 1 << (form.bits - 1)
    step = np.maximum(blocks.max(axis=2) / (half - 1), blocks.min(axis=2) / -half)[..., None].astype(np.float16)
    found = np.clip(np.rint(blocks / step), -half, half - 1) * step.astype(np.float64)
    return np.asarray(found.reshape(weights.shape))


@pytest.mark.parametrize("form", [{}, {"qdq": True}, {"symmetric": False}], ids=str)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_value_is_the_nearest_that_its_scale_has(bits: int, size: int, form: dict[str, Any], dtype: type) -> None:
    weights = rows()
    found = Rounding.of(weights, Quantization(bits, size, **form), np.dtype(dtype))
    assert found.scales.dtype == dtype
    scales, zeros = (part.astype(np.float64)[..., None] for part in (found.scales, found.zeros))
    if form:
        assert (scales > 0).all()  # without zero points the sign says on which side there is one number more
    choices = (np.arange(2**bits) - zeros) * scales
    blocks = weights.reshape(*found.scales.shape, size, 1)
    nearest = np.abs(choices[..., None, :] - blocks).min(axis=-1)
    errors = np.abs(found.values().reshape(blocks.shape[:-1]) - blocks[..., 0])
    np.testing.assert_allclose(errors, nearest, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(
    ("form", "most"), [({}, 0.82), ({"qdq": True}, 0.92), ({"symmetric": False}, 0.75)], ids=["signed", "qdq", "zeros"]
)
def test_less_error_than_by_the_largest_value(form: dict[str, Any], most: float, size: int, dtype: type) -> None:
    weights = rows(200)
    found = Rounding.of(weights, Quantization(4, size, **form), np.dtype(dtype))
    plain = ((by_largest_value(weights, Quantization(4, size)) - weights) ** 2).sum()
    assert ((found.values() - weights) ** 2).sum() < most * plain


@pytest.mark.parametrize("sign", [1, -1])
def test_a_symmetric_block_uses_its_lone_number(sign: int) -> None:
    """The value of largest size is -8 steps, whatever its sign."""
    weights = sign * np.linspace(-8, 7, 32, dtype=np.float32)[None]
    weights[0, 1:-1] = np.rint(weights[0, 1:-1])
    found = Rounding.of(weights, Quantization(4, 32), np.dtype(np.float32))
    assert found.scales.item() == pytest.approx(sign)
    np.testing.assert_allclose(found.values(), weights, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_format_holds_stays_as_it_is(symmetric: bool) -> None:
    """Numbers times a scale: the wheel of a checkpoint that was quantised before, in blocks of this size."""
    random = np.random.default_rng(4)
    whole = random.integers(0, 16, (40, 4, 32)) - (8 if symmetric else random.integers(2, 14, (40, 4, 1)))
    whole[..., 0], whole[..., 1] = whole.min(axis=2), whole.max(axis=2)
    weights = (whole * random.uniform(0.5, 2, (40, 4, 1))).astype(np.float32).reshape(40, 128)
    found = Rounding.of(weights, Quantization(4, 32, symmetric=symmetric), np.dtype(np.float32)).values()
    exact = np.isclose(found, weights, atol=1e-5).reshape(40, 4, 32).all(axis=2)
    assert exact.mean() > 0.4


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_of_one_scale(symmetric: bool) -> None:
    weights = rows()
    weights[2, 70] = 40
    parts = quantize(weights, Quantization(8, 32, per_row=True, symmetric=symmetric), np.dtype(np.float32))
    assert parts["scales"].shape == (6, 4)
    assert (parts["scales"] == parts["scales"][:, :1]).all()
    whole = -40 / 128 if symmetric else (40 - weights[2].min()) / 255
    assert parts["scales"][2, 0] == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_values_too_small_for_the_scale(symmetric: bool) -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1] = 1e-9
    parts = quantize(weights, Quantization(4, 32, symmetric=symmetric), np.dtype(np.float16))
    assert not restored(parts, 4, 32).any()


def test_an_odd_number_of_zero_points() -> None:
    found = pack(np.array([[1, 2, 3]], np.uint8), 4)
    assert found.tolist() == [[0x21, 0x03]]
    parts = quantize(rows(columns=96), Quantization(4, 32, symmetric=False), np.dtype(np.float32))
    assert parts["qzeros"].shape == (6, 2)


def weighted_errors(
    weights: NDArray[np.float32], importance: NDArray[np.float32], form: Quantization, *, by: bool
) -> float:
    """Of all rows, rounded with importance or without."""
    found = Rounding.of(weights, form, np.dtype(np.float32), importance if by else None).values()
    return float(((found - weights) ** 2 * importance).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_that_count_more_have_less_error(symmetric: bool) -> None:
    weights, importance = rows(40, seed=1), np.abs(rows(1, seed=2)[0])
    weights[:, 5] = 4
    importance[5] = 1e-3
    form = Quantization(4, 32, symmetric=symmetric)
    plain, weighted = (weighted_errors(weights, importance, form, by=by) for by in (False, True))
    assert weighted < 0.9 * plain
    found = rounding_error(weights, form, np.dtype(np.float32), importance)
    assert found == pytest.approx(weighted, rel=1e-4)


def test_columns_that_do_not_count_at_all() -> None:
    weights, importance = rows(), np.zeros(128, np.float32)
    for symmetric in (True, False):
        found = Rounding.of(weights, Quantization(4, 32, symmetric=symmetric), np.dtype(np.float16), importance)
        assert np.abs(found.values() - weights).max() < 0.6


def test_shares_are_of_the_range() -> None:
    assert SHARES[0] == 1
    assert min(SHARES) > 0.5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_unpacked_numbers_are_what_was_packed(bits: int, signed: bool) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << bits, (3, 7)).astype(np.uint8)
    found = unpack(pack(numbers, bits, signed=signed), bits, signed=signed)
    np.testing.assert_array_equal(found[:, :7], numbers)


def test_adjusted_parts_of_a_tensor() -> None:
    weights, scales = rows(), np.arange(1, 7, dtype=np.float32)
    columns = np.linspace(1, 2, 128, dtype=np.float32)
    whole = Adjustment(rows=scales, columns=columns)
    parts = np.concatenate([whole.apply(weights[start : start + 2], start) for start in (0, 2, 4)])
    np.testing.assert_array_equal(parts, weights * scales[:, None] * columns)
    np.testing.assert_array_equal(Adjustment().apply(weights, 0), weights)
