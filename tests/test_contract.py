"""What every public transformation and optimizer promises, on trees with matrices."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from tests import problems

LR = 0.05
TRANSFORMS = {
    "ema_momentum": om.ema_momentum,
    "scale_by_variance": om.scale_by_variance,
    "scale_by_neuron_variance": om.scale_by_neuron_variance,
    "orthogonalize": om.orthogonalize,
    "orthogonalize_newton_schulz": om.orthogonalize_newton_schulz,
    "orthogonalize_halley": om.orthogonalize_halley,
    "orthogonalize_exact": om.orthogonalize_exact,
    "scale_by_shape": om.scale_by_shape,
    "match_rms": om.match_rms,
    "normalize_frobenius": om.normalize_frobenius,
    "hyperball_retract": om.hyperball_retract,
    "add_cautious_weight_decay": lambda: om.add_cautious_weight_decay(0.1),
    "floor_update_ratio": om.floor_update_ratio,
    "switch_at": lambda: om.switch_at(2, om.match_rms(), om.ema_momentum()),
    # Damped so that rounding, of which small eigenvalues are made, does not show.
    "shampoo_precondition": functools.partial(om.shampoo_precondition, damping=1e-2),
    "soap_precondition": om.soap_precondition,
    "kl_soap_precondition": om.kl_soap_precondition,
    "kl_shampoo_precondition": om.kl_shampoo_precondition,
    "graft_to": lambda: om.graft_to(optax.scale_by_adam(), om.ema_momentum()),
    "precondition_then_orthogonalize": lambda: om.precondition_then_orthogonalize(
        om.ema_momentum()
    ),
}
OPTIMIZERS = {
    name: (lambda factory=om.OPTIMIZERS[name]: factory(LR))
    for name in sorted(om.MATRIX_OPTIMIZERS)
}
SUBJECTS = TRANSFORMS | OPTIMIZERS
# Long to compile, and made of stages that others here have as well (adamuon those of
# hopper, adamh of muonh); of preconditioners one is not slow.
SLOW = {
    *("kl_soap_precondition", "kl_shampoo_precondition", "kl_soap", "soap_muon"),
    *("shampoo", "distributed_shampoo", "soap", "muonw"),
    *("shampoo_precondition", "adamuon", "adamh"),
}


def named(names, *rest):
    """A parameter for each name, marked slow where it is."""
    return [
        pytest.param(n, *rest, marks=[pytest.mark.slow] if n in SLOW else [])
        for n in names
    ]


EVERY = pytest.mark.parametrize("name", named(SUBJECTS))


def tree(name, dtype="float32", seed=0):
    """Matrices tall, wide, stacked, and None; for optimizers auxiliary leaves too."""
    shapes = {"tall": (6, 4), "wide": (3, 5), "experts": (2, 4, 3)}
    kernels = {
        key: {"kernel": problems.normal(shape, seed * 10 + i, dtype)}
        for i, (key, shape) in enumerate(shapes.items())
    }
    rest = {"frozen": None}
    if name in OPTIMIZERS:
        rest["norm"] = {"scale": problems.normal((4,), seed * 10 + 8, dtype)}
        rest["embed"] = {"embedding": problems.normal((7, 4), seed * 10 + 9, dtype)}
    return kernels | rest


def jitted(tx):
    return jax.jit(tx.update)


def started(name, tx, params):
    """The first state of which an update is not zero."""
    state = tx.init(params)
    if "soap" in name or "kl_" in name:
        _, state = jitted(tx)(params, state, params)
    return state


def assert_close(got, want, atol=1e-5):
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=atol)


def test_the_contract_covers_every_public_transformation():
    factories = {
        name
        for name in om.__all__
        if inspect.isfunction(getattr(om, name))
        and inspect.signature(getattr(om, name)).return_annotation
        is optax.GradientTransformationExtraArgs
    }
    assert factories - {"make_optimizer", "partition"} == set(SUBJECTS)


@pytest.mark.parametrize("name", named(OPTIMIZERS))
def test_the_matrix_path_runs(name):
    # What the auxiliary optimizer would do to a kernel is not what happens to it, and
    # what it does to the other leaves is.
    params, grads = tree(name), tree(name, seed=1)
    tx, auxiliary = SUBJECTS[name](), optax.adamw(LR, b2=0.95, weight_decay=0.0)
    got, _ = jitted(tx)(grads, started(name, tx, params), params)
    adam, _ = jitted(auxiliary)(grads, started(name, auxiliary, params), params)
    for key in ("tall", "wide", "experts"):
        assert jnp.abs(got[key]["kernel"] - adam[key]["kernel"]).max() > 1e-3
    assert_close(got["norm"], adam["norm"])
    assert_close(got["embed"], adam["embed"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@EVERY
def test_types_are_kept_it_compiles_once_and_buffers_can_be_donated(name, dtype):
    tx, params = SUBJECTS[name](), tree(name, dtype)
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def step(updates, state, params):
        return tx.update(updates, state, params)

    step = jax.jit(step, donate_argnums=(0, 1))
    state = tx.init(params)
    abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: params))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    updates = None
    for t in range(3):
        updates, state = step(tree(name, dtype, t), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    chex.assert_tree_all_finite(updates)
    for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert jnp.abs(s).max() > 0 and p.shape == s.shape


@EVERY
def test_eager_jit_and_scan_agree_and_extra_arguments_pass(name):
    tx, params = SUBJECTS[name](), tree(name)
    grads = [tree(name, seed=t) for t in (1, 2)]
    update, outs = jitted(tx), []
    want = tx.update(grads[0], tx.init(params), params, value=jnp.ones(()))
    assert_close(update(grads[0], tx.init(params), params), want)
    compiled = tx.init(params)
    for g in grads:
        got, compiled = update(g, compiled, params)
        outs.append(got)

    def body(state, g):
        out, state = tx.update(g, state, params)
        return state, out

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    state, scanned = jax.jit(jax.lax.scan, static_argnums=0)(
        body, tx.init(params), stacked
    )
    assert_close(state, compiled)
    assert_close(scanned, jax.tree.map(lambda *x: jnp.stack(x), *outs))


@EVERY
def test_zero_gradients_give_finite_updates(name):
    tx, params = SUBJECTS[name](), tree(name)
    zeros, update = jax.tree.map(jnp.zeros_like, params), jitted(tx)
    got, state = update(zeros, tx.init(params), params)
    for _ in range(2):
        got, state = update(zeros, state, params)
        chex.assert_tree_all_finite((got, state))
    # A zero gradient moves nothing but what decays.
    if name not in {"muonw", "add_cautious_weight_decay", "soap", "kl_soap"}:
        chex.assert_trees_all_close(got, zeros, atol=1e-6)


@EVERY
def test_a_nan_spoils_its_own_matrix_only(name):
    tx, params, grads = SUBJECTS[name](), tree(name), tree(name, seed=1)
    bad = grads["experts"]["kernel"].at[0, 1, 1].set(jnp.nan)
    update = jitted(tx)
    state = started(name, tx, params)
    want, _ = update(grads, state, params)
    got, _ = update(grads | {"experts": {"kernel": bad}}, state, params)
    assert not jnp.isfinite(got["experts"]["kernel"][0]).all()
    # Another program's worth of rounding: XLA may fuse around the NaN check.
    assert_close(got["experts"]["kernel"][1], want["experts"]["kernel"][1])
    others = [k for k in got if k != "experts"]
    assert_close({k: got[k] for k in others}, {k: want[k] for k in others})


# Of other transformations, or without defaults.
COMBINED = {
    "switch_at",
    "add_cautious_weight_decay",
    "graft_to",
    "precondition_then_orthogonalize",
}
STRUCTURAL = {
    "orthogonalize_newton_schulz": ("steps",),
    "orthogonalize_halley": ("steps", "lower_bound"),
    "hopper": ("ns_steps",),
    "shampoo_precondition": ("start", "refresh", "max_dim", "exponents"),
    "soap_precondition": ("refresh", "max_dim"),
    "kl_soap_precondition": ("refresh", "max_dim"),
    "kl_shampoo_precondition": ("refresh", "max_dim"),
    "shampoo": ("start", "refresh"),
    "distributed_shampoo": ("start", "refresh", "block_size"),
    "soap": ("refresh",),
    "kl_soap": ("refresh",),
    "soap_muon": ("refresh",),
}


@pytest.mark.parametrize("name", named(n for n in SUBJECTS if n not in COMBINED))
def test_hyperparameters_can_be_injected(name):
    factory = TRANSFORMS.get(name) or om.OPTIMIZERS[name]
    given = {"learning_rate": LR} if name in OPTIMIZERS else {}
    static = STRUCTURAL.get(name, ())
    injected = optax.inject_hyperparams(factory, static_args=static)(**given)
    plain, params = SUBJECTS[name](), tree(name)
    want, _ = jitted(plain)(params, started(name, plain, params), params)
    state = started(name, injected, params)
    got, state = jitted(injected)(params, state, params)
    assert_close(got, want)
    if name in OPTIMIZERS:
        # Twice the rate on the way is twice the step (a sphere bends it).
        state.hyperparams["learning_rate"] = jnp.asarray(2 * LR)
        again = started(name, injected, params)
        again.hyperparams["learning_rate"] = jnp.asarray(2 * LR)
        got, _ = jitted(injected)(params, again, params)
        rtol = 0.1 if name in {"muonh", "adamh"} else 0.02
        ratio = jnp.linalg.norm(got["tall"]["kernel"]) / jnp.linalg.norm(
            want["tall"]["kernel"]
        )
        np.testing.assert_allclose(ratio, 2, rtol=rtol)


@EVERY
def test_masked_leaves_and_partitions_are_left_alone(name):
    tx, params = SUBJECTS[name](), tree(name)
    labels = jax.tree.map(lambda _: "ours", params) | {"wide": {"kernel": "other"}}
    split = optax.partition({"ours": tx, "other": optax.scale(2.0)}, labels)
    got, _ = jitted(split)(params, started(name, split, params), params)
    want, _ = jitted(tx)(params, started(name, tx, params), params)
    assert_close(got | {"wide": None}, want | {"wide": None})
    assert_close(got["wide"]["kernel"], 2 * params["wide"]["kernel"])
    assert got["frozen"] is None


@EVERY
def test_multi_steps_accumulates_to_the_mean(name):
    tx, params = SUBJECTS[name](), tree(name)
    grads = [tree(name, seed=t) for t in (1, 2)]
    many = optax.MultiSteps(tx, every_k_schedule=2)
    state, update = many.init(params), jax.jit(many.update)
    _, state = update(grads[0], state, params)
    got, _ = update(grads[1], state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    want, _ = jitted(tx)(mean, tx.init(params), params)
    assert_close(got, want, atol=1e-4)


@EVERY
def test_vmap_over_an_ensemble_is_its_members(name):
    tx = SUBJECTS[name]()
    members = [tree(name, seed=t) for t in (1, 2)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *members)

    def one(params):
        return tx.update(params, started(name, tx, params), params)[0]

    got = jax.jit(jax.vmap(one))(both)
    want = [jax.jit(one)(m) for m in members]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), atol=1e-4)


@EVERY
def test_state_survives_a_checkpoint(name, tmp_path):
    tx, params = SUBJECTS[name](), tree(name)
    _, state = jitted(tx)(params, tx.init(params), params)
    if not jax.tree.leaves(state):
        return  # A transform without state has nothing to save.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        back = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal(back, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    got, _ = jitted(tx)(params, back, params)
    want, _ = jitted(tx)(params, state, params)
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize(
    "name, kind",
    [
        # test_stateful.py has SOAP on many meshes.
        *named(sorted(SUBJECTS.keys() - {"soap_precondition"}), AxisType.Explicit),
        # There the types say nothing, and leaves are taken for replicated.
        *named(OPTIMIZERS, AxisType.Auto),
    ],
)
def test_sharded_equals_unsharded(name, kind):
    assert jax.device_count() == 8, "nothing is sharded on fewer devices"
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    tx = SUBJECTS[name]()
    places = {
        "inputs": {"kernel": NamedSharding(mesh, P("x", None))},
        "outputs": {"kernel": NamedSharding(mesh, P(None, "x"))},
        "experts": {"kernel": NamedSharding(mesh, P("x", None, None))},
    }
    shapes = {"inputs": (16, 8), "outputs": (6, 8), "experts": (8, 3, 5)}
    params, grads = (
        {k: {"kernel": problems.normal(shapes[k], seed)} for k in places}
        for seed in (0, 1)
    )
    want, _ = jitted(tx)(grads, started(name, tx, params), params)
    with jax.set_mesh(mesh):
        params, grads = (jax.device_put(tree, places) for tree in (params, grads))
        state = started(name, tx, params)
        got, new_state = jitted(tx)(grads, state, params)
        types = jax.tree.map(jax.typeof, (got, new_state))
        assert types == jax.tree.map(jax.typeof, (params, state))
        if kind is AxisType.Explicit:
            for key in places:
                assert got[key]["kernel"].sharding.spec == places[key]["kernel"].spec
    # Sums in another order.
    assert_close(got, want)


MATRIX_TRANSFORMS = [
    name
    for name, factory in TRANSFORMS.items()
    if "layout" in inspect.signature(factory).parameters
]


@pytest.mark.parametrize("name", named(MATRIX_TRANSFORMS))
def test_sharded_blocks_of_a_fused_kernel_equal_unsharded(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tx = TRANSFORMS[name](layout=om.MatrixLayout(split_outputs=(16, 4, 4)))
    params, grads = problems.normal((6, 24)), problems.normal((6, 24), 1)
    want, _ = jitted(tx)(grads, started(name, tx, params), params)
    with jax.set_mesh(mesh):
        params, grads = jax.device_put((params, grads), P(None, "x"))
        got, _ = jitted(tx)(grads, started(name, tx, params), params)
        assert jax.typeof(got) == jax.typeof(params)
    assert_close(got, want)


@pytest.mark.parametrize("name", named(OPTIMIZERS))
def test_nnx_optimizer_trains_partitioned_parameters(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spread = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", None))
    with jax.set_mesh(mesh):
        model = nnx.Linear(16, 4, kernel_init=spread, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, SUBJECTS[name](), wrt=nnx.Param)
        x, before = jnp.ones((2, 16)), jnp.copy(model.kernel[...])

        def loss(model):
            return jnp.sum(jnp.square(model(x) - 1.0))

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        losses = [step(model, optimizer) for _ in range(3)]
        assert losses[-1] < losses[0]
        assert jnp.abs(model.kernel[...] - before).max() > 1e-3
        assert model.kernel[...].sharding.spec[0] == "x"
