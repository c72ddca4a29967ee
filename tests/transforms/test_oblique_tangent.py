"""oblique_tangent: Mano's direction, per input and per output in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from benchmarks import hlo
from tests import problems


def tangent(u, w, axis, rms=0.2):
    """The rule of arXiv:2601.23000 for the vectors along an axis."""
    u, w = np.asarray(u, np.float64), np.asarray(w, np.float64)
    unit = w / np.linalg.norm(w, axis=axis, keepdims=True)
    u = u - (u * unit).sum(axis=axis, keepdims=True) * unit
    norms = np.linalg.norm(u, axis=axis, keepdims=True)
    return rms * np.sqrt(u.shape[axis]) * u / norms


def unroll(tx, updates, params):
    return problems.unroll(tx._replace(update=jax.jit(tx.update)), updates, params)


def test_follows_its_formula_and_alternates():
    shapes = {"tall": (6, 4), "wide": (4, 6), "stack": (2, 5, 3)}
    with jax.enable_x64(True):
        w, *updates = (
            {k: problems.normal(shape, seed, "float64") for k, shape in shapes.items()}
            for seed in range(5)
        )
        got, state = unroll(om.oblique_tangent(0.3), updates, w)
    for t, (g, u) in enumerate(zip(got, updates, strict=True)):
        for key in shapes:
            want = tangent(u[key], w[key], -2 if t % 2 else -1, 0.3)
            np.testing.assert_allclose(g[key], want, rtol=1e-10)
    assert state.count == 4


@pytest.mark.parametrize(
    "side, widths",
    [
        ("split_outputs", (4, 2)),
        pytest.param("split_outputs", 2, marks=pytest.mark.slow),
        pytest.param("split_inputs", (4, 2), marks=pytest.mark.slow),
        pytest.param("split_inputs", 2, marks=pytest.mark.slow),
    ],
)
def test_a_split_leaf_is_its_blocks(side, widths):
    w, u = problems.normal((6, 6), 1), problems.normal((6, 6), 2)
    tx = om.oblique_tangent(layout=om.MatrixLayout(**{side: widths}))
    got, _ = unroll(tx, [u, u], w)
    cut, axis = 3 if widths == 2 else 4, int(side == "split_outputs")
    parts = list(zip(*(jnp.split(x, [cut], axis) for x in (u, w)), strict=True))
    for along, g in zip((1, 0), got, strict=True):
        want = np.concatenate([tangent(*part, along) for part in parts], axis)
        np.testing.assert_allclose(g, want, rtol=1e-5, atol=1e-6)


def test_a_transposed_layout_starts_with_the_other_axis():
    w, u = problems.normal((5, 4), 1), problems.normal((5, 4), 2)
    tx = om.oblique_tangent(layout=om.MatrixLayout(inputs=-1, outputs=-2))
    (got,), _ = unroll(tx, [u], w)
    np.testing.assert_allclose(got, tangent(u, w, 0), rtol=1e-5, atol=1e-6)


def test_vectors_without_a_direction_become_zero_and_spoil_no_others():
    w = problems.normal((5, 300), 1)
    u = problems.normal((5, 300), 2)
    odd = u.at[0].set(3 * w[0]).at[1].set(0).at[2, 7].set(jnp.nan).at[3, 7].set(jnp.inf)
    # Vectors of one entry always are parallel; a zero parameter has no direction.
    given = {"odd": odd, "single": u[:, :1], "zero": u}
    params = {"odd": w, "single": w[:, :1], "zero": jnp.zeros_like(w)}
    (first, second), _ = unroll(om.oblique_tangent(), [given, given], params)
    assert (first["odd"][:2] == 0).all() and jnp.isnan(first["odd"][2:4]).all()
    want = tangent(u, w, 1)[4]
    np.testing.assert_allclose(first["odd"][4], want, rtol=1e-4, atol=1e-5)
    assert (first["single"] == 0).all() and (second["single"] != 0).all()
    norms = jnp.linalg.norm(u, axis=1, keepdims=True)
    np.testing.assert_allclose(first["zero"], 0.2 * 300**0.5 * u / norms, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [P("x", None), P(None, "x"), P("x", "y")])
@pytest.mark.parametrize("layout", [None, om.MatrixLayout(split_outputs=(16, 8))])
def test_sharded_equals_unsharded_in_both_directions(kind, spec, layout):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    tx = om.oblique_tangent(layout=layout)
    w, u = problems.normal((8, 24), 1), problems.normal((8, 24), 2)
    want, _ = problems.unroll(tx, [u, u], w)
    update = jax.jit(tx.update)
    with jax.set_mesh(mesh):
        w, u = jax.device_put((w, u), jax.NamedSharding(mesh, spec))
        state = tx.init(w)
        for t in range(2):
            got, state = update(u, state, w)
            assert jax.typeof(got) == jax.typeof(w)
            np.testing.assert_allclose(got, want[t], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("spec, count", [(P("x", None), 0), (P(None, "x"), 2)])
def test_each_input_is_gathered_once_and_only_along_the_split_side(spec, count):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tx = om.oblique_tangent(layout=om.MatrixLayout(split_outputs=(16, 4, 4)))
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((16, 24)), spec)
        program = jax.jit(tx.update).lower(w, tx.init(w), w).compile()
    kinds = [found.kind for found in hlo.collectives(program.as_text() or "")]
    assert kinds.count("all-gather") == count


def test_bad_arguments_and_leaves_are_named():
    with pytest.raises(ValueError, match=r"`rms` must lie in \(0, inf\), got 0"):
        om.oblique_tangent(0.0)
    with pytest.raises(ValueError, match=r"'b'.*\(3,\)"):
        om.oblique_tangent().init({"b": jnp.ones(3)})
    w = problems.normal((3, 2))
    tx = om.oblique_tangent()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(w, tx.init(w))
