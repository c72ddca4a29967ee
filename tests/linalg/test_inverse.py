"""The inverse by Cholesky: whole and shared by parts, against float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from optax_matrix._linalg import WHOLE, Halley, Parts, halley_flops
from optax_matrix._linalg.inverse import inverse_flops, inverse_traffic, spd_inverse
from tests.linalg.problems import gaussian
from tests.references import polar as reference

# Of one panel, two of equal and of unequal sides, three to six; more parts than rows.
SHARED = [(4, 2), (6, 8), (7, 5), (1, 9), (21, 17), (12, 64), (30, 128)]


def shared(count):
    """Parts that are mapped over an axis of one device."""

    def own(x):
        rows = -(-x.shape[-2] // count)
        missing = rows * count - x.shape[-2]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])
        first = lax.axis_index("parts") * rows
        return lax.dynamic_slice_in_dim(x, first, rows, axis=-2)

    def gather(x, rows):
        whole = lax.all_gather(x, "parts", axis=x.ndim - 2, tiled=True)
        return whole[..., :rows, :]

    total = partial(lax.psum, axis_name="parts")
    return Parts(count, total, partial(lax.pmax, axis_name="parts"), own, gather)


def inverse(a, parts=1):
    """What every part gets, stacked."""
    a = jnp.asarray(a)
    if parts == 1:
        return jax.jit(lambda a: spd_inverse(a, "highest", WHOLE)[None])(a)
    one = partial(spd_inverse, precision="highest", parts=shared(parts))
    every = jax.vmap(lambda a, _: one(a), (None, 0), axis_name="parts")
    return jax.jit(every)(a, jnp.arange(parts))


def spd(m, condition, seed=0):
    rng = np.random.default_rng(seed)
    values = np.geomspace(1.0, 1.0 / condition, m) if m > 1 else np.ones(1)
    turn = reference.with_spectrum(rng, m, m, np.ones(m))
    return turn * values @ turn.T


@pytest.mark.parametrize("m, parts", [(6, 1), *SHARED])
def test_is_the_inverse_for_every_part(m, parts):
    a = np.stack([spd(m, 100.0, seed) for seed in range(2)])
    with jax.enable_x64(True):
        found = np.asarray(inverse(a, parts))
    assert found.shape == (parts, 2, m, m)
    np.testing.assert_allclose(
        found, np.broadcast_to(np.linalg.inv(a), found.shape), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("parts", [1, 8, 128])
def test_float32_is_as_exact_in_panels(parts):
    a = spd(48, 1e4).astype("float32")
    (found, *_) = np.asarray(inverse(a, parts), "float64")
    off = found @ a.astype("float64") - np.eye(48)
    # Condition times 2⁻²⁴, and a little for 48 sums.
    assert np.abs(off).max() < 3e-4


@pytest.mark.parametrize("parts", [1, 8, 128])
def test_only_the_lower_triangle_is_read(parts):
    a = spd(14, 10.0).astype("float32")
    found = inverse(np.tril(a) + np.triu(gaussian(a.shape), 1).astype("float32"), parts)
    chex.assert_trees_all_equal(found, inverse(a, parts))


@pytest.mark.parametrize("parts", [1, 8, 128])
def test_nan_where_it_is_not_positive_definite_and_only_there(parts):
    a = np.stack([np.eye(14, dtype="float32")] * 5)
    for i, (where, what) in enumerate([(0, -1), (7, -1), (13, -1), (13, np.nan)], 1):
        a[i, where, where] = what
    found = np.asarray(inverse(a, parts))
    np.testing.assert_allclose(found[:, 0], a[:1].repeat(parts, axis=0))
    assert np.isnan(found[:, 1:]).all()


@pytest.mark.parametrize("precision, whole", [("highest", 2), (None, 0)])
def test_parts_factorize_at_the_highest_precision(precision, whole):
    def text(parts):
        one = partial(spd_inverse, precision=precision, parts=parts)
        many = jax.vmap(one, axis_name="parts")
        return str(jax.make_jaxpr(many)(jnp.ones((8, 16, 16))))

    # Of both operands of the one product, and of those of two panels.
    assert text(WHOLE).count("Precision.HIGHEST") == whole
    assert text(WHOLE).count("dot_general") == 1
    assert text(shared(8)).count("dot_general") == 2
    assert text(shared(8)).count("Precision.HIGHEST") == 4


def test_costs_by_hand():
    assert inverse_flops(16) == 16**3 // 3 + 3 * 16**3
    # Two panels of 8: their blocks; 1 row of each product with 8 columns, of which the
    # first panel has none; 1 row to solve for below; two solves for 2 columns.
    flops = 2 * (8**3 // 3) + 2 * 1 * 8 * 8 + 1 * 8**2 + 2 * 2 * 16**2
    assert inverse_flops(16, 8) == flops == 1556
    # Below the first block, the second block, the inverse, from seven others.
    moved = 7 * 4 * (1 * 8 + 1 * 8 + 2 * 16)
    assert inverse_traffic(16, 8, "float32") == (0, 3, moved)
    assert inverse_traffic(16, 8, "float64") == (0, 3, 2 * moved)
    # A step also sums a Gram matrix, 2 · 7/8 of it each.
    told = Halley(steps=3).traffic(16, 40, 8, "float32")
    assert told == (3, 3 * 3, 3 * (moved + 2 * 7 * 4 * 16 * 16 // 8))


@pytest.mark.parametrize(
    "parts, panels",
    [(2, 1), (4, 1), (5, 2), (16, 2), (17, 3), (64, 4), (65, 5), (1024, 16)],
)
def test_number_of_panels(parts, panels):
    assert inverse_traffic(4096, parts, "float32").gathers == 2 * panels - 1
    assert inverse_traffic(1, parts, "float32").gathers == 1


@pytest.mark.parametrize("side", [4096, 5120, 8192])
def test_every_part_of_a_square_matrix_has_at_most_a_tenth_more(side):
    for parts in (2**i for i in range(11)):
        even = halley_flops(side, side, 1) / parts
        assert halley_flops(side, side, 1, parts) <= 1.1 * even
        assert inverse_flops(side, parts) <= 1.25 * inverse_flops(side) / parts
