"""orthogonalize_factors: LoRA-Muon."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from tests import problems

EXACT = om.orthogonalize_factors(method="exact", damping=0.0)


def polar(x):
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


def inverse_root(s):
    w, q = np.linalg.eigh(np.asarray(s, np.float64))
    return (q / np.sqrt(w)) @ q.T


def reference(updates, params):
    """The rule of the paper, with W = A Bᵀ there and A B here."""
    a, b = (np.asarray(params[k], np.float64) for k in ("lora_a", "lora_b"))
    root_a, root_b = inverse_root(a.T @ a), inverse_root(b @ b.T)
    u_a, u_b = updates["lora_a"], updates["lora_b"]
    return {
        "lora_a": polar(u_a @ root_b) @ root_b / 2,
        "lora_b": root_a @ polar(root_a @ u_b) / 2,
    }


def pair(seed=0, m=12, n=9, r=3, dtype=jnp.float32):
    return {
        "lora_a": problems.normal((m, r), seed, dtype),
        "lora_b": problems.normal((r, n), seed + 1, dtype),
    }


def updated(tx, updates, params):
    return jax.jit(tx.update)(updates, tx.init(params), params)[0]


@pytest.mark.parametrize("m, n, r", [(12, 9, 3), (6, 20, 1), (5, 5, 5), (4, 3, 6)])
def test_it_is_the_rule_of_the_paper(m, n, r):
    if r > min(m, n):
        r = min(m, n)
    params, updates = pair(0, m, n, r), pair(5, m, n, r)
    got, want = updated(EXACT, updates, params), reference(updates, params)
    chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_product_moves_like_muon_whatever_the_sizes_of_the_factors(scale):
    params = pair()
    params = {"lora_a": params["lora_a"] * scale, "lora_b": params["lora_b"] / scale}
    a, b = params["lora_a"], params["lora_b"]
    g = problems.normal((12, 9), 7)  # of the product
    updates = {"lora_a": g @ b.T, "lora_b": a.T @ g}
    got = updated(EXACT, updates, params)
    halves = got["lora_a"] @ b, a @ got["lora_b"]
    for half in halves:
        s = np.linalg.svd(half, compute_uv=False)
        np.testing.assert_allclose(s[:3], 0.5, rtol=1e-3)
        np.testing.assert_allclose(s[3:], 0.0, atol=1e-4)
    change = halves[0] + halves[1]
    assert np.linalg.norm(change, 2) <= 1 + 1e-3
    assert np.vdot(change, g) > 0
    # The change of the product does not depend on how it is factored.
    plain = pair()
    at_one = {"lora_a": g @ plain["lora_b"].T, "lora_b": plain["lora_a"].T @ g}
    same = updated(EXACT, at_one, plain)
    want = same["lora_a"] @ plain["lora_b"] + plain["lora_a"] @ same["lora_b"]
    np.testing.assert_allclose(change, want, atol=2e-3)


def test_a_factor_of_zero_leaves_the_other_where_it_is():
    params = pair() | {"lora_b": jnp.zeros((3, 9))}
    tx = om.orthogonalize_factors()
    got = updated(
        tx, {"lora_a": jnp.zeros((12, 3)), "lora_b": pair(3)["lora_b"]}, params
    )
    np.testing.assert_array_equal(got["lora_a"], 0)
    assert np.linalg.norm(params["lora_a"] @ got["lora_b"], 2) == pytest.approx(
        0.5, rel=0.2
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    chex.assert_trees_all_equal(updated(tx, zeros, params), zeros)
    both = updated(tx, zeros, zeros)
    chex.assert_trees_all_equal(both, zeros)


def test_damping_bounds_what_a_deficient_factor_does():
    params = pair()
    params["lora_b"] = params["lora_b"].at[1].set(params["lora_b"][0])
    got = updated(om.orthogonalize_factors(damping=1e-2), pair(3), params)
    chex.assert_tree_all_finite(got)
    assert float(jnp.abs(got["lora_a"]).max()) < 10


@pytest.mark.parametrize("method", ["newton_schulz", "exact"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_gradients_of_a_lower_rank_than_the_factors_train(rank, method):
    # Where they have nothing, updates are rounding errors over the root of the damping.
    x = problems.normal((64, rank), 0) @ problems.normal((rank, 32), 1) / rank**0.5
    target = x @ problems.normal((32, 32), 2) / 32**0.5
    params = {"lora_a": problems.normal((32, 8), 3) / 32**0.5}
    params |= {"lora_b": jnp.zeros((8, 32))}
    factors = om.orthogonalize_factors(method=method)
    tx = optax.chain(om.ema_momentum(0.95), factors, optax.scale(-0.1))

    def loss(params):
        return jnp.mean(jnp.square(x @ params["lora_a"] @ params["lora_b"] - target))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        change = new["lora_a"] @ new["lora_b"] - params["lora_a"] @ params["lora_b"]
        return (new, state), (value, jnp.linalg.norm(change, 2))

    start = params, tx.init(params)
    _, (losses, lengths) = jax.lax.scan(step, start, length=60)
    assert losses[-1] < 0.01 * losses[0]
    assert lengths.max() < 0.15  # 0.1 to first order


def test_a_nan_spoils_its_own_product_only():
    params = {"x": pair(), "y": pair(2)}
    updates = {"x": pair(4), "y": pair(6)}
    want = updated(EXACT, updates, params)
    updates["x"]["lora_a"] = updates["x"]["lora_a"].at[0, 0].set(jnp.nan)
    got = updated(EXACT, updates, params)
    assert np.isnan(got["x"]["lora_a"]).any()
    chex.assert_trees_all_close(got["y"], want["y"], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stacks_types_scan_vmap_and_one_compilation(dtype):
    one = [pair(i, dtype=dtype) for i in (0, 10)]
    grads = [pair(i, dtype=dtype) for i in (20, 30)]
    stack, many = (
        jax.tree.map(lambda *x: jnp.stack(x), *each) for each in (one, grads)
    )
    tx = om.orthogonalize_factors()
    chex.clear_trace_counter()
    update = jax.jit(
        chex.assert_max_traces(n=1)(lambda u, p: tx.update(u, tx.init(p), p)[0])
    )
    got = update(many, stack)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, many)
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-4
    for i in range(2):
        want = updated(tx, grads[i], one[i])
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], got), want, rtol=tolerance, atol=tolerance
        )
    mapped = jax.vmap(lambda u, p: tx.update(u, tx.init(p), p)[0])(many, stack)
    chex.assert_trees_all_close(mapped, got, rtol=tolerance, atol=tolerance)
    _, scanned = jax.lax.scan(
        lambda s, g: tx.update(g, s, one[0])[::-1], tx.init(one[0]), many
    )
    first = jax.tree.map(lambda x: x[0], scanned)
    chex.assert_trees_all_close(
        first, updated(tx, grads[0], one[0]), rtol=tolerance, atol=tolerance
    )
    update(many, stack)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [(P("x"), P(None, "x")), (P(None, "x"), P("x"))])
def test_sharded_equals_unsharded(kind, spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    params, updates = (pair(i, 32, 16, 8) for i in (0, 5))
    want = updated(EXACT, updates, params)
    places = {
        key: NamedSharding(mesh, s)
        for key, s in zip(("lora_a", "lora_b"), spec, strict=True)
    }
    tx = om.orthogonalize_factors(
        method="exact", damping=0.0, placement=om.Placement(places)
    )
    with jax.set_mesh(mesh):
        params, updates = (jax.device_put(t, places) for t in (params, updates))
        got = updated(tx, updates, params)
    chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-3, atol=1e-4)
    if kind is AxisType.Explicit:
        for key in places:
            assert got[key].sharding.is_equivalent_to(places[key], 2)


def test_other_names_and_a_whole_optimizer():
    def factors(path):
        layer, _, name = path.partition("/")
        return layer, "inputs" if name == "down" else "outputs"

    target = problems.normal((10, 8), 3)
    params = {"w": {"down": problems.normal((10, 2)), "up": jnp.zeros((2, 8))}}
    tx = optax.chain(
        om.ema_momentum(0.9),
        om.orthogonalize_factors(factors),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(optax.linear_schedule(0.3, 0.0, 80)),
    )

    def loss(p):
        return jnp.sum(jnp.square(p["w"]["down"] @ p["w"]["up"] - target))

    iterates = [params]

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(80):
        params, state = step(params, state)
        iterates.append(params)
    s = np.linalg.svd(target, compute_uv=False)
    best = float(np.sum(s[2:] ** 2))  # of rank 2, Eckart and Young
    assert float(loss(params)) < best + 0.05 * (float(loss(iterates[0])) - best)


def test_the_factors_of_flax_are_found_in_a_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            linear = nnx.Linear(6, 4, rngs=rngs)
            self.layer = nnx.LoRA(6, 2, 4, base_module=linear, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    model = Model(nnx.Rngs(0))
    tx = optax.chain(om.ema_momentum(), om.orthogonalize_factors(), optax.scale(-0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    before = nnx.state(model, nnx.Param)["layer"]["base_module"]["kernel"][...]

    def loss(model):
        return jnp.mean(jnp.square(model(problems.normal((8, 6))) - 1))

    losses = []
    for _ in range(5):
        value, grads = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, nnx.LoRAParam)
        )(model)
        optimizer.update(model, grads)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    after = nnx.state(model, nnx.Param)["layer"]["base_module"]["kernel"][...]
    np.testing.assert_array_equal(before, after)


NAMES = {"a": ("w", "inputs"), "b": ("w", "outputs")}


@pytest.mark.parametrize(
    "params, factors, message",
    [
        ({"kernel": (4, 3)}, None, "'kernel' is not a factor of Flax's LoRA"),
        ({"x": {"lora_a": (4, 3)}}, None, "'x/lora_a' is the only factor of .*'x'"),
        (
            {"lora_a": (4, 3), "lora_b": (2, 5)},
            None,
            r"'lora_a' \(4, 3\) and 'lora_b' \(2, 5\) are not",
        ),
        ({"lora_a": (4,), "lora_b": (4, 5)}, None, "are not"),
        ({"lora_a": (2, 4, 3), "lora_b": (3, 5)}, None, "are not"),
        (
            {"a": (4, 3), "b": (4, 3)},
            lambda path: ("w", "inputs"),
            "'a' and 'b' are both the inputs of the product 'w'",
        ),
        ({"a": (4, 3)}, lambda path: None, "got None at 'a'"),
        ({"a": (4, 3)}, lambda path: ("w", "left"), "at 'a'"),
    ],
)
def test_what_is_not_a_pair_of_factors_is_refused(params, factors, message):
    tx = om.orthogonalize_factors(factors)
    params = jax.tree.map(jnp.ones, params, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError, match=message):
        tx.init(params)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"factors": "lora"}, TypeError, "`factors` must be a function"),
        ({"damping": -1.0}, ValueError, "`damping`"),
        ({"damping": None}, TypeError, "`damping`"),
        ({"method": "svd"}, ValueError, "`method`"),
        ({"placement": 3}, TypeError, "`placement`"),
        ({"placement": om.Placement(period=2)}, ValueError, "period 1"),
    ],
)
def test_absurd_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        om.orthogonalize_factors(**arguments)


def test_it_needs_params_and_real_leaves():
    with pytest.raises(ValueError, match="needs the parameters"):
        EXACT.update(pair(), EXACT.init(pair()))
    with pytest.raises(TypeError, match="got dtype int32 at 'lora_a'"):
        EXACT.init(pair(dtype="int32"))
