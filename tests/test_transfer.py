"""Learning rates that transfer over width, depth and tokens, leaf by leaf."""

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


def sign_step(m, n):
    """The first step of Adam by a gradient of rank one."""
    rng = np.random.default_rng(0)
    gradient = np.outer(rng.standard_normal(m), rng.standard_normal(n))
    return np.sign(gradient)


@pytest.mark.parametrize(
    "unit, optimizer",
    [
        ("entrywise", om.OPTIMIZERS["adamw"]),
        ("orthogonal", lambda rate: om.muon(rate, shape_scale=None)),
        ("spectral", om.muon),
        ("mup", lambda rate: om.muon(rate, shape_scale="mup")),
        ("rms", lambda rate: om.muon(rate, shape_scale="rms")),
    ],
)
def test_steps_of_all_widths_have_the_spectral_norms_of_mup(unit, optimizer):
    base, params = model(8), model(32)
    factors = om.width_factors(params, base, unit)

    def norms(params, factors):
        """The spectral norm of the first step, over √(outputs / inputs)."""
        tx = om.with_learning_rate_factors(lambda f: optimizer(0.1 * f), factors)

        def gradient(leaf):
            x = np.ones(leaf.shape)
            return jnp.asarray(sign_step(*leaf.shape) if x.ndim == 2 else x)

        grads = jax.tree.map(gradient, params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return {
            name: np.linalg.norm(x["kernel"], 2)
            / np.sqrt(np.divide(*x["kernel"].shape[::-1]))
            for name, x in updates["layers"][0].items()
            if name in ("attn", "up", "down")
        }

    ones = jax.tree.map(lambda _: 1.0, params)
    # Newton-Schulz steps leave singular values within 30 % of 1.
    small, large = norms(base, ones), norms(params, factors)
    chex.assert_trees_all_close(large, small, rtol=0.02)
    if unit in ("entrywise", "rms"):
        assert norms(params, ones)["attn"] > 1.5 * small["attn"]


def test_every_kind_of_leaf_has_its_factor():
    base, params = model(8), model(32)
    got = om.width_factors(params, base, "entrywise")
    chex.assert_trees_all_equal_structs(got, params)
    assert got["embed"]["embedding"] == got["layers"][0]["norm"]["scale"] == 1
    assert got["head"]["kernel"] == 1 / 4 and got["head"]["bias"] == 1
    layer = got["layers"][0]
    assert layer["attn"]["kernel"] == layer["up"]["kernel"] == 1 / 4
    assert layer["down"]["kernel"] == 1 / 4 and layer["attn"]["bias"] == 1
    relative = om.width_factors(params, base, "relative")["layers"][0]
    assert set(jax.tree.leaves(relative)) == {1.0}
    shapes = jax.eval_shape(lambda: params), jax.eval_shape(lambda: base)
    assert om.width_factors(*shapes, "entrywise") == got
    assert set(jax.tree.leaves(om.width_factors(params, params, "rms"))) == {1.0}


def test_a_stack_of_layers_is_read_by_its_layout():
    layout = om.MatrixLayout(inputs=(1, 2), outputs=3)
    shapes = [(3, 2, 8, 10), (3, 8, 8, 30)]
    base, params = ({"o": jax.ShapeDtypeStruct(s, "float32")} for s in shapes)
    got = om.width_factors(params, base, "orthogonal", routing=lambda p, x: layout)
    np.testing.assert_allclose(got["o"], np.sqrt((30 / 64) / (10 / 16)))


def test_readouts_of_other_names_are_told():
    shapes = [
        {"w": {"weight": np.zeros((50, n))}, "k": np.zeros((n, n))} for n in (8, 32)
    ]
    given = {"routing": lambda path, leaf: path == "k"}
    with pytest.raises(ValueError, match=r"`readouts` .* 'w/weight' .*\(50, 32\)"):
        om.width_factors(shapes[1], shapes[0], "entrywise", **given)
    for readouts, want in (({"w/weight"}, 1 / 4), (set(), 1)):
        got = om.width_factors(
            *shapes[::-1], "entrywise", readouts=readouts.__contains__, **given
        )
        assert got["w"]["weight"] == want and got["k"] == 1 / 4


def test_a_base_that_is_not_the_same_model_is_refused():
    base, params = model(8), model(32)
    with pytest.raises(
        ValueError, match=r"`base` has no entry for 'layers/0/up/kernel'"
    ):
        del base["layers"][0]["up"]["kernel"]
        om.width_factors(params, base, "rms")
    base = model(8)
    base["head"]["kernel"] = jnp.ones((8, 5, 10))
    with pytest.raises(
        ValueError, match=r"\(8, 5, 10\) at 'head/kernel', .*\(32, 50\)"
    ):
        om.width_factors(params, base, "rms")
    base["head"]["kernel"] = jnp.ones((8, 40))
    with pytest.raises(ValueError, match=r"`base` .*\(8, 40\) at 'head/kernel'"):
        om.width_factors(params, base, "rms")
    stacks = [{"dense": {"kernel": np.zeros((n, 8, 8))}} for n in (2, 3)]
    with pytest.raises(ValueError, match=r"`hyperp_factor`.*'dense/kernel'"):
        om.width_factors(stacks[1], stacks[0], "rms")
    layout = om.MatrixLayout(split_outputs=(8, 4))
    with pytest.raises(ValueError, match="one factor to each leaf"):
        om.width_factors(
            {"qkv": np.zeros((16, 12))}, {"qkv": np.zeros((4, 12))}, "spectral",
            routing=lambda path, leaf: layout,
        )  # fmt: skip
    with pytest.raises(ValueError, match="`unit` must be one of 'entrywise'"):
        om.width_factors(params, model(8), "adam")
    with pytest.raises(TypeError, match="`readouts` must be a function"):
        om.width_factors(params, model(8), "rms", readouts=["head"])


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


def test_a_prefix_and_schedules_and_wrappers(tmp_path):
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
    assert step.compile().as_text().count(" all-to-all(") == 4


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
    with pytest.raises(TypeError, match="`optimizer` must be an optax"):
        om.with_learning_rate_factors(lambda f: f, {"a": 1.0})
    tx = om.with_learning_rate_factors(adam, {"a": 1.0})
    with pytest.raises(ValueError, match="`factors` has no entry for 'b'"):
        tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})


def test_hyperp_is_its_formula():
    assert om.hyperp_factor() == 1
    np.testing.assert_allclose(om.hyperp_factor(layers=4), 0.5)
    np.testing.assert_allclose(om.hyperp_factor(tokens=100), 10**-0.64)
    np.testing.assert_allclose(om.hyperp_factor(layers=9, tokens=0.1), 10**0.32 / 3)
    for name in ("layers", "tokens"):
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
        with pytest.raises(ValueError, match="`widths` must be at least 2 and ascend"):
            check(power_law, widths)
    with pytest.raises(ValueError, match=r"`run` .* at width 8 "):
        check(lambda width: power_law(width)[:1], [8, 16])
    with pytest.raises(ValueError, match=r"`run` .* at width 16 "):
        check(lambda width: power_law(width)[: 2 + (width == 8)], [8, 16])
    with pytest.raises(ValueError, match=r"`run` .* at width 8 "):
        check(lambda width: [{"a": np.ones(2)}, {"b": np.ones(2)}], [8, 16])
