"""qk_clip: the largest attention logits, computed again after the step."""

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

D, H, G, K, R, T = 8, 4, 2, 6, 3, 10  # width, heads, groups, channels, rotary, tokens
# Two heads are above the threshold before the step, two are below.
LIMIT = 2.0
X = np.random.default_rng(0).normal(size=(T, D))


def largest(q, k):
    """The largest logit of each head, from queries and keys (T, H, channels)."""
    return np.einsum("thc,shc->hts", q, k).max((1, 2))


# What a leaf is called, its shape, and its share; and the logits of all of them. Each
# function is attention as it is written down, in float64.


def multi_head(w):
    return largest((X @ w["q"]).reshape(T, H, K), (X @ w["k"]).reshape(T, H, K))


def with_head_axis(w):
    q, k = (np.einsum("td,hdk->thk", X, w[name]) for name in "qk")
    return largest(q, k)


def grouped(w):
    k = (X @ w["k"]).reshape(T, G, K).repeat(H // G, 1)
    return largest((X @ w["q"]).reshape(T, H, K), k)


def latent(w):
    q, k = (X @ w["q"]).reshape(T, H, K + R), (X @ w["kv"]).reshape(T, H, K + K)
    shared = np.broadcast_to((X @ w["rotary"])[:, None], (T, H, R))
    return largest(q, np.concatenate([k[..., :K], shared], -1))


def fused(w):
    q, k, _ = (X @ w["qkv"]).reshape(T, 3, H, K).swapaxes(0, 1)
    return largest(q, k)


def fused_groups(w):
    q, k, _ = np.split(X @ w["qkv"], [H * K, H * K + G * K], 1)
    k = k.reshape(T, G, K).repeat(H // G, 1)
    return largest(q.reshape(T, H, K), k)


def heads(**kwargs):
    return om.QKHeads("attn", **{"axes": 1, **kwargs})


OF_HEADS = np.repeat(np.arange(H), K)
CASES = {
    "multi-head": (
        multi_head,
        {"q": (D, H * K), "k": (D, H * K)},
        {"q": heads(), "k": heads(axes=-1)},
    ),
    "an axis of heads": (
        with_head_axis,
        {"q": (H, D, K), "k": (H, D, K)},
        {"q": heads(axes=0), "k": heads(axes=0)},
    ),
    "grouped-query": (
        grouped,
        {"q": (D, H * K), "k": (D, G * K)},
        {"q": heads(power=1.0)},
    ),
    "latent": (
        latent,
        {"q": (D, H * (K + R)), "kv": (D, H * 2 * K), "rotary": (D, R)},
        {
            "q": heads(power=np.tile([0.5] * K + [1.0] * R, H)),
            "kv": heads(power=np.tile([0.5] * K + [0.0] * K, H)),
        },
    ),
    "fused": (
        fused,
        {"qkv": (D, 3 * H * K)},
        {"qkv": heads(power=np.repeat([0.5, 0.5, 0], H * K), heads=[*OF_HEADS] * 3)},
    ),
    "fused, grouped-query": (
        fused_groups,
        {"qkv": (D, H * K + 2 * G * K)},
        {
            "qkv": heads(
                power=np.repeat([1.0, 0.0], [H * K, 2 * G * K]),
                heads=np.pad(OF_HEADS, (0, 2 * G * K)),
            )
        },
    ),
}


def problem(name):
    """Parameters, updates, and the shares of a case; two heads have large logits."""
    logits, shapes, shares = CASES[name]
    rng = np.random.default_rng(1)
    params = {leaf: 0.3 * rng.normal(size=shape) for leaf, shape in shapes.items()}
    updates = jax.tree.map(lambda p: 0.01 * rng.normal(size=p.shape), params)
    found = logits(jax.tree.map(np.add, params, updates))
    return logits, shares, params, updates, found, float(np.median(found))


def rounded(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("name", CASES)
def test_no_head_is_above_the_threshold_after_the_step(name):
    logits, shares, params, updates, found, limit = problem(name)
    assert (found > limit).sum() == 2 == (found < limit).sum()
    tx = om.qk_clip(lambda path, leaf: shares.get(path), limit)
    state = tx.init(rounded(params))
    clipped, state = tx.update(
        rounded(updates), state, rounded(params), max_logits={"attn": found}
    )
    after = jax.tree.map(lambda p, u: p + np.asarray(u, np.float64), params, clipped)
    np.testing.assert_allclose(logits(after), np.minimum(found, limit), rtol=1e-5)
    # What takes no part in the logits, or in those of other heads only.
    for leaf in params.keys() - shares.keys():
        chex.assert_trees_all_equal(clipped[leaf], rounded(updates)[leaf])
    everything = om.qk_clip(lambda path, leaf: shares.get(path), 1e3)
    same, _ = everything.update(
        rounded(updates), state, rounded(params), max_logits={"attn": found}
    )
    chex.assert_trees_all_equal(same, rounded(updates))


def test_values_of_a_fused_leaf_stay_as_they_are():
    _, shares, params, updates, found, limit = problem("fused")
    tx = om.qk_clip(lambda path, leaf: shares.get(path), limit)
    given = rounded(updates)
    clipped, _ = tx.update(
        given, optax.EmptyState(), rounded(params), max_logits={"attn": found}
    )
    chex.assert_trees_all_equal(clipped["qkv"][:, 2 * H * K :], given["qkv"][:, 48:])


@pytest.mark.parametrize("axes", [(0, 2), (1, 2)])
def test_each_layer_of_a_stack_has_its_own_heads(axes):
    layers = 3
    shape = (layers, D, H * K) if axes == (0, 2) else (D, layers, H * K)
    w, u = problems.normal(shape), problems.normal(shape, 1)
    logits = np.random.default_rng(0).uniform(1.0, 4.0, (layers, H))
    tx = om.qk_clip(lambda path, leaf: om.QKHeads("all", axes), LIMIT)
    (got,) = jax.tree.leaves(
        tx.update({"q": u}, tx.init({"q": w}), {"q": w}, max_logits={"all": logits})[0]
    )
    w, u, got = (np.moveaxis(np.asarray(x, float), axes[0], 0) for x in (w, u, got))
    for layer in range(layers):
        for head in range(H):
            columns = slice(head * K, (head + 1) * K)
            gamma = min(1.0, LIMIT / logits[layer, head])
            after = (w + u)[layer][:, columns] * gamma**0.5
            np.testing.assert_allclose(
                (w + got)[layer][:, columns], after, rtol=1e-5, atol=1e-6
            )


def one_layer(path, leaf):
    return om.QKHeads("attn", 1) if path.split("/")[0] in ("q", "k") else None


def one_tree(dtype=jnp.float32):
    tree = {"q": problems.normal((D, H * K)), "k": problems.normal((D, H * K), 1)}
    tree |= {"v": problems.normal((D, H * K), 2), "none": None}
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def test_logits_that_are_not_finite_show_in_their_head_alone():
    params, updates = one_tree(), one_tree()
    tx = om.qk_clip(one_layer, LIMIT)
    logits = {"attn": jnp.array([jnp.inf, 1.0, jnp.nan, -3.0])}
    got, _ = tx.update(updates, tx.init(params), params, max_logits=logits)
    for name in "qk":
        of_heads = got[name].reshape(D, H, K)
        assert np.isnan(of_heads[:, [0, 2]]).all()
        chex.assert_trees_all_equal(
            of_heads[:, [1, 3]], updates[name].reshape(D, H, K)[:, [1, 3]]
        )


def test_it_ends_a_chain_in_every_way_that_updates_are_called():
    params = one_tree()
    tx = optax.chain(
        om.muon(0.1, routing=lambda path, leaf: True), om.qk_clip(one_layer, LIMIT)
    )
    logits = jnp.array([1.0, 5.0, 2.0, 9.0])

    def steps(params, count):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(
                one_tree(), state, params, max_logits={"attn": logits}
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=count)[0][0]

    eager, state = params, tx.init(params)
    for _ in range(3):
        updates, state = tx.update(
            one_tree(), state, eager, max_logits={"attn": logits}
        )
        eager = optax.apply_updates(eager, updates)
    chex.assert_trees_all_close(
        jax.jit(steps, static_argnums=1)(params, 3), eager, rtol=1e-4, atol=1e-5
    )
    chex.assert_trees_all_close(
        jax.vmap(lambda p: steps(p, 1))(jax.tree.map(lambda x: x[None], params)),
        jax.tree.map(lambda x: x[None], steps(params, 1)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_every_micro_batch_clips_after_multi_steps():
    params = one_tree()
    several = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax.chain(several, om.qk_clip(one_layer, LIMIT))
    state, logits = tx.init(params), {"attn": jnp.full(H, 2 * LIMIT)}
    factors = []
    for _ in range(2):
        updates, state = tx.update(params, state, params, max_logits=logits)
        after = optax.apply_updates(params, updates)
        factors.append(float(jnp.mean(after["q"] / params["q"])))
    np.testing.assert_allclose(factors, [0.5**0.5, 0.9 * 0.5**0.5], rtol=1e-5)


def test_dtypes_boxes_and_injected_thresholds():
    narrow = one_tree(jnp.bfloat16)
    logits = {"attn": jnp.full(H, 8.0, jnp.bfloat16)}
    tx = om.qk_clip(one_layer, LIMIT)
    got, _ = tx.update(narrow, tx.init(narrow), narrow, max_logits=logits)
    chex.assert_trees_all_equal_dtypes(got, narrow)
    # The parameter 2 W becomes half as large: the update is 0.
    np.testing.assert_allclose(np.asarray(got["q"], float), 0.0, atol=1e-2)

    boxed = nnx.State(jax.tree.map(nnx.Param, one_tree()))
    state = tx.init(boxed)
    bare = {name: leaf for name, leaf in one_tree().items() if leaf is not None}
    chex.assert_trees_all_close(
        tx.update(bare, state, bare, max_logits=logits)[0]["k"],
        0 * bare["k"],
        atol=1e-5,
    )

    make = optax.inject_hyperparams(om.qk_clip, static_args=("heads",))
    injected = make(one_layer, threshold=lambda count: 100.0)
    state = injected.init(bare)
    got, _ = jax.jit(injected.update)(bare, state, bare, max_logits=logits)
    chex.assert_trees_all_equal(got, bare)


def test_sharded_heads_need_no_exchange():
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "x"))
    w = jax.device_put(problems.normal((D, 8 * K)), sharding)
    tx = om.qk_clip(lambda path, leaf: om.QKHeads("attn", 1), LIMIT)

    def update(u, w, logits):
        return tx.update(u, optax.EmptyState(), w, max_logits={"attn": logits})[0]

    logits = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P()))
    compiled = jax.jit(update, out_shardings=sharding).lower(w, w, logits).compile()
    text = compiled.as_text()
    assert not any(f"{name}(" in text for name in ("all-reduce", "all-gather"))
    assert compiled(w, w, logits).sharding == sharding


def test_bad_heads_are_refused_where_they_are_named():
    with pytest.raises(TypeError, match="`layer` must be a string, got 3"):
        om.QKHeads(3, 1)  # type: ignore
    with pytest.raises(TypeError, match="`axes` must hold integers"):
        om.QKHeads("attn", 1.5)  # type: ignore
    for axes in ((), (1, 1)):
        with pytest.raises(ValueError, match="at least one axis and none twice"):
            om.QKHeads("attn", axes)
    for power in (-0.5, [0.5, float("nan")], [[0.5]]):
        with pytest.raises(ValueError, match="`power` must be one number"):
            om.QKHeads("attn", 1, power)  # type: ignore
    with pytest.raises(TypeError, match=r"a function of \(path, leaf\), got None"):
        om.qk_clip(None)  # type: ignore
    with pytest.raises(ValueError, match="`threshold` must lie in"):
        om.qk_clip(one_layer, 0.0)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (None, ValueError, "returned None for every leaf"),
        (3, TypeError, "must return a `QKHeads` or None, got 3 at 'q'"),
        (heads(axes=2), ValueError, r"`axes` \(2,\) do not fit the leaf 'q' of shape"),
        (heads(axes=(1, -1)), ValueError, r"`axes` \(1, -1\) do not fit"),
        (
            heads(power=[0.5, 1.0]),
            ValueError,
            r"shape \(2,\), but axis 1 of 'q' has 24",
        ),
        (heads(heads=[0, 1]), ValueError, "`heads` has the shape"),
    ],
)
def test_heads_that_do_not_fit_are_refused_by_init(spec, error, message):
    tx = om.qk_clip(lambda path, leaf: spec)
    with pytest.raises(error, match=message):
        tx.init({"q": jnp.ones((D, H * K))})
    with pytest.raises(TypeError, match="real floating arrays, got dtype int32 at 'q'"):
        om.qk_clip(one_layer).init({"q": jnp.ones((D, H * K), jnp.int32)})


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (None, "needs the largest attention logits"),
        ({}, r"must have the layers \['attn'\], got \[\]"),
        ({"attn": jnp.ones(H), "b": 1}, r"got \['attn', 'b'\]"),
        ({"attn": jnp.ones(5)}, "5 heads, which do not divide the 24 coordinates"),
        ({"attn": jnp.ones((2, H))}, r"the shape \(2, 4\), but the axes \(1,\) of 'k'"),
        ({"attn": 1.0}, r"the shape \(\)"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits, message):
    params = one_tree()
    tx = om.qk_clip(one_layer)
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, max_logits=logits)
    with pytest.raises(ValueError, match="`qk_clip` needs the parameters"):
        tx.update(params, tx.init(params), max_logits={"attn": jnp.ones(H)})
    for index in (7, -1):
        spec = heads(heads=[index] + [0] * (H * K - 1))
        far = om.qk_clip(lambda path, leaf, spec=spec: spec)
        with pytest.raises(ValueError, match=r"names -?\d to \d, but .* heads 0 to 3"):
            far.update(
                params, far.init(params), params, max_logits={"attn": jnp.ones(H)}
            )
