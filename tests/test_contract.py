"""What every public transformation and optimizer promises, on trees with matrices."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from tests import problems
from tests.transforms.every import SPECTRAL, VARIANTS, case

LR = 0.05
# The arguments that each transformation is tested with.
TRANSFORMS = {
    "ema_momentum": {},
    "mixed_momentum": {},
    "ema_lookahead": {"inner": om.ema_momentum()},
    "tail_average": {"inner": om.ema_momentum(), "start": 1},
    "equalize_norms": {},
    "radial_brake": {},
    "radial_retract": {"weight_decay": 0.1},
    "spectral_sphere_retract": {},
    "spectral_norm_cap": {"limit": 1.0},
    "stiefel_retract": {},
    "offload_state": {"inner": om.ema_momentum()},
    "scale_by_sign": {},
    "scale_by_variance": {},
    "scale_by_noise": {},
    "oblique_tangent": {},
    "scale_by_neuron_variance": {},
    "float32_statistics": {"inner": optax.scale_by_adam()},
    "orthogonalize": {},
    "orthogonalize_newton_schulz": {"steps": 5},
    "orthogonalize_halley": {},
    "orthogonalize_exact": {},
    "orthogonalize_cached": {"refresh": 2},
    "svd_supplement": {"every": 2},
    "orthogonalize_with_feedback": {},
    "weight_normalized": {
        "direction": om.ema_momentum(),
        "magnitude": optax.scale_by_adam(),
    },
    # Gentle: some tests have gradients equal to the parameters. Without their leading
    # part they are singular, and rounding shows where the method is steep.
    "tangent_orthogonalize": {"method": om.NewtonSchulz(3, coefficients="track3")},
    "scale_by_shape": {},
    "match_rms": {},
    "normalize_frobenius": {},
    "hyperball_retract": {},
    "add_cautious_weight_decay": {"weight_decay": 0.1},
    "floor_update_ratio": {},
    "switch_at": {"step": 2, "first": om.match_rms(), "second": om.ema_momentum()},
    # Damped so that rounding, of which the smallest eigenvalues are made (or in a basis
    # the entries that are otherwise zero), does not show.
    "shampoo_precondition": {"damping": 1e-2},
    "soap_precondition": {},
    "whiten_momentum": {"eps": 0.1},
    "kl_soap_precondition": {},
    "kl_shampoo_precondition": {},
    "graft_to": {"magnitude": optax.scale_by_adam(), "direction": om.ema_momentum()},
    "precondition_then_orthogonalize": {"precondition": om.ema_momentum()},
}
OPTIMIZERS = {name: {"learning_rate": LR} for name in sorted(om.MATRIX_OPTIMIZERS)}
SUBJECTS = TRANSFORMS | OPTIMIZERS
# The other public functions.
OTHERS = {
    *("describe", "describe_placement", "describe_state", "make_optimizer"),
    *("hessian_vector_product", "newton_step"),
    *("evaluation_params", "partition", "polar_express_rows", "relay_state"),
    # Have special needs, and files of their own in tests/transforms.
    *("qk_clip", "orthogonalize_factors"),
    *("route", "tree_map"),
    *("hyperp_factor", "width_factors", "with_learning_rate_factors"),
}
STATELESS = {
    *("floor_update_ratio", "match_rms"),
    *("normalize_frobenius", "orthogonalize", "orthogonalize_exact"),
    *("orthogonalize_halley", "orthogonalize_newton_schulz", "scale_by_shape"),
    *("equalize_norms", "radial_brake", "scale_by_sign", "stiefel_retract"),
}
# Arguments that fix the program; optimizers have none.
STRUCTURAL = {
    "orthogonalize_newton_schulz": ("steps",),
    "orthogonalize_halley": ("steps", "lower_bound"),
    "tangent_orthogonalize": ("bisections",),
}
# The learning rate of the auxiliary AdamW over that of the matrices, where it is not 1.
FACTORS = dict.fromkeys(SPECTRAL, 0.15)
RETRACTED = {"muonh", "adamh", "track3", "muown"}
# The first update brings parameters to where the others keep them.
CONSTRAINED = {
    *("spectral_sphere_retract", "spectral_norm_cap", "stiefel_retract"),
    *("spectral_sphere", "spel"),
}
DECAYING = {"muonw", "add_cautious_weight_decay", "soap", "kl_soap", "nanochat_muon"}
DECAYING |= {"mano", "dion"}
# Long to compile, and made of stages that others here have as well (adamuon those of
# hopper, adamh of muonh, normuon of muon); of preconditioners one is not slow.
SLOW = {
    *("kl_soap_precondition", "kl_shampoo_precondition", "shampoo_precondition"),
    *("whiten_momentum", "equalize_norms", "radial_brake", "tail_average"),
    *("kl_soap", "soap", "soap_muon", "shampoo", "distributed_shampoo"),
    *("spectral_sphere_retract", "spectral_norm_cap", "tangent_orthogonalize"),
    *("track3", "nanochat_muon", "adamh", "adamuon", "muonh", "muonw", "normuon"),
    *("orthogonalize_with_feedback", "weight_normalized", "stiefel_retract"),
    *VARIANTS,
    *("orthogonalize_exact", "orthogonalize_cached", "svd_supplement"),
    *("orthogonalize_newton_schulz", "orthogonalize_halley", "graft_to"),
    *("scale_by_sign", "normalize_frobenius", "precondition_then_orthogonalize"),
    *("scale_by_noise", "oblique_tangent"),
}


def named(names, *rest):
    """A parameter for each name, marked slow where it is."""
    return [case(n, *rest, slow=SLOW) for n in names]


EVERY = pytest.mark.parametrize("name", named(SUBJECTS))
# For tests that compile nothing.
EVERY_TRACED = pytest.mark.parametrize("name", SUBJECTS)


@functools.cache
def subject(name):
    """A transformation, and its update, which all tests compile once."""
    tx = getattr(om, name)(**SUBJECTS[name])
    return tx, jax.jit(tx.update)


def tree(name, dtype="float32", seed=0):
    """Matrices tall, wide, stacked, and None; for optimizers auxiliary leaves too."""
    shapes = {"tall": (6, 4), "wide": (4, 6), "experts": (2, 6, 4)}
    kernels = {
        key: {"kernel": problems.normal(shape, seed * 10 + i, dtype)}
        for i, (key, shape) in enumerate(shapes.items())
    }
    rest = {"frozen": None}
    if name in OPTIMIZERS:
        rest["norm"] = {"scale": problems.normal((4,), seed * 10 + 8, dtype)}
        rest["embed"] = {"embedding": problems.normal((7, 4), seed * 10 + 9, dtype)}
    return kernels | rest


def has_bases(name):
    """Whether the first gradient gives eigenbases, for the updates after it."""
    return "soap" in name or "kl_" in name or name in {"whiten_momentum", "track3"}


def started(name, params, tx=None):
    """The first state of which an update is not zero."""
    own, update = subject(name)
    state = (tx or own).init(params)
    if has_bases(name):
        update = update if tx is None else jax.jit(tx.update)
        _, state = update(params, state, params)
    return state


def assert_close(got, want, atol=1e-5):
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=atol)


def test_the_contract_covers_every_public_transformation():
    functions = {n for n in om.__all__ if n.islower() and callable(getattr(om, n))}
    assert functions == set(SUBJECTS) | OTHERS
    assert not set(SUBJECTS) & OTHERS


@EVERY_TRACED
def test_extra_arguments_are_accepted_and_state_is_what_it_is_said_to_be(name):
    tx, _ = subject(name)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = jax.eval_shape(tx.init, tree(name))
    assert bool(jax.tree.leaves(state)) == (name not in STATELESS)


@pytest.mark.parametrize("name", named(OPTIMIZERS))
def test_the_matrix_path_runs(name):
    # What the auxiliary optimizer would do to a kernel is not what happens to it, and
    # what it does to the other leaves is.
    params, grads = tree(name), tree(name, seed=1)
    rate = FACTORS.get(name, 1.0) * LR
    auxiliary = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)
    _, update = subject(name)
    got, _ = update(grads, started(name, params), params)
    state = started(name, params, auxiliary)
    adam, _ = jax.jit(auxiliary.update)(grads, state, params)
    for key in ("tall", "wide", "experts"):
        assert jnp.abs(got[key]["kernel"] - adam[key]["kernel"]).max() > 1e-3
    assert_close(got["norm"], adam["norm"])
    assert_close(got["embed"], adam["embed"])


# In float32 other tests would show most of this.
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
@EVERY
def test_types_are_kept_it_compiles_once_and_buffers_can_be_donated(name, dtype):
    tx, params = subject(name)[0], tree(name, dtype)
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
    for u in jax.tree.leaves(updates):
        assert jnp.abs(u).max() > 0


@EVERY
def test_eager_jit_and_scan_agree_and_extra_arguments_pass(name):
    tx, update = subject(name)
    params, outs = tree(name), []
    grads = [tree(name, seed=t) for t in (1, 2)]
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


@pytest.mark.core
@EVERY
def test_zero_gradients_give_finite_updates(name):
    tx, update = subject(name)
    params = tree(name)
    zeros = jax.tree.map(jnp.zeros_like, params)
    got, state = update(zeros, tx.init(params), params)
    for _ in range(2):
        got, state = update(zeros, state, params)
        chex.assert_tree_all_finite((got, state))
    # A zero gradient moves nothing but what decays.
    if name not in DECAYING | CONSTRAINED:
        chex.assert_trees_all_close(got, zeros, atol=1e-6)


@pytest.mark.core
@EVERY
def test_a_nan_spoils_its_own_matrix_only(name):
    _, update = subject(name)
    params, grads = tree(name), tree(name, seed=1)
    bad = grads["experts"]["kernel"].at[0, 1, 1].set(jnp.nan)
    state = started(name, params)
    want, _ = update(grads, state, params)
    got, _ = update(grads | {"experts": {"kernel": bad}}, state, params)
    assert not jnp.isfinite(got["experts"]["kernel"][0]).all()
    # Another program's worth of rounding: XLA may fuse around the NaN check.
    assert_close(got["experts"]["kernel"][1], want["experts"]["kernel"][1])
    others = [k for k in got if k != "experts"]
    assert_close({k: got[k] for k in others}, {k: want[k] for k in others})


@pytest.mark.parametrize("name", sorted(SUBJECTS))
@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_leaves_that_are_not_real_floating_raise_with_their_path(name, dtype):
    tx, params = subject(name)[0], tree(name)
    params["wide"]["kernel"] = params["wide"]["kernel"].astype(dtype)
    with pytest.raises(TypeError, match=f"got dtype {dtype} at 'wide/kernel'"):
        tx.init(params)


@EVERY_TRACED
def test_leaves_without_entries_pass_through(name):
    tx, _ = subject(name)
    shapes = {"flat": (0, 4), "thin": (3, 0), "experts": (0, 4, 3)}
    params = {key: {"kernel": jnp.zeros(shape)} for key, shape in shapes.items()}
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


def rate(count):
    """A schedule that doubles in the third update."""
    return jnp.where(count < 2, LR, 2 * LR)


def injected(name):
    given, static = TRANSFORMS.get(name), STRUCTURAL.get(name, ())
    if name in OPTIMIZERS:
        given, static = {"learning_rate": rate}, ()
    return optax.inject_hyperparams(getattr(om, name), static)(**given)


@EVERY_TRACED
def test_hyperparameters_can_be_injected(name):
    tx, params = injected(name), tree(name)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("name", STRUCTURAL)
def test_arguments_that_fix_the_program_say_how_to_inject_the_others(name):
    tx = optax.inject_hyperparams(getattr(om, name))(**TRANSFORMS[name])
    message = r"`(\w+)` fixes the program .* pass `static_args=\('\1',\)`"
    with pytest.raises(TypeError, match=message):
        tx.init(tree(name))


@EVERY
def test_injected_hyperparameters_act_like_plain_ones(name):
    tx, params = injected(name), tree(name)
    plain, update = subject(name)
    injected_update = jax.jit(tx.update)
    state, plain_state, got, want = tx.init(params), plain.init(params), None, None
    for count in range(3):
        got, state = injected_update(params, state, params)
        want, plain_state = update(params, plain_state, params)
        if name not in OPTIMIZERS or count < 2:
            assert_close(got, want)
    if name in RETRACTED:
        # Ends that are retracted onto a sphere are not quite twice as far.
        lengths = [jnp.linalg.norm(u["tall"]["kernel"]) for u in (want, got)]
        assert float(lengths[1] / lengths[0]) == pytest.approx(2, rel=0.1)
    elif name in OPTIMIZERS and name not in CONSTRAINED:
        assert_close(got, jax.tree.map(lambda u: 2 * u, want))


@EVERY_TRACED
def test_a_function_mapped_over_the_state_sees_what_belongs_to_parameters(name):
    tx, params = subject(name)[0], tree(name)
    state = jax.eval_shape(tx.init, params)
    marked = optax.tree.map_params(
        tx, lambda x: True, state, transform_non_params=lambda x: x
    )
    table, _ = jax.tree_util.tree_flatten_with_path(state)
    for (path, leaf), found in zip(table, jax.tree.leaves(marked), strict=True):
        # The state of preconditioners is of all matrices of a shape together.
        of_matrices = jax.tree_util.GetAttrKey("matrices") in path
        of_parameter = leaf.ndim > 0 and not of_matrices
        assert (found is True) == of_parameter, path


def test_a_function_mapped_over_the_state_reaches_the_momentum():
    tx, _ = subject("muon")
    params = tree("muon")
    state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(params))
    momentum = optax.tree.get(state, "momentum")
    for key in ("tall", "wide", "experts"):
        want = jnp.ones_like(params[key]["kernel"])
        chex.assert_trees_all_equal(momentum[key]["kernel"], want)


@pytest.mark.parametrize("name", named(OPTIMIZERS))
def test_an_exported_update_equals_the_original(name):
    _, update = subject(name)
    params = tree(name)
    given = (params, started(name, params), params)
    leaves, treedef = jax.tree.flatten(given)

    def flat(*leaves):
        return jax.tree.leaves(update(*treedef.unflatten(leaves)))

    saved = export.export(jax.jit(flat))(*leaves).serialize()
    got = export.deserialize(saved).call(*leaves)
    assert_close(got, jax.tree.leaves(update(*given)))


@EVERY
def test_masked_leaves_and_partitions_are_left_alone(name):
    tx, update = subject(name)
    params = tree(name)
    labels = jax.tree.map(lambda _: "ours", params) | {"wide": {"kernel": "other"}}
    split = optax.partition({"ours": tx, "other": optax.scale(2.0)}, labels)
    got, _ = jax.jit(split.update)(params, started(name, params, split), params)
    want, _ = update(params, started(name, params), params)
    assert_close(got | {"wide": None}, want | {"wide": None})
    assert_close(got["wide"]["kernel"], 2 * params["wide"]["kernel"])
    assert got["frozen"] is None


@EVERY
def test_multi_steps_accumulates_to_the_mean(name):
    tx, update = subject(name)
    params = tree(name)
    grads = [tree(name, seed=t) for t in (1, 2)]
    many = optax.MultiSteps(tx, every_k_schedule=2)
    state, accumulate = many.init(params), jax.jit(many.update)
    _, state = accumulate(grads[0], state, params)
    got, _ = accumulate(grads[1], state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    want, _ = update(mean, tx.init(params), params)
    assert_close(got, want, atol=1e-4)


@EVERY
def test_vmap_over_an_ensemble_is_its_members(name):
    _, update = subject(name)
    members = [tree(name, seed=t) for t in (1, 2)]
    states = [started(name, member) for member in members]
    both = jax.tree.map(lambda *x: jnp.stack(x), *members)
    state = jax.tree.map(lambda *x: jnp.stack(x), *states)
    got, _ = jax.jit(jax.vmap(update))(both, state, both)
    want = [update(*given, given[0])[0] for given in zip(members, states, strict=True)]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), atol=1e-4)


@pytest.mark.parametrize("name", named(n for n in SUBJECTS if n not in STATELESS))
def test_state_survives_a_checkpoint(name, tmp_path):
    tx, update = subject(name)
    params = tree(name)
    _, state = update(params, tx.init(params), params)
    back = problems.restored(state, tmp_path / "state")
    chex.assert_trees_all_equal(back, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    got, _ = update(params, back, params)
    want, _ = update(params, state, params)
    chex.assert_trees_all_equal(got, want)


# In test_stateful.py, fused kernels among them.
ON_MANY_MESHES = {"soap_precondition"}


@pytest.mark.parametrize(
    "name, kind",
    [
        *named(sorted(SUBJECTS.keys() - ON_MANY_MESHES), AxisType.Explicit),
        # There the types say nothing, and leaves are taken for replicated.
        *named(OPTIMIZERS, AxisType.Auto),
    ],
)
def test_sharded_equals_unsharded(name, kind):
    assert jax.device_count() == 8, "nothing is sharded on fewer devices"
    if name == "offload_state" and jax.__version_info__ < (0, 9):
        pytest.skip("needs host memory on CPU")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    _, update = subject(name)
    places = {
        "inputs": {"kernel": NamedSharding(mesh, P("x", None))},
        "outputs": {"kernel": NamedSharding(mesh, P(None, "x"))},
        "experts": {"kernel": NamedSharding(mesh, P("x", None, None))},
    }
    shapes = {"inputs": (16, 8), "outputs": (6, 8), "experts": (8, 3, 5)}
    if has_bases(name):
        # One gradient has full rank on both sides: the basis of a null space is
        # arbitrary, and rounding changes it.
        shapes = {"inputs": (8, 8), "outputs": (16, 16), "experts": (8, 4, 4)}
    params, grads = (
        {k: {"kernel": problems.normal(shapes[k], seed)} for k in places}
        for seed in (0, 1)
    )
    want, _ = update(grads, started(name, params), params)
    with jax.set_mesh(mesh):
        params, grads = (jax.device_put(tree, places) for tree in (params, grads))
        state = started(name, params)
        got, new_state = update(grads, state, params)
        types = jax.tree.map(jax.typeof, (got, new_state))
        assert types == jax.tree.map(jax.typeof, (params, state))
        if kind is AxisType.Explicit:
            for key in places:
                assert got[key]["kernel"].sharding.spec == places[key]["kernel"].spec
    # Sums in another order.
    assert_close(got, want)


MATRIX_TRANSFORMS = [
    name
    for name in sorted(TRANSFORMS.keys() - ON_MANY_MESHES)
    if "layout" in inspect.signature(getattr(om, name)).parameters
]


@pytest.mark.parametrize("name", named(MATRIX_TRANSFORMS))
def test_sharded_blocks_of_a_fused_kernel_equal_unsharded(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    layout = om.MatrixLayout(split_outputs=(16, 4, 4))
    tx = getattr(om, name)(**TRANSFORMS[name], layout=layout)
    params, grads = problems.normal((6, 24)), problems.normal((6, 24), 1)
    update = jax.jit(tx.update)
    want, _ = update(grads, started(name, params, tx), params)
    with jax.set_mesh(mesh):
        params, grads = jax.device_put((params, grads), P(None, "x"))
        got, _ = update(grads, started(name, params, tx), params)
        assert jax.typeof(got) == jax.typeof(params)
    assert_close(got, want)


@pytest.mark.parametrize("name", named(OPTIMIZERS))
def test_nnx_optimizer_trains_partitioned_parameters(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spread = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", None))
    with jax.set_mesh(mesh):
        model = nnx.Linear(16, 4, kernel_init=spread, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, subject(name)[0], wrt=nnx.Param)
        x, before = jnp.ones((2, 16)), jnp.copy(model.kernel[...])

        def loss(model):
            return jnp.sum(jnp.square(model(x) - 1.0))

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        losses = [step(model, optimizer) for _ in range(3)]
        assert losses[-1] < losses[name in CONSTRAINED]
        assert jnp.abs(model.kernel[...] - before).max() > 1e-3
        assert model.kernel[...].sharding.spec[0] == "x"
