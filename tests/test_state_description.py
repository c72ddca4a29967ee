"""describe_state: bytes worked out by hand, and against states that exist."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_matrix as om
from tests import flax_models as models

COUNT = 4  # an int32


def shapes(dtype="float32"):
    """A matrix of 48 bytes in float32, and auxiliary leaves of 16 and 80."""

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "embed": {"embedding": leaf(5, 4)},
        "mlp": {"kernel": leaf(3, 4), "bias": leaf(4)},
    }


def arrays(dtype="float32"):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes(dtype))


def by_path(description):
    return {row.path: row.state_bytes for row in description.rows}


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("dtype", "mu_dtype", "ratio"),
    [
        ("float32", None, 2),
        ("bfloat16", None, 2),  # both moments are bfloat16
        ("bfloat16", "float32", 3),  # of 2 bytes: 4 and 2
        ("float32", "bfloat16", 1.5),
    ],
)
def test_adam_keeps_two_moments_of_each_leaf(dtype, mu_dtype, ratio):
    got = om.describe_state(optax.adam(1e-3, mu_dtype=mu_dtype), shapes(dtype))
    size = jnp.dtype(dtype).itemsize
    entries = {"embed/embedding": 20, "mlp/bias": 4, "mlp/kernel": 12}
    assert {row.path: row.parameter_bytes for row in got.rows} == {
        path: n * size for path, n in entries.items()
    }
    assert by_path(got) == {path: ratio * n * size for path, n in entries.items()}
    assert all(row.ratio == ratio and row.dtype == dtype for row in got.rows)
    assert [row.shape for row in got.rows] == [(5, 4), (4,), (3, 4)]
    assert got.shared_bytes == COUNT and got.joint_bytes == 0
    assert got.parameter_bytes == 36 * size
    assert got.state_bytes == ratio * 36 * size + COUNT
    assert got.ratio == got.state_bytes / (36 * size)


def test_sgd_keeps_nothing():
    got = om.describe_state(optax.sgd(0.1), shapes())
    assert set(by_path(got).values()) == {0}
    assert got.shared_bytes == got.state_bytes == got.ratio == 0
    assert got.parameter_bytes == 144


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_keeps_one_momentum_of_a_matrix(dtype):
    got = om.describe_state(om.muon(0.02), shapes(dtype))
    size = jnp.dtype(dtype).itemsize
    assert by_path(got) == {
        "embed/embedding": 2 * 20 * size,  # AdamW's, in the dtype of the leaf
        "mlp/bias": 2 * 4 * size,
        "mlp/kernel": 12 * 4,  # float32 whatever the leaf is
    }
    assert got.shared_bytes == 2 * COUNT  # of momentum and of AdamW


def test_normuon_keeps_a_variance_of_each_neuron_too():
    got = om.describe_state(om.normuon(0.02), shapes())
    assert by_path(got) == {
        "embed/embedding": 160,
        "mlp/bias": 32,
        "mlp/kernel": 48 + 4 * 4,  # 4 neurons
    }
    assert got.shared_bytes == 3 * COUNT


@pytest.mark.parametrize("name", om.OPTIMIZERS)
def test_rows_and_what_is_shared_make_the_state_there_is(name):
    tx = om.make_optimizer(name, 0.1)
    got = om.describe_state(tx, arrays())
    assert got.state_bytes == nbytes(tx.init(arrays()))
    assert got.joint_bytes == 0
    assert sum(by_path(got).values()) + got.shared_bytes == got.state_bytes
    assert got == om.describe_state(tx, shapes())


@pytest.mark.parametrize(
    "tx",
    [
        optax.adafactor(0.1),
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        optax.inject_hyperparams(optax.adam)(0.1),
        optax.scale_by_lbfgs(),
        optax.contrib.muon(0.1),
        optax.contrib.prodigy(0.1),
        optax.partition(
            {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
            {"embed": "a", "mlp": {"kernel": "b", "bias": "a"}},
        ),
    ],
    ids=["adafactor", "multi", "inject", "lbfgs", "muon", "prodigy", "part"],
)
def test_optimizers_of_optax(tx):
    got = om.describe_state(tx, shapes())
    assert got.state_bytes == nbytes(tx.init(arrays()))
    assert got.joint_bytes == 0
    assert all(row.state_bytes >= row.parameter_bytes / 2 for row in got.rows)


def test_none_and_masked_leaves_have_no_row():
    params = shapes() | {"frozen": None, "elsewhere": optax.MaskedNode()}
    got = om.describe_state(om.muon(0.02), params)
    assert got == om.describe_state(om.muon(0.02), shapes())


def test_leaves_that_the_optimizer_masks_have_no_state():
    mask = {"embed": False, "mlp": True}
    got = om.describe_state(optax.masked(optax.adam(0.1), mask), shapes())
    assert by_path(got) == {"embed/embedding": 0, "mlp/bias": 32, "mlp/kernel": 96}


def of_linen(model, x):
    return lambda: models.linen_shapes(model, x)


def of_nnx(**kwargs):
    def make():
        model = nnx.eval_shape(lambda: models.NnxTransformer(nnx.Rngs(0), **kwargs))
        return nnx.state(model, nnx.Param)

    return make


@pytest.mark.parametrize(
    "make",
    [
        # The bias says how to read the kernel.
        of_linen(models.LinenGeneral(), jnp.ones((1, models.D))),
        # The norms say what is stacked.
        of_linen(models.LinenTransformer(use_bias=False), models.tokens()),
        of_linen(models.LinenMoE(), jnp.ones((2, models.D))),
        of_nnx(stacked=True, use_bias=False),
        of_nnx(stacked=False, use_bias=True),
    ],
    ids=["general", "scanned", "experts", "nnx-stacked", "nnx"],
)
@pytest.mark.parametrize("routing", [None, lambda path, leaf: None])
def test_a_leaf_alone_is_routed_as_among_its_siblings(make, routing):
    params = make()
    got = om.describe_state(om.muon(0.02, routing=routing), params)
    routed = om.describe(params, routing).rows
    assert {row.optimizer for row in routed} == {"matrix", "auxiliary"}
    for row, decided in zip(got.rows, routed, strict=True):
        assert row.path == decided.path and row.shape == decided.shape
        # Momentum, or Adam's two moments.
        assert row.ratio == {"matrix": 1, "auxiliary": 2}[decided.optimizer], row
    assert got.joint_bytes == 0


@pytest.mark.parametrize("name", ["normuon", "adam"])
def test_flax_boxes_change_nothing(name):
    tx = om.make_optimizer(name, 0.1)
    want = om.describe_state(tx, shapes())
    linen = jax.tree.map(
        lambda leaf: nn.Partitioned(leaf, ("x",) + (None,) * (leaf.ndim - 1)), arrays()
    )
    assert om.describe_state(tx, linen) == want
    assert om.describe_state(tx, nnx.State(jax.tree.map(nnx.Param, arrays()))) == want


def test_sharded_parameters_count_as_a_whole():
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Explicit,))
    params = arrays()
    kernel = jax.device_put(
        params["mlp"]["kernel"], jax.NamedSharding(mesh, jax.P(None, "x"))
    )
    params["mlp"]["kernel"] = kernel
    assert len(kernel.addressable_shards) == 2
    want = om.describe_state(om.muon(0.02), shapes())
    assert om.describe_state(om.muon(0.02), params) == want


def test_nothing_is_allocated():
    huge = {"w": jax.ShapeDtypeStruct((2**20, 2**20), "float32")}
    got = om.describe_state(om.muon(0.02, routing="matrix"), huge)
    assert by_path(got) == {"w": 2**42}


def test_a_leaf_by_itself_and_numbers():
    got = om.describe_state(optax.adam(0.1), np.ones((3, 2), np.float32))
    assert by_path(got) == {"": 48}
    assert by_path(om.describe_state(optax.adam(0.1), {"x": 1.0})) == {"x": 8}
    assert om.describe_state(optax.adam(0.1), {"x": jnp.ones((0, 2))}).ratio == 0


def test_state_of_several_leaves_together_is_told_apart():
    def init(params):
        # A byte for each pair of leaves.
        return jnp.zeros(len(jax.tree.leaves(params)) ** 2, jnp.uint8)

    pairs = optax.GradientTransformation(init, lambda *args: args[:2])
    got = om.describe_state(pairs, shapes())
    assert list(by_path(got).values()) == [1, 1, 1]
    assert got.state_bytes == 9 and got.shared_bytes == got.joint_bytes == 6
    assert "of it joint" in str(got)


def test_the_table():
    got = str(om.describe_state(om.normuon(0.02), shapes() | {"frozen": None}))
    want = """\
path             shape     dtype    bytes  state bytes  ratio
-------------------------------------------------------------
embed/embedding  (5, 4)    float32     80          160   2.00
mlp/bias         (4,)      float32     16           32   2.00
mlp/kernel       (3, 4)    float32     48           64   1.33
-------------------------------------------------------------
shared                                              12
total            3 leaves             144          268   1.86"""
    assert got == want
    params = models.linen_shapes(models.LinenTransformer(), models.tokens())
    table = str(om.describe_state(optax.adam(0.1), params)).splitlines()
    paths = [row.path for row in om.describe(params).rows]
    assert [line.split()[0] for line in table[2:-3]] == paths


@pytest.mark.parametrize(
    ("optimizer", "seen"),
    [({"w": 1}, "dict"), (optax.adam, "function"), (None, "NoneType")],
)
def test_what_is_no_optimizer_is_refused(optimizer, seen):
    message = rf"`optimizer` must be an optax\.GradientTransformation.*got {seen}\."
    with pytest.raises(TypeError, match=message):
        om.describe_state(optimizer, shapes())


@pytest.mark.parametrize("params", [{}, {"a": None, "b": [optax.MaskedNode()]}, None])
def test_parameters_without_leaves_are_refused(params):
    message = r"`params` must have at least one leaf, got PyTreeDef\("
    with pytest.raises(ValueError, match=message):
        om.describe_state(optax.adam(0.1), params)


def test_errors_of_the_optimizer_pass_with_a_note():
    def init(params):
        return jax.tree.leaves(params)[0]

    first = optax.GradientTransformation(init, lambda *args: args[:2])
    with pytest.raises(IndexError) as error:
        om.describe_state(first, shapes())
    note = "`describe_state` called `init` with every leaf left out."
    assert error.value.__notes__[-1] == note
    ambiguous = {"mix": {"kernel": jnp.ones((2, 3, 4))}}
    with pytest.raises(ValueError, match="cannot tell") as error:
        om.describe_state(om.muon(0.02), ambiguous)
    assert error.value.__notes__[-1].endswith("with all leaves.")
