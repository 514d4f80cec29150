"""Rounding with error feedback, against its definition."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trimkv_export.config import Quantization
from trimkv_export.quantization import gptq
from trimkv_export.quantization.gptq import DAMPING, SHRINKAGE, add_products, factorize, round_with_feedback
from trimkv_export.quantization.rounding import Rounding

FORMS = [
    Quantization(4, 32), Quantization(4, 32, symmetric=False), Quantization(4, 64, qdq=True),
    Quantization(8, 32, per_row=True), Quantization(8, 64, symmetric=False),
]  # fmt: skip
HALF = np.dtype(np.float16)


def inputs(columns: int = 192, tokens: int = 900) -> NDArray[np.float32]:
    """Channels of different sizes that go together, one of which is never active."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((columns, columns)) / 12 + np.diag(random.uniform(0.1, 3, columns))
    out = (random.standard_normal((tokens, columns)) @ mixing).astype(np.float32)
    out[:, 7] = 0
    return out


def rows(columns: int = 192) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((40, columns)).astype(np.float32)


def products(x: NDArray[np.float32]) -> NDArray[np.float32]:
    total = np.zeros((x.shape[1], x.shape[1]), np.float32)
    for start in range(0, len(x), 100):
        add_products(total, x[start : start + 100])
    return total


@pytest.mark.parametrize("panel", [16, 100, 256])
def test_the_factor_is_that_of_the_damped_products(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "PANEL", panel)
    x = inputs()
    np.testing.assert_allclose(products(x), x.T @ x, rtol=1e-4, atol=1e-2)
    given = products(x)
    factor = factorize(given, len(x))
    assert factor is given
    upper = np.triu(factor).astype(np.float64)
    expected = (x.astype(np.float64).T @ x) * (1 + (DAMPING + SHRINKAGE * x.shape[1] / len(x)) * np.eye(x.shape[1]))
    active = np.flatnonzero(x.any(axis=0))
    np.testing.assert_allclose((upper @ upper.T)[np.ix_(active, active)], expected[np.ix_(active, active)], atol=2e-2)


def test_products_that_float32_leaves_indefinite() -> None:
    """Channels that are all the same: only the damping tells them apart."""
    x = np.tile(np.random.default_rng(0).standard_normal((50, 1)).astype(np.float32) * 1e3, (1, 512))
    factor = factorize(products(x), len(x))
    assert np.isfinite(np.triu(factor)).all()
    assert (factor.diagonal() > 0).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_output_is_closer_than_without_feedback(form: Quantization) -> None:
    x, weights = inputs(), rows()
    factor = factorize(products(x), len(x))
    plain = Rounding.of(weights, form, HALF, (x**2).mean(axis=0)).values()
    found = round_with_feedback(weights, factor, form, HALF).values()
    errors = [float((((values - weights) @ x.T) ** 2).sum()) for values in (plain, found)]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_without_correlation_it_is_least_squares(form: Quantization) -> None:
    """Nothing is to be taken back."""
    weights = rows()
    found = round_with_feedback(weights, factorize(np.eye(192, dtype=np.float32), 1000), form, HALF)
    plain = Rounding.of(weights, form, HALF)
    # Zero points that are equally good may be different ones.
    same = [np.isclose(getattr(found, name), getattr(plain, name)).mean() for name in ("numbers", "scales", "zeros")]
    assert min(same) > 0.97
    errors = [float(((each.values() - weights) ** 2).sum()) for each in (found, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_each_number_is_of_its_definition() -> None:
    """Column after column, from R by NumPy's own Cholesky factor of the turned matrix."""
    x, weights, form = inputs(64), rows(64), Quantization(4, 32)
    damped = (x.astype(np.float64).T @ x) * (1 + (DAMPING + SHRINKAGE * 64 / len(x)) * np.eye(64))
    damped[7, 7] = 1
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    found = round_with_feedback(weights, factorize(products(x), len(x)), form, HALF)
    values, scales = found.values().astype(np.float64), found.scales.astype(np.float64)
    off = 0
    for column in range(64):
        ahead = upper[:column, column] / upper[column, column]
        target = weights[:, column] + (weights[:, :column] - values[:, :column]) @ ahead
        step = scales[:, column // 32]
        nearest = np.clip(np.rint(target / step), -8, 7) * step
        off += int((np.abs(nearest - values[:, column]) > 1e-6).sum())
    assert off < 0.01 * values.size  # where it lies between two numbers


def test_a_matrix_in_parts_is_the_same() -> None:
    factor, form = factorize(products(inputs()), 900), Quantization(4, 32, symmetric=False)
    whole = round_with_feedback(rows(), factor, form, HALF).values()
    parts = [round_with_feedback(rows()[start : start + 10], factor, form, HALF).values() for start in range(0, 40, 10)]
    assert np.isclose(np.concatenate(parts), whole).mean() > 0.99  # products of other sizes round in other orders
