"""Rows from a bound: optimal, and what their users are told of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_matrix._linalg import NewtonSchulz, minimax, polar_express_rows
from tests.linalg.problems import matrix, run
from tests.references import polar as reference


def compose(rows, s):
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("bound", [1e-4, 1e-2, 0.3, 0.9])
def test_every_row_is_the_best_for_what_the_ones_before_leave(bound):
    low, high = bound, 1.0
    for row in polar_express_rows(bound, 4):
        if 1 - low < 1e-2:
            break
        s = np.linspace(low, high, 200_001)
        mapped = compose([row], s)
        error = np.abs(1 - mapped).max()
        # Chebyshev's criterion: four alternating extrema of the error.
        inner = np.flatnonzero(np.diff(np.sign(np.diff(mapped)))) + 1
        extrema = mapped[[0, *inner, -1]] - 1
        np.testing.assert_allclose(extrema, error * np.array([-1, 1, -1, 1]), atol=1e-9)
        low, high = 1 - error, 1 + error


@pytest.mark.parametrize("bound, steps, error", [(0.03, 3, 0.036), (1e-3, 5, 0.114)])
def test_the_composition_keeps_its_bounds(bound, steps, error):
    rows = polar_express_rows(bound, steps)
    inside = compose(rows, np.geomspace(bound, 1, 10_001))
    assert np.abs(1 - inside).max() == pytest.approx(error, abs=1e-3)
    below = compose(rows, np.geomspace(1e-9, bound, 1001))
    assert below.min() > 0 and below.max() < 1 + error + 1e-3


@pytest.mark.parametrize("bound", [1.0, 1 - 1e-9, 1 - 1e-5, 0.999])
def test_narrow_intervals(bound):
    rows = polar_express_rows(bound, 6)
    assert np.isfinite(rows).all()
    assert np.abs(1 - compose(rows, np.linspace(bound, 1, 11))).max() < 1e-10


def test_the_exchange_converges_for_all_bounds():
    # Rows between narrow and wide intervals, where the exchange is least accurate.
    bounds = [*np.geomspace(1e-9, 0.5, 100), *(1 - np.geomspace(1e-5, 0.5, 200))]
    for bound in bounds:
        rows = polar_express_rows(bound, 8)
        assert np.isfinite(rows).all()
        if bound > 1e-3:
            mapped = compose(rows, np.geomspace(bound, 1, 11))
            np.testing.assert_allclose(mapped, 1, atol=1e-14)


def test_what_does_not_converge_raises(monkeypatch):
    monkeypatch.setattr(minimax, "_EXCHANGES", 1)
    with pytest.raises(RuntimeError, match=r"No best quintic found for \[0.1, 1.0\]"):
        polar_express_rows(0.1, 1)


def test_the_quintic_of_narrow_intervals_has_the_stated_error():
    (row,) = polar_express_rows(1 - 0.999e-3, 1)
    assert row[0] == pytest.approx(15 / 8, rel=1e-3)
    error = np.abs(1 - compose([row], np.linspace(1 - 0.999e-3, 1, 1001))).max()
    assert error == pytest.approx(5 / 16 * 0.999e-9, rel=1e-2)


def test_first_row_is_the_published_one():
    # The paper's listing, made for 1e-3, designs a row for no wider interval than this,
    # and then centres what it maps [1e-3, 1] onto.
    (row,) = polar_express_rows(0.02407327424182761, 1)
    low, high = compose([row], np.array([1e-3, 1.0]))
    centred = np.array(row) * 2 / (low + high)
    want = reference.PUBLISHED["polar_express"][0]
    np.testing.assert_allclose(centred, want, rtol=1e-12)


def test_on_the_gram_side_they_take_two_products_with_the_long_side():
    rows = polar_express_rows(0.03, 3)
    method = NewtonSchulz(
        coefficients=rows, method="gram", normalization="schatten4", precision="highest"
    )
    m, n = 16, 64
    # And three squares and two times three products of the short side.
    assert method.flops(m, n, "float32", "cpu") == 2 * 2 * m * m * n + 9 * 2 * m**3
    x = matrix(m, n, 20.0)
    with jax.enable_x64(True):
        got = run(method, jnp.asarray(x))
    want = reference.newton_schulz(x, rows, "schatten4")
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("bound", [0.0, 1.1, float("nan"), -1])
def test_bad_bound_raises(bound):
    with pytest.raises(ValueError, match=r"`lower_bound` must lie in \(0, 1\]"):
        polar_express_rows(bound, 3)


def test_bad_types_raise():
    with pytest.raises(TypeError, match="`steps` must be an int"):
        polar_express_rows(0.1, 2.0)  # type: ignore
    with pytest.raises(TypeError, match="`lower_bound` fixes the program"):
        polar_express_rows(jnp.ones(()), 2)  # type: ignore
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        polar_express_rows(0.1, 0)
