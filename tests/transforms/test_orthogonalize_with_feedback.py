"""orthogonalize_with_feedback: what an update leaves out stays in the momentum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import optax_matrix as om
from tests import problems
from tests.references import optimizers as reference
from tests.transforms import histories

SHAPES = {"tall": (7, 5), "wide": (5, 8), "square": (4, 4), "stack": (2, 6, 3)}
GRADS = histories.gradients(SHAPES)
EXACT = om.LargestSlices(0.4, "exact")


some = pytest.mark.parametrize(
    "names",
    [("wide",), pytest.param(("tall", "square", "stack"), marks=pytest.mark.slow)],
)


@some
def test_with_all_slices_it_is_momentum_and_orthogonalize(names):
    grads = {name: GRADS[name] for name in names}
    tx = om.orthogonalize_with_feedback(om.LargestSlices(1.0, "newton_schulz"), 0.9)
    same = optax.chain(optax.trace(0.9), om.orthogonalize())
    got, _ = histories.of(tx, grads)
    want, _ = histories.of(same, grads)
    for name, mine, wanted in histories.pairs(got, want):
        histories.close(mine, wanted, 1e-12, name)


@some
def test_only_what_was_taken_decays(names):
    grads = {name: GRADS[name] for name in names}
    mus = np.linspace(0.5, 0.9, histories.STEPS)
    tx = om.orthogonalize_with_feedback(EXACT, lambda count: jnp.asarray(mus)[count])
    got, states = histories.of(tx, grads)
    for name in names:
        three = (got[name], states.momentum[name], grads[name])
        for u, m, g in zip(*map(histories.matrices, three), strict=True):
            before = np.zeros_like(m[0])
            axis = 1 if u.shape[1] < u.shape[2] else 0  # sums over it, per slice
            for t, mu in enumerate(mus):
                total = before + g[t]
                sums = np.abs(total).sum(axis=axis)
                taken = np.zeros(len(sums), bool)
                taken[np.argsort(-sums)[: int(np.ceil(0.4 * len(sums)))]] = True
                part = np.expand_dims(taken, axis)
                want = np.where(part, mu * total, total)
                np.testing.assert_allclose(m[t], want, rtol=1e-12, atol=1e-12)
                chosen = np.where(part, u[t], 0)
                np.testing.assert_array_equal(u[t], chosen)
                wanted = reference.polar(np.compress(taken, total, 1 - axis))
                found = np.compress(taken, u[t], 1 - axis)
                np.testing.assert_allclose(found, wanted, atol=1e-9)
                before = m[t]


@pytest.mark.slow
def test_an_output_that_is_left_out_has_its_turn():
    # Of equal gradients, the outputs take turns.
    g = jnp.ones((6, 1)) * jnp.array([[1.0, 1.01, 1.02, 1.03]])
    tx = om.orthogonalize_with_feedback(om.LargestSlices(0.25, "exact"), 0.0)
    updates, _ = problems.unroll(tx, [g] * 4)
    seen = [np.flatnonzero(np.any(np.asarray(u) != 0, axis=0)).item() for u in updates]
    assert sorted(seen) == [0, 1, 2, 3]


def test_entries_of_the_result_that_are_zero_decay_with_their_slice():
    # The polar factor of a positive definite matrix is the identity.
    g = jnp.array([[4.0, 1.0], [1.0, 4.0]])
    diagonal = om.orthogonalize_with_feedback(Identity(), 0.5)
    _, state = problems.unroll(diagonal, [g])
    np.testing.assert_array_equal(state.momentum, g / 2)


class Identity:
    """A method whose result has zeros in every slice."""

    def polar(self, x):
        return jnp.broadcast_to(jnp.eye(*x.shape[-2:], dtype=x.dtype), x.shape)


@pytest.mark.slow
def test_blocks_of_a_fused_leaf_select_on_their_own_sides():
    # 4×2 takes outputs, and 4×6 inputs.
    layout = om.MatrixLayout(split_outputs=(2, 6))
    grads = [problems.normal((4, 8), t) for t in range(3)]
    tx = om.orthogonalize_with_feedback(EXACT, layout=layout)
    got, state = problems.unroll(tx, grads)
    alone = om.orthogonalize_with_feedback(EXACT)
    for part in (slice(0, 2), slice(2, 8)):
        want, other = problems.unroll(alone, [g[:, part] for g in grads])
        np.testing.assert_allclose(got[-1][:, part], want[-1], atol=1e-6)
        np.testing.assert_allclose(state.momentum[:, part], other.momentum, rtol=1e-6)


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_sharding_of_a_square_matrix():
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    grads = [problems.normal((8, 8), t) for t in range(2)]
    tx = om.orthogonalize_with_feedback(EXACT)
    want, _ = problems.unroll(tx, grads)
    for spec in (jax.P("x", None), jax.P(None, "x")):
        with jax.set_mesh(mesh):
            placed = [jax.device_put(g, spec) for g in grads]
            got, _ = problems.unroll(tx, placed)
        np.testing.assert_allclose(got[-1], want[-1], atol=1e-6)


@pytest.mark.slow
def test_dion_has_the_fraction_in_its_method():
    w, grads = problems.normal((7, 4), 1), problems.normal((25, 7, 4), 2)
    two = om.LargestSlices(0.5, om.dion.__kwdefaults__["orthogonalize"].method)
    tx = om.dion(0.02, orthogonalize=two)
    iterates, _ = problems.run(tx, {"kernel": w}, [{"kernel": g} for g in grads])
    got = np.stack([p["kernel"] for p in iterates])
    want = reference.dion(w, np.asarray(grads), 0.02, fraction=0.5)
    # 25 steps, each with the float32 rounding of five products.
    np.testing.assert_allclose(got, want, atol=2e-5)
