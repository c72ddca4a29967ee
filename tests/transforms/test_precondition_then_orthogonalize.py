"""precondition_then_orthogonalize: the polar factor of a preconditioner's update."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from tests.references import optimizers
from tests.references import preconditioners as reference
from tests.transforms import histories

TALL = (2, 8, 5)


def directions(grads, state):
    """The directions of SOAP for each matrix of a stack."""
    own = state[0].matrices["8x5"].state
    return [
        reference.soap(
            grads[:, i],
            b1=0.95,
            b2=0.95,
            eps=1e-8,
            refresh=3,
            first_bases=(own.left.basis[0, i], own.right.basis[0, i]),
        )
        for i in range(2)
    ]


@pytest.mark.parametrize(
    "method, rule",
    [("newton_schulz", optimizers.newton_schulz), ("exact", optimizers.polar)],
)
def test_matches_float64_reference(method, rule):
    grads = histories.gradients(TALL, 12)
    soap = om.soap_precondition(refresh=3)
    tx = om.precondition_then_orthogonalize(soap, method)
    got, state = histories.of(tx, grads)
    for i, direction in enumerate(directions(grads, state)):
        # The first is zero, and stays.
        assert not got[0, i].any()
        want = np.stack([rule(d) for d in direction[1:]])
        histories.close(got[1:, i], want, 1e-6)


def test_newton_schulz_is_the_default_and_a_method_is_taken():
    grads = histories.gradients((4, 3), 1)

    def once(*args):
        tx = om.precondition_then_orthogonalize(optax.identity(), *args)
        return histories.of(tx, grads, "float32")[0]

    np.testing.assert_array_equal(once(), once("newton_schulz"))
    one, _ = histories.of(om.orthogonalize_newton_schulz(1), grads, "float32")
    np.testing.assert_allclose(once(om.NewtonSchulz(1)), one, rtol=1e-6)
    assert np.abs(once(om.NewtonSchulz(1)) - once()).max() > 1e-2


def test_no_method_leaves_the_preconditioner():
    grads = histories.gradients((4, 3), 2)
    tx = om.precondition_then_orthogonalize(optax.scale(2.0), None)
    np.testing.assert_allclose(histories.of(tx, grads)[0], 2 * grads)


def test_the_layout_is_of_the_second_stage():
    grads = histories.gradients((3, 2, 4), 1)
    layout = om.MatrixLayout(inputs=-1, outputs=0)
    tx = om.precondition_then_orthogonalize(optax.identity(), "exact", layout=layout)
    got, _ = histories.of(tx, grads)
    for i in range(2):
        want = optimizers.polar(grads[0, :, i])
        np.testing.assert_allclose(got[0, :, i], want, atol=1e-12)


@pytest.mark.parametrize("bad", [None, "soap", om.soap_precondition])
def test_names_what_is_no_transformation(bad):
    message = "`precondition` must be an optax.GradientTransformation"
    with pytest.raises(TypeError, match=message):
        om.precondition_then_orthogonalize(bad)


def test_names_the_bad_method_or_leaf():
    with pytest.raises(ValueError, match="`method` must be one of 'newton_schulz'"):
        om.precondition_then_orthogonalize(optax.identity(), "svd")
    tx = om.precondition_then_orthogonalize(optax.identity())
    with pytest.raises(ValueError, match=r"'b'.*\(3,\)"):
        tx.init({"b": jnp.ones(3)})
