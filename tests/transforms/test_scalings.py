"""Stages that scale an update, or its inputs and outputs, without state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from tests import problems


def once(tx, update, params=None):
    got, _ = problems.unroll(tx, [update], params)
    return np.asarray(got[0], np.float64)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_match_rms_and_normalize_follow_their_formulas(shape, dtype, rtol):
    u, w = problems.normal(shape, 0, dtype), problems.normal(shape, 1, dtype)
    u64, w64 = np.asarray(u, np.float64), np.asarray(w, np.float64)
    unit = u64 / np.linalg.norm(u64)
    tolerance = {"rtol": rtol}
    got = once(om.match_rms(0.3), u)
    np.testing.assert_allclose(got, 0.3 * np.sqrt(u64.size) * unit, **tolerance)
    np.testing.assert_allclose(once(om.normalize_frobenius(), u), unit, **tolerance)
    got = once(om.normalize_frobenius("param"), u, w)
    np.testing.assert_allclose(got, np.linalg.norm(w64) * unit, **tolerance)
    got = once(om.normalize_frobenius("orthogonal"), u)
    np.testing.assert_allclose(got, np.sqrt(min(shape)) * unit, **tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_float32_updates_does_not_matter(scale):
    u = problems.normal((6, 4))
    for tx in (om.match_rms(), om.normalize_frobenius()):
        # The input rounds once when scaled.
        np.testing.assert_allclose(once(tx, u * scale), once(tx, u), rtol=1e-6)


def test_every_matrix_of_a_stack_has_its_own_norm():
    # Three matrices of very different size; a shared norm would lose the small ones.
    u = problems.normal((3, 4, 5)) * jnp.array([1e-20, 1.0, 1e20])[:, None, None]
    norms = np.linalg.norm(once(om.normalize_frobenius(), u), axis=(1, 2))
    np.testing.assert_allclose(norms, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        om.match_rms(),
        om.normalize_frobenius(),
        om.normalize_frobenius("param"),
        om.normalize_frobenius("orthogonal"),
        om.floor_update_ratio(),
        om.floor_update_ratio(per="output"),
        om.equalize_norms(),
        om.equalize_norms("both"),
        om.radial_brake(),
        om.radial_retract(),
    ],
)
def test_zero_and_nan_stay_in_their_matrix(tx):
    u = problems.normal((3, 4, 5)).at[0].set(0).at[1, 0, 0].set(jnp.nan)
    w = problems.normal((3, 4, 5), 1)
    got = once(tx, u, w)
    assert (got[0] == 0).all()
    assert np.isnan(got[1]).any()
    np.testing.assert_array_equal(got[2], once(tx, u[2], w[2]))


@pytest.mark.parametrize(
    "rule, shape, factor",
    [
        ("spectral", (3, 12), 2.0),
        ("spectral", (12, 3), 1.0),
        ("mup", (3, 12), 2.0),
        ("mup", (12, 3), 0.5),
        ("rms", (3, 16), 0.2 * 4),
        ("rms", (16, 3), 0.2 * 4),
    ],
)
def test_scale_by_shape_knows_its_factors(rule, shape, factor):
    u = problems.normal(shape)
    np.testing.assert_allclose(once(om.scale_by_shape(rule), u), factor * u, rtol=1e-6)


def test_scale_by_shape_takes_blocks_and_batches_by_themselves():
    u = problems.normal((2, 4, 20))
    layout = om.MatrixLayout(split_outputs=(16, 4))
    got = once(om.scale_by_shape(layout=layout), u)
    want = np.concatenate([2 * u[..., :16], u[..., 16:]], axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_rms_rule_gives_semi_orthogonal_updates_that_rms():
    u = problems.with_spectrum((6, 24), np.ones(6))
    got = once(om.scale_by_shape("rms", rms=0.5), jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(np.sqrt((got**2).mean()), 0.5, rtol=1e-6)


def test_floor_lengthens_only_what_is_short():
    w = problems.normal((2, 4, 5), 1)
    u = problems.normal((2, 4, 5)) * jnp.array([1e-3, 10.0])[:, None, None]
    got = once(om.floor_update_ratio(0.35), u, w)
    ratio = np.linalg.norm(got, axis=(1, 2)) / np.linalg.norm(w, axis=(1, 2))
    np.testing.assert_allclose(ratio[0], 0.35, rtol=1e-6)
    np.testing.assert_array_equal(got[1], u[1])
    np.testing.assert_allclose(got[0] * u[0, 0, 0] / got[0, 0, 0], u[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale_by_sign_follows_its_formula(dtype):
    # Subnormal numbers are zeros on some backends, so none are here.
    u = jnp.asarray([[-3.0, 1e-30, 0.0], [7.0, -0.0, -1e30]], dtype)
    want = np.where(np.isinf(u), np.nan, np.sign(np.asarray(u, np.float64)))
    got = problems.unroll(om.scale_by_sign(), [{"a": u, "b": u[0, 0]}])[0][0]
    assert got["a"].dtype == got["b"].dtype == u.dtype
    np.testing.assert_array_equal(np.asarray(got["a"], np.float64), want)
    assert got["b"] == -1


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_scale_by_sign_shows_what_is_not_finite_and_only_there(bad):
    u = problems.normal((3, 4))
    got = once(om.scale_by_sign(), u.at[1, 2].set(bad))
    want = np.sign(np.asarray(u, np.float64))
    want[1, 2] = np.nan
    np.testing.assert_array_equal(got, want)


def test_none_returns_updates_unchanged():
    updates = {"kernel": problems.normal((4, 3)), "bias": jnp.ones(3), "none": None}
    for tx in (om.match_rms(None), om.scale_by_shape(None), om.orthogonalize(None)):
        got, state = tx.update(updates, tx.init(updates), value=1.0)
        assert got is updates
        assert not jax.tree.leaves(state)


def test_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"`rms` must lie in \(0, inf\), got 0"):
        om.match_rms(0)
    with pytest.raises(
        ValueError, match="`to` must be one of 'one', 'param', 'orthogonal', got 2"
    ):
        om.normalize_frobenius(2)
    with pytest.raises(ValueError, match=r"`shape_scale` must be one of .*got 'muon'"):
        om.scale_by_shape("muon")
    with pytest.raises(ValueError, match="`rms` must lie in"):
        om.scale_by_shape("rms", rms=-1.0)
    with pytest.raises(ValueError, match=r"`floor` must lie in \[0, inf\), got -1"):
        om.floor_update_ratio(-1)


@pytest.mark.parametrize(
    "tx, name",
    [
        (om.normalize_frobenius("param"), "normalize_frobenius"),
        (om.floor_update_ratio(), "floor_update_ratio"),
        (om.add_cautious_weight_decay(0.1), "add_cautious_weight_decay"),
        (om.hyperball_retract(), "hyperball_retract"),
    ],
)
def test_missing_params_are_asked_for_by_name(tx, name):
    w = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=f"`{name}` needs the parameters"):
        tx.update(w, tx.init(w))


@pytest.mark.parametrize(
    "tx",
    [
        om.match_rms(),
        om.normalize_frobenius("param"),
        om.scale_by_shape(),
        om.orthogonalize_newton_schulz(),
        om.hyperball_retract(),
    ],
)
def test_a_leaf_that_is_no_matrix_raises_at_init_with_its_path(tx):
    with pytest.raises(ValueError, match=r"'a/b'.*\(3,\)"):
        tx.init({"a": {"b": jnp.ones(3)}})


def fused(x):
    """The three matrices of a (4, 3·2) leaf, side by side."""
    return np.split(np.asarray(x, np.float64), 3, axis=1)


FUSED = om.MatrixLayout(split_outputs=3)


def test_the_floor_per_output_lengthens_the_weights_of_short_outputs():
    u = problems.normal((3, 4, 5)) * jnp.logspace(-3, 1, 5)[None, None]
    w = problems.normal((3, 4, 5), 1)
    got = once(om.floor_update_ratio(0.4, per="output"), u, w)
    for mine, update, weight in zip(got, u, w, strict=True):
        update, weight = np.asarray(update, np.float64), np.asarray(weight, np.float64)
        lengths = np.linalg.norm(update, axis=0)
        least = 0.4 * np.linalg.norm(weight, axis=0)
        assert (lengths < least).any() and (lengths > least).any()
        want = update * np.maximum(1, least / lengths)
        np.testing.assert_allclose(mine, want, rtol=1e-5)
    with pytest.raises(ValueError, match="`per` must be one of 'matrix', 'output'"):
        om.floor_update_ratio(per="row")


def equalized(u, of):
    inputs, outputs = np.linalg.norm(u, axis=1), np.linalg.norm(u, axis=0)
    if of != "inputs":
        u = u / outputs
    if of != "outputs":
        u = u / inputs[:, None]
    return u


@pytest.mark.parametrize("of", ["outputs", "inputs", "both"])
def test_equalized_norms_follow_their_formula(of):
    u = problems.normal((4, 6)) * jnp.logspace(-2, 1, 6)[None]
    tx, blocks = om.equalize_norms(of), om.equalize_norms(of, layout=FUSED)
    for got, update in (
        (once(tx, u), u),
        *zip(fused(once(blocks, u)), fused(u), strict=True),
    ):
        update = np.asarray(update, np.float64)
        want = equalized(update, of)
        want *= np.linalg.norm(update) / np.linalg.norm(want)
        np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(ValueError, match="`of` must be one of 'outputs'"):
        om.equalize_norms("rows")


def test_an_output_that_is_zero_stays_zero():
    u = problems.normal((4, 3)).at[:, 1].set(0)
    got = once(om.equalize_norms("both"), u)
    assert (got[:, 1] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(u), rtol=1e-6)
