"""Kept factors against float64, and exact factors in one of several updates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from benchmarks import hlo
from tests import problems
from tests.references import polar as reference
from tests.transforms import histories


def cached(grads, h, refresh):
    """The factor of one update in `refresh`, by SVD, times unit matrices."""
    outs, factor = [], None
    for t, g in enumerate(grads):
        unit = g / np.linalg.norm(g)
        if t % refresh == 0:
            u, s, vt = np.linalg.svd(unit)
            scale = np.sum(s**4) ** 0.25
            s = s / scale
            basis = u if g.shape[0] <= g.shape[1] else vt.T
            factor = (basis * (h(s) / s / scale)) @ basis.T
        outs.append(factor @ unit if g.shape[0] <= g.shape[1] else unit @ factor)
    return np.stack(outs)


ZOLOTAREV = om.Zolotarev(0.03)


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize(
    "method, h",
    [
        (om.Halley(0.1), lambda s: reference.halley_map(s, 0.1)),
        # Tested in tests/linalg/test_rational.py.
        (ZOLOTAREV, ZOLOTAREV.maps[0]),
    ],
)
def test_matches_float64_reference(method, h, refresh):
    grads = histories.gradients(histories.SHAPES)
    got, _ = histories.of(om.orthogonalize_cached(method, refresh=refresh), grads)
    for name, found, own in histories.pairs(got, grads):
        histories.close(found, cached(own, h, refresh), 1e-9, name)


@pytest.mark.parametrize(
    "method",
    [om.Halley(), pytest.param(om.Halley(0.1, polish=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_renewed_in_every_update_it_is_the_method(method):
    grads = histories.gradients(histories.SHAPES, 3)
    got, _ = histories.of(om.orthogonalize_cached(method, refresh=1), grads)
    want, _ = histories.of(om.orthogonalize(method), grads)
    chex.assert_trees_all_close(got, want, atol=1e-11)


def test_the_state_is_a_matrix_of_the_smaller_side_and_the_scale_does_not_matter():
    tx, params = om.orthogonalize_cached(), {"w": problems.normal((4, 9))}
    state = tx.init(params)
    assert state.matrices["4x9"].state.shape == (1, 4, 4)
    rows = om.describe_state(tx, params).rows
    # A factor, and the number of the matrix.
    assert rows[0].state_bytes == 4 * 4 * 4 + 4
    want, state = tx.update(params, state)
    for scale in (1e-30, 1e30):
        scaled = jax.tree.map(lambda x, s=scale: x * jnp.float32(s), params)
        got, _ = tx.update(scaled, state)
        chex.assert_trees_all_close(got, want, atol=1e-5)


def test_a_nan_is_not_kept():
    tx, good = om.orthogonalize_cached(refresh=2), problems.normal((4, 3))
    state = tx.init(good)
    _, state = tx.update(good, state)
    want, state = tx.update(good, state)
    bad, state = tx.update(good.at[1, 1].set(jnp.nan), state)
    assert jnp.isnan(bad).all()
    got, state = tx.update(good, state)
    np.testing.assert_allclose(got, want, atol=1e-6)
    zero, state = tx.update(jnp.zeros_like(good), state)
    assert not zero.any()
    got, _ = tx.update(good, state)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_matrix_without_a_factor_gets_one_from_its_first_usable_update():
    x = problems.normal((3, 4, 3))
    # Zero, NaN and subnormal, which is flushed to zero; the fourth has a factor.
    first = jnp.stack([0 * x[0], x[1] * jnp.nan, x[2] * 1e-40, x[0]])
    x = jnp.concatenate([x, 2 * x[:1] + x[1:2]])
    tx = om.orthogonalize_cached(refresh=10)
    update = jax.jit(tx.update)
    _, state = update(first, tx.init(first))
    factors = state.matrices["4x3"].state
    assert not factors[:3].any() and factors[3].any()
    got, state = update(x, state)
    want, _ = update(x, tx.init(x))
    np.testing.assert_allclose(got[:3], want[:3], atol=1e-6)
    # Not due, so the fourth keeps its own.
    np.testing.assert_array_equal(state.matrices["4x3"].state[3], factors[3])
    np.testing.assert_array_equal(
        update(x, state)[1].matrices["4x3"].state[:3], state.matrices["4x3"].state[:3]
    )


def test_factors_of_another_dtype_are_stored_in_that_of_the_leaf():
    x = problems.normal((4, 9))
    with jax.enable_x64(True):
        tx = om.orthogonalize_cached(om.Halley(dtype="float64"))
        got, state = tx.update(x, tx.init(x))
    want = reference.halley(x, 1e-2)
    assert state.matrices["4x9"].state.dtype == got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "method, slope, full, low",
    [
        (om.Halley(), 54.3, 4.7, 38.4),
        pytest.param(om.Halley(0.1), 11.85, 4.6, 9.0, marks=pytest.mark.slow),
    ],
)
def test_stale_updates_are_as_large_as_the_docstring_says(method, slope, full, low):
    tx = optax.chain(
        optax.trace(0.95, nesterov=True), om.orthogonalize_cached(method, refresh=5)
    )
    rng, norms = np.random.default_rng(0), []
    state, update = tx.init(jnp.zeros((2, 16, 24))), jax.jit(tx.update)
    for t in range(60):
        column, row = rng.normal(size=(16, 1)), rng.normal(size=(1, 24))
        grads = np.stack([rng.normal(size=(16, 24)), column * row])
        got, state = update(jnp.asarray(grads, jnp.float32), state)
        if t > 10:
            norms.append(np.linalg.norm(got, 2, axis=(-2, -1)))
    np.testing.assert_allclose(np.max(norms, axis=0), [full, low], rtol=0.05)
    assert np.max(norms[4::5]) < 1 + 1e-4  # refreshed
    # The bound is attained: a direction that was zero, and three equal ones.
    tx = om.orthogonalize_cached(method)
    only = jnp.diag(jnp.array([0.0, 0.0, 0.0, 1.0]))
    _, state = tx.update(jnp.eye(4) - only, tx.init(only))
    got, _ = tx.update(only, state)
    np.testing.assert_allclose(got[3, 3], slope * 3**0.25, rtol=1e-3)


def test_names_are_default_settings():
    x = problems.normal((4, 9))
    for name, method in (("halley", om.Halley()), ("zolotarev", om.Zolotarev())):
        got, _ = problems.unroll(om.orthogonalize_cached(name), [x])
        want, _ = problems.unroll(om.orthogonalize_cached(method), [x])
        np.testing.assert_array_equal(got, want)


def test_factors_lie_with_owners_and_move_once():
    # Sharded, the factors are those of each device's own matrices.
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    params = {f"w{i}": problems.normal((8, 16), i) for i in range(8)}
    tx = om.orthogonalize_cached()
    want, _ = tx.update(params, tx.init(params))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("x", None))
        placed = jax.tree.map(lambda x: jax.device_put(x, sharding), params)
        state = tx.init(placed)
        assert state.matrices["8x16"].state.sharding.spec == P(("x",), None, None)
        update = jax.jit(tx.update)
        got, _ = update(placed, state)
        text = update.lower(placed, state).compile().as_text()
    chex.assert_trees_all_close(got, want, atol=1e-5)
    assert [c.kind for c in hlo.collectives(text)] == ["all-to-all"] * 2


def test_bad_arguments_raise():
    with pytest.raises(TypeError, match="`method` must be a `Halley` or `Zolotarev`"):
        om.orthogonalize_cached(om.NewtonSchulz())  # type: ignore
    with pytest.raises(ValueError, match="`method` must have one step"):
        om.orthogonalize_cached(om.Halley(steps=2))
    with pytest.raises(ValueError, match="`method` must be one of 'halley', 'zolota"):
        om.orthogonalize_cached("mud")  # type: ignore
    for name, factory in (
        ("refresh", om.orthogonalize_cached),
        ("every", om.svd_supplement),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
            factory(**{name: 0})
        with pytest.raises(TypeError, match=f"`{name}` must be an int"):
            factory(**{name: 1.5})


def test_svd_supplement_is_exact_in_one_of_several_updates():
    grads = histories.gradients(histories.SHAPES, 7)
    tx = optax.chain(om.orthogonalize("mud"), om.svd_supplement(every=3))
    got, _ = histories.of(tx, grads)
    for name, found, own in histories.pairs(got, grads):
        want = [reference.mud(g) for g in own]
        want[::3] = [reference.polar(g) for g in want[::3]]
        histories.close(found, np.stack(want), 1e-10, name)
