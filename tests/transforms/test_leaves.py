"""Every transformation with leaves that are not real floating, or without entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_matrix as om
from tests import problems
from tests.transforms.every import TRANSFORMS

EMPTY = {"a": (0, 4), "b": (4, 0), "c": (2, 0, 4), "d": (0, 3, 2)}
BLOCKS = om.Shampoo(block_size=3, stagger=True)
FUSED = om.MatrixLayout(split_outputs=2)
# Settings that cut leaves into blocks, of which empty leaves have none.
CUT = {
    "blocks of Shampoo": lambda: om.shampoo_precondition(preconditioner=BLOCKS),
    "blocks of a graft": lambda: om.graft_to(
        om.ema_momentum(), om.normalize_frobenius(), block_size=3
    ),
    "fused Muon": lambda: om.orthogonalize(layout=FUSED),
    "fused NorMuon": lambda: om.scale_by_neuron_variance(layout=FUSED),
    "fused sphere": lambda: om.hyperball_retract(layout=FUSED),
    "fused shape": lambda: om.scale_by_shape("mup", layout=FUSED),
}

# Long to compile, and made of what others have as well.
LONG = {
    *("spectral_norm_cap", "tangent_orthogonalize"),
    *("orthogonalize_with_feedback", "weight_normalized"),
}


def named(names, slow):
    """A parameter for each name, marked slow where it is."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in slow else [])
        for name in names
    ]


every = pytest.mark.parametrize("name", named(TRANSFORMS, LONG))


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
@every
def test_leaves_that_are_not_real_floating_raise_at_init_with_their_path(name, dtype):
    params = {"layer": {"good": jnp.ones((3, 2)), "bad": jnp.ones((3, 2), dtype)}}
    message = f"real floating arrays, got dtype {dtype} at 'layer/bad'"
    with pytest.raises(TypeError, match=message):
        TRANSFORMS[name]().init(params)


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "name",
    named(
        TRANSFORMS | CUT,
        {n for n in TRANSFORMS if "precondition" in n} | LONG | CUT.keys(),
    ),
)
def test_leaves_without_entries_pass_beside_others(name, jit):
    tx, full = (TRANSFORMS | CUT)[name](), {"w": problems.normal((5, 4))}
    params = full | {key: jnp.ones(shape) for key, shape in EMPTY.items()}
    init, update = (jax.jit(tx.init), jax.jit(tx.update)) if jit else tx
    got, state = None, init(params)
    want, alone = None, init(full)
    for _ in range(2):
        got, state = update(params, state, params)
        want, alone = update(full, alone, full)
    for key, shape in EMPTY.items():
        assert got[key].shape == shape and got[key].dtype == jnp.float32
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5, atol=1e-6)


@every
def test_leaves_without_entries_pass_alone(name):
    tx = TRANSFORMS[name]()
    params = {key: jnp.ones(shape, "bfloat16") for key, shape in EMPTY.items()}
    state = tx.init(params)
    for _ in range(2):
        got, state = tx.update(params, state, params)
        assert jax.tree.map(jnp.shape, got) == EMPTY
        assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(got))
