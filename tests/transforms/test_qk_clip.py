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
LIMIT = 2.0
X = np.random.default_rng(0).normal(size=(T, D))


def largest(q, k):
    """The largest logit of each head, from queries and keys (T, H, channels)."""
    return np.einsum("thc,shc->hts", q, k).max((1, 2))


# Each function returns the logits of attention as it is written down, in float64.


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


def latent_with_head_axis(w):
    q, k = (np.einsum("td,dhk->thk", X, w[name]) for name in ("q", "kv"))
    shared = np.broadcast_to((X @ w["rotary"])[:, None], (T, H, R))
    return largest(q, np.concatenate([k[..., :K], shared], -1))


def fused_with_head_axis(w):
    q, k, _ = np.einsum("td,dnhk->nthk", X, w["qkv"])
    return largest(q, k)


def with_biases(w):
    q, k = ((X @ w[name] + w[name + "_bias"]).reshape(T, H, K) for name in "qk")
    return largest(q, k)


def share(**kwargs):
    return om.QKProjection("attn", **{"axes": 1, **kwargs})


OF_HEADS = np.repeat(np.arange(H), K)
ROTARY = [0.5] * K + [1.0] * R
CASES = {
    "multi-head": (
        multi_head,
        {"q": (D, H * K), "k": (D, H * K)},
        {"q": share(), "k": share(axes=-1)},
    ),
    "an axis of heads": (
        with_head_axis,
        {"q": (H, D, K), "k": (H, D, K)},
        {"q": share(axes=0), "k": share(axes=0)},
    ),
    "grouped-query": (
        grouped,
        {"q": (D, H * K), "k": (D, G * K)},
        {"q": share(power=1.0)},
    ),
    "latent": (
        latent,
        {"q": (D, H * (K + R)), "kv": (D, H * 2 * K), "rotary": (D, R)},
        {
            "q": share(power=np.tile(ROTARY, H)),
            "kv": share(power=np.tile([0.5] * K + [0.0] * K, H)),
        },
    ),
    "fused": (
        fused,
        {"qkv": (D, 3 * H * K)},
        {"qkv": share(power=np.repeat([0.5, 0.5, 0], H * K), heads=[*OF_HEADS] * 3)},
    ),
    "biases": (
        with_biases,
        {"q": (D, H * K), "k": (D, H * K), "q_bias": (H * K,), "k_bias": (H * K,)},
        {
            **{"q": share(), "k": share()},
            **{"q_bias": share(axes=0), "k_bias": share(axes=0)},
        },
    ),
    "latent, an axis of heads": (
        latent_with_head_axis,
        {"q": (D, H, K + R), "kv": (D, H, 2 * K), "rotary": (D, R)},
        {"q": share(power=ROTARY), "kv": share(power=[0.5] * K + [0.0] * K)},
    ),
    "fused, an axis of heads": (
        fused_with_head_axis,
        {"qkv": (D, 3, H, K)},
        {"qkv": share(axes=2, power=np.reshape([0.5, 0.5, 0.0], (3, 1, 1)))},
    ),
    "fused, grouped-query": (
        fused_groups,
        {"qkv": (D, H * K + 2 * G * K)},
        {
            "qkv": share(
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
    for leaf, update in rounded(updates).items():
        power = np.asarray(shares[leaf].power if leaf in shares else 0.0)
        untouched = np.broadcast_to(power == 0, update.shape)
        np.testing.assert_array_equal(clipped[leaf][untouched], update[untouched])
    lenient = om.qk_clip(lambda path, leaf: shares.get(path), 1e3)
    same, _ = lenient.update(
        rounded(updates), state, rounded(params), max_logits={"attn": found}
    )
    chex.assert_trees_all_equal(same, rounded(updates))


def test_groups_can_be_clipped_as_one():
    logits, _, params, updates, found, limit = problem("grouped-query")
    tx = om.qk_clip(lambda path, leaf: share(), limit)
    of_groups = found.reshape(G, H // G).max(1)
    clipped, _ = tx.update(
        rounded(updates), tx.init(rounded(params)), rounded(params),
        max_logits={"attn": of_groups},
    )  # fmt: skip
    after = jax.tree.map(lambda p, u: p + np.asarray(u, np.float64), params, clipped)
    factors = np.minimum(1.0, limit / of_groups).repeat(H // G)
    np.testing.assert_allclose(logits(after), factors * found, rtol=1e-5)


@pytest.mark.parametrize("axes", [(0, 2), (1, 2), (2, 1), (-1, 0)])
def test_each_layer_of_a_stack_has_its_own_heads(axes):
    layers, sizes = 3, {}
    sizes[axes[0] % 3], sizes[axes[1] % 3] = layers, H * K
    shape = tuple(sizes.get(axis, D) for axis in range(3))
    w, u = problems.normal(shape), problems.normal(shape, 1)
    logits = np.random.default_rng(0).uniform(1.0, 4.0, (layers, H))
    tx = om.qk_clip(lambda path, leaf: om.QKProjection("all", axes), LIMIT)
    got, _ = tx.update(
        {"q": u}, tx.init({"q": w}), {"q": w}, max_logits={"all": logits}
    )
    w, u, got = (
        np.moveaxis(np.asarray(x, float), axes, (0, 1)) for x in (w, u, got["q"])
    )
    gamma = np.minimum(1.0, LIMIT / logits).repeat(K, axis=1)[..., None]
    np.testing.assert_allclose(w + got, (w + u) * gamma**0.5, rtol=1e-5, atol=1e-6)


def one_layer(path, leaf):
    return om.QKProjection("attn", 1) if path.split("/")[0] in ("q", "k") else None


def one_tree(dtype=jnp.float32):
    tree = {"q": problems.normal((D, H * K)), "k": problems.normal((D, H * K), 1)}
    tree |= {"v": problems.normal((D, H * K), 2), "none": None}
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def test_logits_that_are_not_finite_show_in_their_head_alone():
    params, updates = one_tree(), one_tree()
    tx = om.qk_clip(one_layer, LIMIT)
    logits = {"attn": jnp.array([jnp.inf, 1.0, jnp.nan, -jnp.inf])}
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
    scanned = jax.jit(steps, static_argnums=1)(params, 3)
    chex.assert_trees_all_close(scanned, eager, rtol=1e-4, atol=1e-5)
    several = jax.vmap(lambda p: steps(p, 1))(jax.tree.map(lambda x: x[None], params))
    alone = jax.tree.map(lambda x: x[None], steps(params, 1))
    chex.assert_trees_all_close(several, alone, rtol=1e-4, atol=1e-5)
    # The clip acts: heads 1 and 3 are shrunk in each of the three steps.
    norms = np.linalg.norm(np.asarray(eager["k"]).reshape(D, H, K), axis=(0, 2))
    assert max(norms[1], norms[3]) < min(norms[0], norms[2]) / 2


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


def test_an_update_keeps_its_dtype():
    narrow = one_tree(jnp.bfloat16)
    logits = {"attn": jnp.full(H, 4 * LIMIT, jnp.bfloat16)}
    tx = om.qk_clip(one_layer, LIMIT)
    got, _ = tx.update(narrow, tx.init(narrow), narrow, max_logits=logits)
    chex.assert_trees_all_equal_dtypes(got, narrow)
    # The parameter 2 W becomes half as large: the update is 0.
    np.testing.assert_allclose(np.asarray(got["q"], float), 0.0, atol=1e-2)
    assert np.any(np.asarray(narrow["q"], float))


@pytest.mark.parametrize("boxed", ["params", "both"])
def test_flax_boxes_are_named_like_their_content(boxed):
    bare = {name: leaf for name, leaf in one_tree().items() if leaf is not None}
    box = nnx.State(jax.tree.map(nnx.Param, bare))
    tx = om.qk_clip(one_layer, LIMIT)
    logits = {"attn": jnp.full(H, 4 * LIMIT)}
    updates = box if boxed == "both" else nnx.State(bare)
    got, _ = tx.update(updates, tx.init(box), box, max_logits=logits)
    chex.assert_trees_all_equal_structs(got, updates)
    want, _ = tx.update(bare, tx.init(bare), bare, max_logits=logits)
    for mine, plain in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, plain)


def test_updates_without_a_leaf_of_the_parameters_are_refused():
    params, logits = one_tree(), {"attn": jnp.full(H, 1.0)}
    tx = om.qk_clip(one_layer)
    with pytest.raises(ValueError, match="Expected None, got Array"):
        tx.update(params | {"q": None}, tx.init(params), params, max_logits=logits)


def test_masked_leaves_need_no_logits_and_other_layers_may_have_some():
    params = one_tree()
    masked = optax.masked(om.qk_clip(one_layer, LIMIT), {
        **dict.fromkeys("qkv", False), "k": True, "none": None
    })  # fmt: skip
    logits = {"attn": jnp.full(H, 4 * LIMIT), "other": jnp.ones(2)}
    got, _ = masked.update(params, masked.init(params), params, max_logits=logits)
    chex.assert_trees_all_equal((got["q"], got["v"]), (params["q"], params["v"]))
    np.testing.assert_allclose(got["k"], 0.0, atol=1e-5)


def test_an_injected_threshold_may_be_a_schedule():
    params, logits = one_tree(), {"attn": jnp.full(H, 4 * LIMIT)}
    make = optax.inject_hyperparams(om.qk_clip, static_args=("projections",))
    injected = make(one_layer, threshold=lambda count: LIMIT * (1 + count))
    state = injected.init(params)
    for limit in (LIMIT, 2 * LIMIT):
        got, state = jax.jit(injected.update)(params, state, params, max_logits=logits)
        tx = om.qk_clip(one_layer, limit)
        want, _ = tx.update(params, optax.EmptyState(), params, max_logits=logits)
        chex.assert_trees_all_close(got, want, rtol=1e-6)


@pytest.mark.parametrize("logits_spec", [P(), P("x")])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(D, 8 * K), (D, 8, K)])
def test_sharded_heads_need_no_exchange(shape, axis_type, logits_spec):
    mesh = jax.make_mesh((8,), ("x",), (axis_type,))
    sharding = NamedSharding(mesh, P(None, "x"))
    w = jax.device_put(problems.normal(shape), sharding)
    logits = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, logits_spec))
    tx = om.qk_clip(lambda path, leaf: om.QKProjection("attn", 1), LIMIT)

    def update(u, w, logits):
        return tx.update(u, optax.EmptyState(), w, max_logits={"attn": logits})[0]

    with jax.set_mesh(mesh):
        compiled = jax.jit(update).lower(w, w, logits).compile()
    exchanges = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    assert not any(name in compiled.as_text() for name in exchanges)
    got = compiled(w, w, logits)
    assert got.sharding.is_equivalent_to(sharding, len(shape))
    gamma = np.minimum(1.0, LIMIT / np.maximum(np.arange(8.0), 1e-9))
    factor = gamma.repeat(w.size // D // 8).reshape(1, *shape[1:])
    want = (2 * factor**0.5 - 1) * np.asarray(w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bad_descriptions_are_refused_where_they_are_made():
    with pytest.raises(TypeError, match="`layer` must be a string, got 3"):
        om.QKProjection(3, 1)  # type: ignore
    with pytest.raises(TypeError, match="`axes` must hold integers"):
        om.QKProjection("attn", 1.5)  # type: ignore
    with pytest.raises(ValueError, match="at least one axis"):
        om.QKProjection("attn", ())
    for power in (-0.5, [0.5, float("nan")]):
        with pytest.raises(ValueError, match="`power` must not be negative"):
            om.QKProjection("attn", 1, power)
    with pytest.raises(TypeError, match="`heads` must hold integers"):
        om.QKProjection("attn", 1, heads=[0.0, 1.0])  # type: ignore
    for heads in ([0, -1], [[0, 1]]):
        with pytest.raises(ValueError, match="a list of indices from 0"):
            om.QKProjection("attn", 1, heads=heads)  # type: ignore
    for bad in (None, "attn", {}, {"q": om.QKProjection("attn", 1)}):
        with pytest.raises(TypeError, match=r"`projections` must be a function"):
            om.qk_clip(bad)  # type: ignore
    for bad in (0.0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`threshold` must lie in"):
            om.qk_clip(one_layer, bad)
    for bad in ("100", None, True, [1.0], np.ones(2), 1j, optax.constant_schedule(1.0)):
        with pytest.raises(TypeError, match="`threshold` must be a real number"):
            om.qk_clip(one_layer, bad)  # type: ignore


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (None, ValueError, "returned None for every leaf"),
        (False, TypeError, "must return a `QKProjection` or None, got False at 'q'"),
        (share(axes=2), ValueError, r"`axes` \(2,\) do not fit the leaf 'q' of shape"),
        (share(axes=(1, -1)), ValueError, r"`axes` \(1, -1\) do not fit"),
        (share(power=[0.5, 1]), ValueError, r"shape \(2,\), which does not broadcast"),
        (share(power=[[[0.5]]]), ValueError, r"\(1, 1, 1\), which does not broadcast"),
        (share(heads=[0, 1]), ValueError, "2 entries, but axis 1 of 'q' has 24"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused_by_init(spec, error, message):
    tx = om.qk_clip(lambda path, leaf: spec)
    with pytest.raises(error, match=message):
        tx.init({"q": jnp.ones((D, H * K))})


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
def test_leaves_that_are_not_real_floating_are_refused(dtype):
    tx = om.qk_clip(one_layer)
    with pytest.raises(TypeError, match=f"arrays, got dtype {dtype} at 'q'"):
        tx.init({"q": jnp.ones((D, H * K), dtype)})


def test_leaves_without_entries_pass():
    params, logits = {"q": jnp.ones((0, H * K)), "k": jnp.ones((D, 0))}, jnp.ones(H)
    tx = om.qk_clip(one_layer, 0.5)
    got, _ = tx.update(params, tx.init(params), params, max_logits={"attn": logits})
    chex.assert_trees_all_equal(got, params)


def test_missing_parameters_are_refused():
    params, tx = one_tree(), om.qk_clip(one_layer)
    with pytest.raises(ValueError, match="`qk_clip` needs the parameters"):
        tx.update(params, tx.init(params), max_logits={"attn": jnp.ones(H)})


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (None, TypeError, "needs the largest attention logits"),
        (jnp.ones(H), TypeError, "max_logits={layer: logits}"),
        ({}, ValueError, r"lacks the layers \['attn'\]; it has none"),
        ({"b": 1.0, 3: 1.0}, ValueError, r"lacks the layers \['attn'\]; it has 3, b"),
        ({"attn": jnp.ones(5)}, ValueError, "5 heads, which do not divide the 24"),
        (
            {"attn": jnp.ones((2, H))},
            ValueError,
            r"shape \(2, 4\), but the axes \(1,\)",
        ),
        ({"attn": 1.0}, ValueError, r"the shape \(\)"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits, error, message):
    params, tx = one_tree(), om.qk_clip(one_layer)
    with pytest.raises(error, match=message):
        tx.update(params, tx.init(params), params, max_logits=logits)


def test_heads_that_the_logits_do_not_have_are_refused():
    params = one_tree()
    spec = share(heads=[7] + [0] * (H * K - 1))
    tx = om.qk_clip(lambda path, leaf: spec)
    with pytest.raises(ValueError, match=r"names head 7, but .* has heads 0 to 3"):
        tx.update(params, tx.init(params), params, max_logits={"attn": jnp.ones(H)})
