"""check_clipping: warnings of clips by global norm that follow an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from tests import problems

check = om.diagnostics.check_clipping
CLIP = optax.clip_by_global_norm(0.1)
PARAMS = {
    "embed": {"embedding": problems.normal((11, 8), 0)},
    "layers": [
        {
            "up": {"kernel": problems.normal((8, 12), seed), "bias": jnp.ones(12)},
            "down": {"kernel": problems.normal((12, 8), seed + 1)},
        }
        for seed in (1, 3)
    ],
}
ALL = sorted(om.MATRIX_OPTIMIZERS)


@pytest.mark.parametrize(
    "limit, sizes, wanted",
    [
        (10.0, (9, 4, 16, 1), ""),
        (5.45, (9, 4, 16, 1), ""),
        (5.40, (9, 4, 16, 1), "abcd"),
        (1e-3, (9, 4, 16, 1), "abcd"),
        # The others hardly shorten the first one.
        (9.0, (400, 1, 4, 1), "bcd"),
    ],
)
def test_leaves_are_found_by_the_formula(limit, sizes, wanted):
    # Steps of signs have the length √n, whatever the gradients are.
    params = {name: jnp.zeros(n) for name, n in zip("abcd", sizes, strict=True)}
    a, b, c, d = sizes
    halves = [[a + c, b + d, a + c, b + d], [a + b, a + b, c + d, c + d]]
    together = min(1, limit / np.sqrt(sum(sizes)))
    apart = np.minimum(1, limit / np.sqrt(halves)).max(0)
    names = [n for n, f in zip("abcd", together / apart, strict=True) if f < 0.99]
    assert names == list(wanted)
    tx = optax.chain(optax.scale_by_sign(), optax.clip_by_global_norm(limit))
    if not wanted:
        assert check(tx, params) == []
        return
    with pytest.warns(UserWarning) as caught:
        assert check(tx, params) == names
    (message,) = [str(one.message) for one in caught]
    assert ", ".join(f"'{name}'" for name in names) in message
    assert "`optax.chain(optax.clip_by_global_norm(limit), optimizer)`" in message
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "name",
    [n if n == "muon" else pytest.param(n, marks=pytest.mark.slow) for n in ALL],
)
def test_a_clip_after_every_optimizer_warns_and_one_before_it_does_not(name):
    params = PARAMS
    if name in ("spectral_sphere", "spel"):
        # Beside the way to their manifold, steps are short.
        pull = om.OPTIMIZERS[name](0.1)
        zeros = jax.tree.map(jnp.zeros_like, params)
        (*_, params), _ = problems.run(pull, params, [zeros] * 2)
    tx = om.OPTIMIZERS[name](0.1)
    assert check(tx, params) == check(optax.chain(CLIP, tx), params) == []
    with pytest.warns(UserWarning, match="'layers/0/down/kernel'"):
        found = check(optax.chain(tx, CLIP), params)
    assert len(found) >= 4


def test_only_the_group_that_is_clipped_is_named():
    muon = om.orthogonalize_newton_schulz(5)
    labels = jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "other", PARAMS)
    clipped = {"matrix": optax.chain(muon, CLIP), "other": optax.adam(0.1)}
    with pytest.warns(UserWarning, match="by a global norm"):
        found = check(optax.partition(clipped, labels), PARAMS)
    assert len(found) == 5 and not any("bias" in name for name in found)
    with pytest.warns(UserWarning):
        swapped = {"matrix": muon, "other": optax.chain(optax.adam(0.1), CLIP)}
        found = check(optax.partition(swapped, labels), PARAMS)
    assert found == ["layers/0/up/bias", "layers/1/up/bias"]


def test_leaves_far_apart_are_compared():
    params = {str(i): jnp.ones(3) for i in range(8)}
    for pair in ("01", "02", "04"):
        clip = optax.masked(CLIP, {name: name in pair for name in params})
        with pytest.warns(UserWarning):
            found = check(optax.chain(optax.scale_by_sign(), clip), params)
        assert found == list(pair)


LORA = {
    layer: {
        "lora_a": problems.normal((16, 4), seed) / 4,
        "lora_b": problems.normal((4, 16), seed + 1) / 100,
    }
    for seed, layer in enumerate("qv")
}
SILENT = {
    # Steps in proportion to gradients: tiny ones are not clipped.
    "gradient descent": optax.chain(optax.sgd(10.0), CLIP),
    "a clip of each leaf": optax.chain(optax.adam(0.1), optax.clip_by_block_rms(0.1)),
    "a clip that does not act": optax.chain(optax.adam(1e-4), CLIP),
    "normalized gradients": optax.chain(optax.normalize_by_update_norm(), om.muon(0.1)),
    "injected": optax.inject_hyperparams(om.muon)(learning_rate=0.1),
    "finite": optax.apply_if_finite(optax.chain(CLIP, om.muon(0.1)), 3),
}


@pytest.mark.parametrize("name", SILENT)
def test_other_couplings_do_not_warn(name):
    assert check(SILENT[name], PARAMS) == []


@pytest.mark.parametrize("kind", ["masked", "bfloat16", "nnx", "injected", "finite"])
def test_any_tree_and_wrapper_is_checked(kind):
    make = optax.inject_hyperparams(om.muon) if kind == "injected" else om.muon
    params, tx = PARAMS | {"frozen": None}, optax.chain(make(0.1), CLIP)
    if kind == "masked":
        params |= {"other": optax.MaskedNode()}
    elif kind == "bfloat16":
        params = optax.tree.cast(params, jnp.bfloat16)
    elif kind == "nnx":
        layers = nnx.List(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))
        params = nnx.state(nnx.Dict(up=layers), nnx.Param)
    elif kind == "finite":
        tx = optax.apply_if_finite(tx, 3)
    with pytest.warns(UserWarning, match="/up/kernel|up/0/kernel"):
        found = check(tx, params)
    assert not any(name.endswith("value") for name in found)


def test_extra_arguments_are_passed_on():
    share = om.QKProjection("attn", axes=1)
    params = {"attn": {"query": {"kernel": problems.normal((8, 8))}}} | PARAMS
    clip = om.qk_clip(
        lambda path, _: share if "query" in path else None, threshold=10.0
    )
    logits = {"attn": jnp.full(2, 40.0)}
    tx = optax.chain(CLIP, om.muon(0.1), clip)
    assert check(tx, params, max_logits=logits) == []
    with pytest.warns(UserWarning):
        check(optax.chain(om.muon(0.1), CLIP, clip), params, max_logits=logits)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters(kind):
    params = {
        name: {"kernel": problems.normal((16, 8), i)} for i, name in enumerate("ab")
    }
    tx = optax.chain(om.muon(0.1, routing="matrix"), CLIP)
    with pytest.warns(UserWarning):
        wanted = check(tx, params)
    mesh = jax.make_mesh((8,), ("x",), (kind,))
    with jax.set_mesh(mesh), pytest.warns(UserWarning):
        sharded = jax.device_put(params, jax.NamedSharding(mesh, P("x", None)))
        found = check(tx, sharded)
    assert found == wanted == ["a/kernel", "b/kernel"]


def test_factors_may_depend_on_the_parameters_of_others():
    lora = (om.orthogonalize_factors(), optax.scale_by_learning_rate(0.1))
    assert check(optax.chain(om.ema_momentum(0.95), *lora), LORA) == []


def test_strict_promotion_and_large_leaves_in_half_precision():
    params = {"a": jnp.ones((256, 300), jnp.float16), "b": jnp.ones(3, jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        assert check(optax.scale_by_sign(), params) == []


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="`tx` makes steps of zero"):
        check(om.muon(optax.linear_schedule(0.0, 0.0, 9)), PARAMS)
    with pytest.raises(
        ValueError, match=r"not finite .* norm 0.001: 'embed/embedding'"
    ):
        check(optax.scale(jnp.inf), PARAMS)
    unit = optax.stateless(lambda u, _: jax.tree.map(lambda x: x / abs(x).max(), u))
    with pytest.raises(
        ValueError, match=r"not finite .* if some gradients are zero: '"
    ):
        check(optax.chain(unit, CLIP), PARAMS)
    with pytest.raises(ValueError, match=r"`params` must .* 2 leaves, .* 1"):
        check(optax.adam(0.1), {"kernel": jnp.ones((3, 2))})
