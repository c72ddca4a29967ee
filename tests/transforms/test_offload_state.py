"""The state of an optimizer in the memory of the host."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from tests import problems

# On CPU, JAX 0.8 ignores where an array should be.
pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 9), reason="needs host memory on CPU"
)


def tree(seed=0):
    shapes = {"up": (16, 8), "down": (8, 16), "bias": (8,)}
    return {
        key: {"kernel" if len(shape) == 2 else "bias": problems.normal(shape, seed + i)}
        for i, (key, shape) in enumerate(shapes.items())
    }


def kinds(state):
    """Where the arrays and the scalars of a state are."""
    arrays = {x.sharding.memory_kind for x in jax.tree.leaves(state) if x.ndim}
    scalars = {x.sharding.memory_kind for x in jax.tree.leaves(state) if not x.ndim}
    return arrays, scalars


@pytest.mark.parametrize(
    "inner",
    [
        om.muon(0.02),
        om.soap(0.01, mu_dtype="float8_e4m3fn"),
        optax.adamw(0.01),
        om.ema_lookahead(om.muon(0.02)),
    ],
    ids=["muon", "soap in 8 bits", "adamw", "lookahead"],
)
def test_the_state_is_on_the_host_and_updates_are_the_same(inner):
    params, tx = tree(), om.offload_state(inner)
    got, want = tx.init(params), inner.init(params)
    update, plain = jax.jit(tx.update), jax.jit(inner.update)
    for t in range(3):
        a, got = update(tree(t), got, params)
        b, want = plain(tree(t), want, params)
        chex.assert_trees_all_equal(a, b)
        assert kinds(got) == ({"pinned_host"}, {"device"})
        assert kinds(a) == ({"device"}, set())
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))


def test_a_step_donates_its_parameters_and_state_and_compiles_once():
    params, inner = tree(), om.muon(0.02)
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    tx = om.offload_state(inner)
    step = jax.jit(step, donate_argnums=(0, 1))
    got, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for t in range(3):
        old = got
        got, state = step(got, state, tree(t))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    want, _ = problems.run(inner, params, [tree(t) for t in range(3)])
    chex.assert_trees_all_close(got, want[-1], rtol=1e-6)
    assert kinds(state)[0] == {"pinned_host"}


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_shards_stay_with_their_devices(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    places = {
        "up": {"kernel": NamedSharding(mesh, P("x", None))},
        "down": {"kernel": NamedSharding(mesh, P(None, "x"))},
        "bias": {"bias": NamedSharding(mesh, P())},
    }
    inner = optax.adam(0.1)
    tx = om.offload_state(inner)
    got = want = None
    with jax.set_mesh(mesh):
        params = jax.device_put(tree(), places)
        state, plain = jax.jit(tx.init)(params), inner.init(params)
        for t in range(2):
            grads = jax.device_put(tree(t), places)
            got, state = jax.jit(tx.update)(grads, state, params)
            want, plain = jax.jit(inner.update)(grads, plain, params)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))
    for key, name in (("up", "kernel"), ("down", "kernel")):
        moment = state[0].nu[key][name]
        assert moment.sharding.memory_kind == "pinned_host"
        assert moment.addressable_shards[0].data.size == 128 // 8
    assert kinds(state)[0] == {"pinned_host"}


def test_a_checkpoint_is_restored_to_the_host(tmp_path):
    params, tx = tree(), om.offload_state(om.muon(0.02))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    back = problems.restored(state, tmp_path / "state")
    chex.assert_trees_all_equal(jax.device_get(back), jax.device_get(state))
    assert kinds(back) == kinds(state)
    jax.jit(tx.update)(params, back, params)


def test_describe_state_counts_what_is_on_the_host():
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}}
    plain = om.describe_state(om.muon(0.02), params)
    assert plain.host_bytes == 0 and "on host" not in str(plain)
    moved = om.describe_state(om.offload_state(om.muon(0.02)), params)
    assert moved.rows[0].host_bytes == moved.host_bytes == 64 * 32 * 4
    assert moved.state_bytes == plain.state_bytes
    assert [line.split()[-1] for line in str(moved).splitlines()[::2]][:2] == [
        "host",
        "8,192",
    ]
    # A part of a chain.
    adam = optax.scale_by_adam()
    part = optax.chain(om.offload_state(om.ema_momentum()), adam)
    both = om.describe_state(part, params)
    assert both.state_bytes - both.shared_bytes == 3 * both.host_bytes == 3 * 8192


def test_what_is_not_a_transformation_is_refused():
    with pytest.raises(TypeError, match=r"`inner` must be an optax.Gradient"):
        om.offload_state(om.muon)


@pytest.mark.parametrize("wrap", [om.ema_lookahead, om.tail_average])
def test_the_parameters_to_evaluate_are_those_of_the_wrapper(wrap):
    arguments = {"start": 1} if wrap is om.tail_average else {}
    inner, params = wrap(om.muon(0.02), **arguments), tree()
    results = []
    for tx in (inner, om.offload_state(inner)):
        updates, state = jax.jit(tx.update)(tree(3), tx.init(params), params)
        after = optax.apply_updates(params, updates)
        results.append(jax.jit(om.evaluation_params)(state, after))
    chex.assert_trees_all_equal(*results)


def test_a_state_may_hold_python_numbers():
    inner = optax.GradientTransformation(
        lambda params: {"count": 3, "x": jnp.zeros(2)},
        lambda updates, state, params=None: (updates, state),
    )
    tx = om.offload_state(inner)
    state = tx.init(jnp.ones(2))
    assert state["count"] == 3
    assert state["x"].sharding.memory_kind == "pinned_host"


def test_scan_vmap_and_extra_arguments():
    params = problems.normal((4, 3))
    tx = om.offload_state(om.ema_momentum())
    grads = jnp.stack([problems.normal((4, 3), t) for t in range(3)])
    want, _ = problems.unroll(om.ema_momentum(), list(grads))
    _, got = jax.lax.scan(
        lambda s, g: tx.update(g, s, value=jnp.ones(()))[::-1], tx.init(params), grads
    )
    chex.assert_trees_all_close(got, jnp.stack(want), rtol=1e-6)
    state = jax.vmap(tx.init)(grads)
    got, _ = jax.jit(jax.vmap(tx.update))(grads, state)
    chex.assert_trees_all_close(got[0], want[0], rtol=1e-6)
