import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from trimkv_export.config import Quantization
from trimkv_export.quantization.rounding import CLIPS, Adjustment, pack, quantize, rounding_error


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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_no_value_is_off_by_more_than_half_a_step(bits: int, size: int, symmetric: bool, dtype: type) -> None:
    weights = rows()
    parts = quantize(weights, Quantization(bits, size, symmetric=symmetric), np.dtype(dtype))
    assert parts["scales"].dtype == dtype
    assert (parts["scales"].astype(np.float64) > 0).all()
    assert parts["qweight"].shape == (6, 128 * bits // 8)
    step = np.repeat(parts["scales"].astype(np.float64), size, 1)
    # A zero point is a whole number, and a scale is rounded: the ends may be cut by a part of a step.
    slack = 0.5 + (0 if symmetric else 0.5) + 2**bits * float(ml_dtypes.finfo(dtype).eps)
    assert (np.abs(restored(parts, bits, size) - weights) <= slack * step).all()


def test_all_numbers_of_a_symmetric_block_are_used() -> None:
    weights = np.linspace(-8, 7, 32, dtype=np.float32)[None]
    parts = quantize(weights, Quantization(4, 32), np.dtype(np.float32))
    assert parts["scales"].item() == 1
    assert set(numbers(parts["qweight"], 4)[0]) == set(range(16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_of_one_scale(symmetric: bool) -> None:
    weights = rows()
    weights[2, 70] = 40
    parts = quantize(weights, Quantization(8, 32, per_row=True, symmetric=symmetric), np.dtype(np.float32))
    assert parts["scales"].shape == (6, 4)
    assert (parts["scales"] == parts["scales"][:, :1]).all()
    assert parts["scales"][2, 0] == pytest.approx(40 / 127 if symmetric else (40 - weights[2].min()) / 255)


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


def weighted_error(
    weights: NDArray[np.float32], importance: NDArray[np.float32], form: Quantization, *, cut: bool
) -> NDArray[np.float64]:
    """Of each block [R, K / size]."""
    parts = quantize(weights, form, np.dtype(np.float32), importance if cut else None)
    errors = (restored(parts, form.bits, form.block_size) - weights) ** 2 * importance
    return np.asarray(errors.reshape(len(weights), -1, form.block_size).sum(axis=2))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_cutting_ranges_makes_no_block_worse(bits: int, symmetric: bool) -> None:
    weights, importance = rows(40, seed=1), np.abs(rows(1, seed=2)[0])
    weights[:, 5] = 4
    importance[5] = 1e-3
    form = Quantization(bits, 32, symmetric=symmetric)
    nearest, cut = (weighted_error(weights, importance, form, cut=cut) for cut in (False, True))
    assert (cut <= nearest * (1 + 1e-5)).all()
    if bits == 4:
        assert cut[:, 0].sum() < 0.8 * nearest[:, 0].sum()  # the large value counts for little
    found = rounding_error(weights, form, np.dtype(np.float32), importance)
    assert found == pytest.approx(nearest.sum(), rel=1e-4)


def test_the_share_of_each_block_is_one_of_those_tried() -> None:
    weights = rows(20)
    form = Quantization(4, 32)
    whole, cut = (quantize(weights, form, np.dtype(np.float32), given)["scales"] for given in (None, np.ones(128, "f")))
    shares = cut.astype(np.float64) / whole.astype(np.float64)
    nearest = np.abs(shares[..., None] - np.array([1, *CLIPS])).min(axis=2)
    assert nearest.max() < 1e-5
    assert len(np.unique(shares.round(3))) > 2


def test_a_row_of_one_scale_is_cut_as_a_whole() -> None:
    weights = rows()
    weights[2, 70] = 40
    importance = np.ones(128, np.float32)
    importance[70] = 0
    found = quantize(weights, Quantization(8, 32, per_row=True), np.dtype(np.float32), importance)["scales"]
    assert (found == found[:, :1]).all()
    assert found[2, 0] == pytest.approx(min(CLIPS) * 40 / 127)


def test_adjusted_parts_of_a_tensor() -> None:
    weights, scales = rows(), np.arange(1, 7, dtype=np.float32)
    columns = np.linspace(1, 2, 128, dtype=np.float32)
    whole = Adjustment(rows=scales, columns=columns)
    parts = np.concatenate([whole.apply(weights[start : start + 2], start) for start in (0, 2, 4)])
    np.testing.assert_array_equal(parts, weights * scales[:, None] * columns)
    np.testing.assert_array_equal(Adjustment().apply(weights, 0), weights)
