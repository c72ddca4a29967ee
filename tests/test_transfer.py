"""Learning rates that transfer over width, depth and tokens, leaf by leaf."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from tests import problems

SHAPES = {
    "embed": {"embedding": (50, 1)},
    "layers": [
        {
            "attn": {"kernel": (1, 1), "bias": (1,)},
            "up": {"kernel": (1, 4)},
            "down": {"kernel": (4, 1)},
            "norm": {"scale": (1,)},
        }
    ],
    "head": {"kernel": (1, 50), "bias": (50,)},
}


def model(width):
    """A tree of which every size but that of the vocabulary grows with the width."""

    def leaf(shape):
        grown = [n if n == 50 else n * width for n in shape]
        return problems.normal(grown, seed=sum(grown)) / np.sqrt(grown[0])

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


WIDENED = {
    "square": ((8, 8), (32, 32)),
    "inputs": ((8, 32), (32, 32)),
    "outputs": ((16, 8), (16, 64)),
    "stack": ((2, 8, 16), (2, 32, 16)),
}
EXACT = {"orthogonalize": "exact", "momentum": 0.0, "routing": "matrix"}


@pytest.mark.parametrize(
    "unit, optimizer",
    [
        ("entrywise", om.OPTIMIZERS["adamw"]),
        ("orthogonal", lambda rate: om.muon(rate, shape_scale=None, **EXACT)),
        ("spectral", lambda rate: om.muon(rate, **EXACT)),
        ("spectral", om.muonh),
        ("mup", lambda rate: om.muon(rate, shape_scale="mup", **EXACT)),
        ("rms", lambda rate: om.muon(rate, shape_scale="rms", **EXACT)),
    ],
)
def test_steps_of_all_widths_have_the_spectral_norms_of_mup(unit, optimizer):
    def normal(place, seed):
        shapes = {name: shape[place] for name, shape in WIDENED.items()}
        return {name: problems.normal(shape, seed) for name, shape in shapes.items()}

    def norms(place, factors):
        """The spectral norms of the first steps, over √(outputs / inputs)."""
        exact = EXACT if optimizer is om.muonh else {}
        tx = om.with_learning_rate_factors(
            lambda f: optimizer(1e-3 * f, **exact), factors
        )
        params, grads = normal(place, 0), normal(place, 1)
        # With entries of variance 1/m, a matrix has the norm √n.
        for name, x in params.items():
            norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
            params[name] = x / norm * x.shape[-1] ** 0.5
        if unit == "entrywise":  # The rule of AdamW is for gradients of rank one.
            grads = {name: x[..., :1] * x[..., :1, :] for name, x in grads.items()}
        updates, _ = tx.update(grads, tx.init(params), params)
        found = {}
        for name, update in updates.items():
            m, n = jnp.shape(update)[-2:]
            found[name] = np.linalg.norm(update, 2, axis=(-2, -1)) / (n / m) ** 0.5
        return found

    factors = om.width_factors(normal(1, 0), normal(0, 0), unit, routing="matrix")
    ones = dict.fromkeys(WIDENED, 1.0)
    small, large = norms(0, ones), norms(1, factors)
    # MuonH's step is tangent to the sphere, which takes a little of its length.
    rtol = 0.1 if optimizer is om.muonh else 0.01
    chex.assert_trees_all_close(large, small, rtol=rtol)
    without = norms(1, ones)
    ratios = [np.max(without[name] / small[name]) for name in WIDENED]
    assert max(ratios) > 1.3 or unit == "mup"


def test_every_kind_of_leaf_has_its_factor():
    base, params = model(8), model(32)
    got = om.width_factors(params, base, "entrywise")
    chex.assert_trees_all_equal_structs(got, params)
    assert got["embed"]["embedding"] == got["layers"][0]["norm"]["scale"] == 1
    assert got["head"]["kernel"] == 1 / 4 and got["head"]["bias"] == 1
    layer = got["layers"][0]
    assert layer["attn"]["kernel"] == layer["up"]["kernel"] == 1 / 4
    assert layer["down"]["kernel"] == 1 / 4 and layer["attn"]["bias"] == 1
    assert set(jax.tree.leaves(om.width_factors(params, base, "mup")["layers"])) == {
        1.0
    }
    shapes = jax.eval_shape(lambda: params), jax.eval_shape(lambda: base)
    assert om.width_factors(*shapes, "entrywise") == got
    assert set(jax.tree.leaves(om.width_factors(params, params, "rms"))) == {1.0}


def structs(**shapes):
    """A tree of shapes whose leaves are kernels of modules."""
    return {
        n: {"kernel": jax.ShapeDtypeStruct(x, "float32")} for n, x in shapes.items()
    }


def test_leaves_are_read_by_their_layouts():
    layout = om.MatrixLayout(inputs=(1, 2), outputs=3)
    base, params = structs(o=(3, 2, 8, 10)), structs(o=(3, 8, 8, 30))
    got = om.width_factors(params, base, "orthogonal", routing=lambda p, x: layout)
    np.testing.assert_allclose(
        got["o"]["kernel"], np.sqrt((30 / 64) / (10 / 16)), rtol=1e-11
    )
    # Heads are a batch of matrices of one size, and more of them need no factor.
    layout = om.MatrixLayout(inputs=0, outputs=2)
    base, params = structs(q=(64, 2, 32)), structs(q=(256, 8, 32))
    got = om.width_factors(params, base, "entrywise", routing=lambda p, x: layout)
    assert got["q"]["kernel"] == 1 / 4

    def grouped(path, leaf):
        width = leaf.shape[0]
        return om.MatrixLayout(split_outputs=(width, width // 4, width // 4))

    base, params = structs(qkv=(64, 96)), structs(qkv=(256, 384))
    got = om.width_factors(params, base, "rms", routing=grouped)
    assert got["qkv"]["kernel"] == 1 / 2


def test_readouts_are_known_by_the_rules():
    base = structs(
        embed=(17, 64), head=(64, 50), router=(64, 8), embedding=(16, 16, 3, 64),
        logits=(4, 16, 10),
    )  # fmt: skip
    params = structs(
        embed=(17, 256), head=(256, 99), router=(256, 32), embedding=(16, 16, 3, 256),
        logits=(16, 16, 10),
    )  # fmt: skip
    got = om.width_factors(params, base, "mup")
    assert {name: x["kernel"] for name, x in got.items()} == {
        **{"embed": 1, "embedding": 1},
        **{"head": 1 / 4, "router": 1 / 4, "logits": 1 / 4},
    }
    stacks = [
        {
            "moe": {
                "norm": {"scale": np.zeros((12, n))},
                "router": {"kernel": np.zeros((12, n, 8))},
            }
        }
        for n in (64, 128)
    ]
    got = om.width_factors(stacks[1], stacks[0], "rms")
    assert got["moe"]["router"]["kernel"] == 1 / 2 and got["moe"]["norm"]["scale"] == 1
    # One that only has more outputs is not scaled.
    got = om.width_factors(structs(head=(64, 99)), structs(head=(64, 50)), "mup")
    assert got["head"]["kernel"] == 1


def test_readouts_that_the_rules_do_not_know_are_told():
    base, params = (
        {"head": {"weight": np.zeros((50, n))}, "k": np.zeros((n, n))} for n in (8, 32)
    )
    given = {"routing": lambda path, leaf: path == "k"}
    with pytest.raises(ValueError, match=r"`readouts` .* 'head/weight' .*\(50, 32\)"):
        om.width_factors(params, base, "entrywise", **given)
    layout = om.MatrixLayout(inputs=-1, outputs=-2)
    for told, want in ((layout, 1 / 4), (True, 1), (False, 1)):
        got = om.width_factors(
            params, base, "entrywise", **given,
            readouts=lambda path, leaf, told=told: told,
        )  # fmt: skip
        assert got["head"]["weight"] == want and got["k"] == 1 / 4
    with pytest.raises(TypeError, match="`readouts` must be True or False"):
        om.width_factors(params, base, "rms", readouts=lambda p, x: "yes", **given)
    with pytest.raises(TypeError, match="`readouts` must be a function"):
        om.width_factors(params, base, "rms", readouts=["head"], **given)
    # A hidden kernel that routing gives to AdamW is scaled as AdamW's.
    base, params = structs(o=(8, 8), up=(8, 16)), structs(o=(32, 32), up=(32, 64))
    got = om.width_factors(params, base, "mup", routing=lambda path, x: path[0] == "u")
    assert got["o"]["kernel"] == 1 / 4 and got["up"]["kernel"] == 1


def test_equal_factors_are_equal_numbers():
    base, params = (
        structs(up=(256, 512), head=(256, 50)),
        structs(up=(768, 1536), head=(768, 50)),
    )
    got = om.width_factors(params, base, "entrywise")
    assert (
        got["up"]["kernel"] == got["head"]["kernel"] == pytest.approx(1 / 3, rel=1e-11)
    )


def test_a_base_that_is_not_the_same_model_is_refused():
    base, params = model(8), model(32)
    del base["layers"][0]["up"]["kernel"]
    with pytest.raises(
        ValueError, match=r"`base` has no entry for 'layers/0/up/kernel'"
    ):
        om.width_factors(params, base, "rms")
    base = model(8)
    base["head"]["kernel"] = jnp.ones((8, 5, 10))
    with pytest.raises(
        ValueError, match=r"\(8, 5, 10\) for 'head/kernel', .*\(32, 50\)"
    ):
        om.width_factors(params, base, "rms")
    with pytest.raises(
        ValueError, match=r"`base` must be the same model .* 'up/kernel'"
    ):
        om.width_factors(structs(up=(8, 8)), np.zeros((4, 4)), "rms", routing="matrix")
    with pytest.raises(ValueError, match=r"`base` must be routed as .*'up/kernel'"):
        om.width_factors(
            structs(up=(8, 8)), structs(up=(4, 4)), "rms",
            routing=lambda path, leaf: leaf.shape[0] == 8,
        )  # fmt: skip
    layout = om.MatrixLayout(split_outputs=(8, 4))
    with pytest.raises(ValueError, match=r"one factor to each leaf.*'qkv/kernel'"):
        om.width_factors(
            structs(qkv=(16, 12)), structs(qkv=(4, 12)), "spectral",
            routing=lambda path, leaf: layout,
        )  # fmt: skip

    def fewer(path, leaf):
        return om.MatrixLayout(split_outputs=(8, 4) if leaf.shape[0] == 16 else None)

    with pytest.raises(ValueError, match=r"as many blocks.*'qkv/kernel'"):
        om.width_factors(
            structs(qkv=(16, 12)), structs(qkv=(4, 8)), "spectral", routing=fewer
        )
    with pytest.raises(ValueError, match="`unit` must be one of 'entrywise'"):
        om.width_factors(params, model(8), "adam")


def factors_of(params):
    """Factors of which each kind of leaf has another one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            {1: 0.5, 2: 2.0}.get(leaf.ndim, 1.0)
            if "embed" not in jax.tree_util.keystr(path)
            else 0.25
        ),
        params,
    )


OPTIMIZERS = {
    "adamw": lambda f: optax.adamw(0.01 * f, weight_decay=0.1),
    "muonh": lambda f: om.muonh(optax.linear_schedule(0.1 * f, 0.0, 10)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_leaf_is_trained_as_by_an_optimizer_at_its_rate(name):
    params = problems.matrix_tree()
    factors = factors_of(params)
    grads = [problems.matrix_tree(seed=i) for i in range(3)]
    tx = om.with_learning_rate_factors(OPTIMIZERS[name], factors)
    (*_, got), _ = problems.run(tx, params, grads)
    by_factor = {}
    for factor in set(jax.tree.leaves(factors)):
        (*_, by_factor[factor]), _ = problems.run(
            OPTIMIZERS[name](factor), params, grads
        )
    want = jax.tree.map(
        lambda f, *xs: xs[[*by_factor].index(f)], factors, *by_factor.values()
    )
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_prefix_of_factors_and_wrappers(tmp_path):
    params, grads = problems.matrix_tree(), problems.matrix_tree(seed=1)
    factors = {name: 0.5 if name == "embed" else 1.0 for name in params}

    @optax.inject_hyperparams
    def injected(rate):
        return om.with_learning_rate_factors(lambda f: om.muon(rate * f), factors)

    plain = om.with_learning_rate_factors(lambda f: om.muon(0.02 * f), factors)
    (_, want), state = problems.run(plain, params, [grads, grads])
    (_, got), _ = problems.run(injected(rate=0.02), params, [grads, grads])
    chex.assert_trees_all_close(got, want, rtol=1e-5)
    every = optax.MultiSteps(plain, 2)
    (*_, got), _ = problems.run(every, params, [grads] * 4)
    chex.assert_trees_all_close(got, want, rtol=1e-5)
    chex.assert_trees_all_equal(problems.restored(state, tmp_path / "state"), state)


def test_leaves_are_routed_as_in_the_whole_tree():
    # Without its experts, which have another factor, the router is a hidden matrix.
    def tree(d):
        gate, experts = {"kernel": jnp.ones((d, 8))}, jnp.ones((8, d, 4 * d))
        return {"moe": {"gate": gate, "wi": experts}, "q": {"kernel": jnp.ones((d, d))}}

    params = tree(32)
    factors = om.width_factors(params, tree(16), "spectral")
    assert factors["moe"]["gate"]["kernel"] == 0.5 and factors["moe"]["wi"] == 1.0
    tx = om.with_learning_rate_factors(lambda f: om.muon(0.02 * f), factors)
    state = tx.init(params)
    for _ in range(2):
        momenta = {
            factor: optax.tree.get(group.inner_state.inner_states["matrix"], "momentum")
            for factor, group in state.inner_states.items()
        }
        assert not jax.tree.leaves(momenta["0.5"])
        assert len(jax.tree.leaves(momenta["1.0"])) == 2
        _, state = jax.jit(tx.update)(params, state, params)


def test_evidence_ends_with_the_update_and_passes_masks_and_nesting():
    params = {"up": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    # Alone, a kernel of three axes is ambiguous; its bias tells how to read it.
    params["mix"] = {"kernel": jnp.ones((4, 2, 6)), "bias": jnp.ones((2, 6))}
    factors = {"up": 1.0, "mix": {"kernel": 1.0, "bias": 0.5}}
    make = lambda factor: om.muon(0.02 * factor)  # noqa: E731
    tx = om.with_learning_rate_factors(make, factors)
    masked = params | {"mix": params["mix"] | {"bias": optax.MaskedNode()}}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    with pytest.raises(ValueError, match="'mix/kernel'"):
        make(1.0).init(masked)
    # States have the structure of those of `optax.partition`.
    assert serialization.from_bytes(state, serialization.to_bytes(state))
    nested = om.with_learning_rate_factors(
        lambda f: om.with_learning_rate_factors(lambda g: make(f * g), factors), 1.0
    )
    got, _ = jax.jit(nested.update)(params, nested.init(params), params)
    chex.assert_trees_all_close(got, updates)


def test_matrices_of_one_factor_move_together_on_eight_devices():
    params = {
        name: {"kernel": problems.normal((16, 16), i)} for i, name in enumerate("abc")
    }
    factors = {"a": 1.0, "b": 1.0, "c": 0.5}
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    sharded = jax.device_put(params, NamedSharding(mesh, P("x")))

    def make(placement):
        return om.with_learning_rate_factors(
            lambda f: om.muon(0.1 * f, placement=placement), factors
        )

    (want,), _ = problems.run(make(None), params, [params])
    tx = make(om.Placement(sharded))
    (got,), _ = problems.run(tx, sharded, [sharded])
    chex.assert_trees_all_close(got, want, atol=1e-6)
    step = jax.jit(tx.update).lower(sharded, tx.init(sharded), sharded)
    # One exchange to whole matrices and one back, for each of two factors.
    assert (step.compile().as_text() or "").count(" all-to-all(") == 4


def test_boxed_parameters_have_the_factors_of_bare_ones():
    net = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    params = nnx.state(net, nnx.Param)
    factors = om.width_factors(
        params, nnx.state(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))),
        "entrywise",
    )  # fmt: skip
    tx = om.with_learning_rate_factors(lambda f: optax.sgd(f), factors)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    before = net.kernel[...]
    optimizer.update(net, nnx.grad(lambda net: net(jnp.ones((1, 4))).sum())(net))
    np.testing.assert_allclose(before - net.kernel[...], 0.5, rtol=1e-6)
    np.testing.assert_allclose(net.bias[...], -1.0, rtol=1e-6)


def test_bad_factors_are_refused_with_their_path():
    def adam(factor):
        return optax.adam(factor)

    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"factors\['a/b'\]"):
            om.with_learning_rate_factors(adam, {"a": {"b": bad}})
    with pytest.raises(TypeError, match=r"factors\['a'\]"):
        om.with_learning_rate_factors(adam, {"a": "small"})
    with pytest.raises(TypeError, match="`optimizer` must be a function"):
        om.with_learning_rate_factors(optax.adam(1e-3), {"a": 1.0})
    with pytest.raises(TypeError, match="`optimizer` must return an optax"):
        om.with_learning_rate_factors(lambda f: f, {"a": 1.0})
    tx = om.with_learning_rate_factors(adam, {"a": 1.0})
    with pytest.raises(ValueError, match="`factors` has no entry for 'b'"):
        tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(
        ValueError, match="`factors` must have a number, got None at 'b'"
    ):
        with_none = om.with_learning_rate_factors(adam, {"a": 1.0, "b": None})
        with_none.init({"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"factors\['a'\]` fixes the program"):
        jax.jit(lambda f: om.with_learning_rate_factors(adam, {"a": f}))(1.0)


def test_hyperp_is_its_formula():
    assert om.hyperp_factor() == 1
    np.testing.assert_allclose(om.hyperp_factor(depth_ratio=4), 0.5)
    np.testing.assert_allclose(om.hyperp_factor(token_ratio=100), 10**-0.64)
    np.testing.assert_allclose(
        om.hyperp_factor(depth_ratio=9, token_ratio=0.1), 10**0.32 / 3
    )
    for name in ("depth_ratio", "token_ratio"):
        with pytest.raises(ValueError, match=f"`{name}` must lie in"):
            om.hyperp_factor(**{name: 0})


def power_law(width):
    """Activations of which one grows as the width, one not, and one stays."""
    rng = np.random.default_rng(width)
    signs = np.sign(rng.standard_normal((5, width)))
    return [
        {"a": {"grows": t * width * signs, "same": -t * signs[0]}, "still": signs}
        for t in range(4)
    ]


def test_exponents_are_those_of_power_laws():
    check = om.diagnostics.coordinate_check(power_law, [16, 64, 128])
    assert check.widths == (16, 64, 128)
    np.testing.assert_allclose(
        check.changes["a/grows"], np.outer([1, 2, 3], [16, 64, 128])
    )
    np.testing.assert_allclose(check.exponents["a/grows"], 1)
    np.testing.assert_allclose(check.exponents["a/same"], 0, atol=1e-12)
    assert np.isnan(check.exponents["still"]).all()
    first, *_, last = str(check).splitlines()
    assert first.split()[-1] == "exponent" and last.split()[:2] == ["still", "0"]


def test_the_plot_has_a_line_per_activation():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    om.diagnostics.coordinate_check(power_law, [16, 64]).plot(axes)
    assert next(x.get_label() for x in axes.lines) == "a/grows: +1.00"
    assert len(axes.lines) == 3 and axes.get_xscale() == axes.get_yscale() == "log"


def test_runs_that_cannot_be_compared_are_refused():
    check = om.diagnostics.coordinate_check
    with pytest.raises(TypeError, match="`run` must be a function"):
        check(None, [1, 2])
    with pytest.raises(TypeError, match="`widths` must be an int"):
        check(power_law, [1.5, 2])
    for widths in ([8], [], [8, 8], [16, 8]):
        with pytest.raises(
            ValueError, match="`widths` must have at least 2 entries, ascending"
        ):
            check(power_law, widths)
    with pytest.raises(TypeError, match="`widths` must be a sequence"):
        check(power_law, 64)
    with pytest.raises(ValueError, match=r"`run` must return at least 2 .* at width 8"):
        check(lambda width: power_law(width)[:1], [8, 16])
    with pytest.raises(ValueError, match=r"`run` must return at least 2 .*None"):
        check(lambda width: None, [8, 16])
    with pytest.raises(ValueError, match=r"`run` .* at width 16 "):
        check(lambda width: power_law(width)[: 2 + (width == 8)], [8, 16])
    for other in ({"b": np.ones(2)}, {"a": np.ones((3, 2))}):
        with pytest.raises(ValueError, match=r"`run` .* after each step.* at width 8"):
            check(lambda width, other=other: [{"a": np.ones(2)}, other], [8, 16])
