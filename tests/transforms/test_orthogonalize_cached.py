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


def cached(grads, h, every):
    """The factor of one update in `every`, by SVD, times unit matrices."""
    outs, factor = [], None
    for t, g in enumerate(grads):
        unit = g / np.linalg.norm(g)
        if t % every == 0:
            u, s, _ = np.linalg.svd(unit)
            v = np.linalg.svd(unit)[2].T
            s = s / np.sum(s**4) ** 0.25
            basis = u if g.shape[0] <= g.shape[1] else v
            scale = np.sum(np.linalg.svd(unit)[1] ** 4) ** 0.25
            factor = (basis * (h(s) / s / scale)) @ basis.T
        outs.append(factor @ unit if g.shape[0] <= g.shape[1] else unit @ factor)
    return np.stack(outs)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("method", [om.Halley(0.1), om.Zolotarev(0.03)], ids=str)
def test_matches_float64_reference(method, every):
    grads = histories.gradients(histories.SHAPES)
    got, _ = histories.of(om.orthogonalize_cached(method, every=every), grads)
    for name, found, own in histories.pairs(got, grads):
        histories.close(found, cached(own, method.maps[0], every), 1e-9, name)


@pytest.mark.parametrize("method", [om.Halley(), om.Halley(0.1, polish=2)], ids=str)
def test_renewed_in_every_update_it_is_the_method(method):
    grads = histories.gradients(histories.SHAPES, 3)
    got, _ = histories.of(om.orthogonalize_cached(method, every=1), grads)
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
    tx, good = om.orthogonalize_cached(every=2), problems.normal((4, 3))
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
    for factory in (om.orthogonalize_cached, om.svd_supplement):
        with pytest.raises(ValueError, match="`every` must be at least 1"):
            factory(every=0)
        with pytest.raises(TypeError, match="`every` must be an int"):
            factory(every=1.5)


def test_svd_supplement_is_exact_in_one_of_several_updates():
    grads = histories.gradients(histories.SHAPES, 7)
    tx = optax.chain(om.orthogonalize("mud"), om.svd_supplement(every=3))
    got, _ = histories.of(tx, grads)
    for name, found, own in histories.pairs(got, grads):
        want = [reference.mud(g) for g in own]
        want[::3] = [reference.polar(g) for g in want[::3]]
        histories.close(found, np.stack(want), 1e-10, name)
