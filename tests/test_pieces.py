"""A `Placement` with a period: pieces of matrices between updates of whole ones."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_matrix as om
from benchmarks import hlo
from tests import problems
from tests.transforms.every import case

# Leaves and how they lie on a mesh of 4 by 2 devices.
LEAVES = {
    "inputs": ((32, 8), P("x", None)),
    "outputs": ((16, 64), P(None, ("x", "y"))),
    "both": ((16, 8), P("x", "y")),
    "whole": ((8, 6), P()),
    "experts": ((2, 8, 16), P("y", None, "x")),
}
SIZES = {"x": 4, "y": 2}
SPLIT = om.MatrixLayout(split_outputs=(16, 8, 8))


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def placed(mesh, leaves=None):
    return {k: NamedSharding(mesh, s) for k, (_, s) in (leaves or LEAVES).items()}


def arrays(seed=0, leaves=None):
    shapes = [shape for shape, _ in (leaves or LEAVES).values()]
    found = [problems.normal(shape, seed + i) for i, shape in enumerate(shapes)]
    return dict(zip(leaves or LEAVES, found, strict=True))


def cuts(shape, spec):
    """The indices of every piece, from how the array is sharded."""
    names = [*spec, *[None] * (len(shape) - len(spec))]
    names = [n if isinstance(n, tuple) else (n,) * (n is not None) for n in names]
    counts = [math.prod(SIZES[name] for name in each) for each in names]
    ranges = [
        [slice(i * size // k, (i + 1) * size // k) for i in range(k)]
        for size, k in zip(shape, counts, strict=True)
    ]
    return list(itertools.product(*ranges))


def polar(x):
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


def of_pieces(x, spec, scale):
    """The polar factor of each piece, with the RMS of that of the whole."""
    out = np.zeros(x.shape)
    for piece in cuts(x.shape, spec):
        out[piece] = polar(x[piece])
    return scale * out * np.linalg.norm(polar(x)) / np.linalg.norm(out)


def exchanges(text):
    return sum(found.count for found in hlo.collectives(text))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_pieces_of_a_device_between_whole_matrices(kind):
    mesh = mesh_of(kind)
    given = placed(mesh) if kind is AxisType.Auto else None
    place = om.Placement(given, period=3, piece_scale=0.5)
    tx = om.orthogonalize("exact", placement=place)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(n=1)(lambda g, s: tx.update(g, s)))
    with jax.set_mesh(mesh):
        state = tx.init(jax.device_put(arrays(), placed(mesh)))
        for t in range(7):
            grads = arrays(10 * t)
            got, state = update(jax.device_put(grads, placed(mesh)), state)
            for key, (_, spec) in LEAVES.items():
                x = grads[key]
                want = polar(x) if t % 3 == 0 else of_pieces(x, spec, 0.5)
                np.testing.assert_allclose(got[key], want, atol=2e-5)
                assert got[key].sharding.is_equivalent_to(placed(mesh)[key], x.ndim)
    assert int(state.count) == 7


@pytest.mark.parametrize("spec", [P(None, "x"), P("x", None), P()])
def test_a_fused_kernel_is_cut_into_blocks_where_its_outputs_are_whole(spec):
    mesh, x = mesh_of(AxisType.Explicit), problems.normal((16, 32))
    tx = om.orthogonalize("exact", layout=SPLIT, placement=om.Placement(period=2))
    with jax.set_mesh(mesh):
        given = jax.device_put(x, NamedSharding(mesh, spec))
        _, state = tx.update(given, tx.init(given))
        got, _ = tx.update(given, state)
    blocks = [slice(0, 16), slice(16, 24), slice(24, 32)]
    whole = np.concatenate([polar(x[:, b]) for b in blocks], 1)
    out = np.zeros(x.shape)
    for rows, columns in cuts(x.shape, spec):
        for b in blocks if spec[-1:] != ("x",) else [columns]:
            out[rows, b] = polar(x[rows, b])
    want = out * np.linalg.norm(whole) / np.linalg.norm(out)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    "kind",
    [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)],
)
def test_an_update_of_pieces_has_no_exchange_and_the_predicted_flops(kind):
    mesh, method = mesh_of(kind), om.NewtonSchulz(2)
    place = om.Placement(placed(mesh), period=5)
    tx = om.orthogonalize(method, placement=place)
    with jax.set_mesh(mesh):
        grads = jax.device_put(arrays(), placed(mesh))
        state = tx.init(grads)
        # With a known count, the compiler keeps one of the branches.
        text = {
            count: jax.jit(lambda g, c=count: tx.update(g, state._replace(count=c))[0])
            .lower(grads)
            .compile()
            .as_text()
            for count in (np.int32(0), np.int32(1))
        }
        both = jax.jit(tx.update).lower(grads, state).compile().as_text()
        plain = om.orthogonalize(method, placement=om.Placement(placed(mesh)))
        whole = jax.jit(plain.update).lower(grads, plain.init(grads)).compile()
    assert exchanges(text[1]) == 0
    assert exchanges(text[0]) == exchanges(whole.as_text()) > 0
    assert exchanges(both) == exchanges(text[0])
    params = {key: {"kernel": x} for key, x in grads.items()}
    shardings = jax.tree.map(lambda s: {"kernel": s}, placed(mesh))
    place = om.Placement(shardings, period=5)
    cost = om.describe_placement(
        params, method, backend="cpu", routing="matrix", placement=place
    )
    assert cost.piece_flops == hlo.dot_flops(text[1])
    assert hlo.dot_flops(text[0]) == hlo.dot_flops(whole.as_text()) > cost.piece_flops
    assert cost.totals["exchanges"] == exchanges(text[0])


def test_describe_placement_has_a_row_for_pieces():
    mesh = jax.sharding.AbstractMesh((8,), ("x",))
    leaf = jax.ShapeDtypeStruct(
        (64, 512), "float32", sharding=NamedSharding(mesh, P(None, "x"))
    )
    params = {f"w{i}": {"kernel": leaf} for i in range(8)}

    def described(**fields):
        place = om.Placement(**fields)
        return om.describe_placement(params, backend="gpu", placement=place)

    plain, cost = described(), described(period=4)
    assert (plain.period, plain.piece_flops) == (1, 0.0)
    assert cost.groups == plain.groups and cost.flops == plain.flops
    assert cost.piece_flops == 8 * om.NewtonSchulz().flops(64, 64, "float32", "gpu")
    last = str(cost).splitlines()[-2:]
    assert last[0].split()[:4] == ["whole", "in", "1", "of"]
    assert last[1].split()[:2] == ["of", "pieces"]
    assert last[1].split()[-5:] == ["0", "0", "0", "0", "0"]
    assert "pieces" not in str(plain)


def test_on_one_device_a_piece_is_the_whole():
    x = problems.normal((6, 4))
    place = om.Placement(period=3, piece_scale=0.25)
    tx = om.orthogonalize("exact", placement=place)
    outs, _ = problems.unroll(tx, [x] * 4)
    want = polar(x)
    for out, scale in zip(outs, (1, 0.25, 0.25, 1), strict=True):
        np.testing.assert_allclose(out, scale * want, atol=1e-5)


STAGES = {
    "orthogonalize_with_feedback": {},
    "tangent_orthogonalize": {},
    "stiefel_retract": {},
    "svd_supplement": {"every": 2},
    "orthogonalize_cached": {"refresh": 2},
    "orthogonalize": {"method": None},
    "soap_precondition": {},
    "shampoo_precondition": {},
    "kl_soap_precondition": {},
    "kl_shampoo_precondition": {},
    "whiten_momentum": {},
    "halley_muon": {"svd_every": 2},
}
# Optimizers that orthogonalize, and do nothing else with matrices; of these, those that
# fix the size of each update.
TAKEN = {"muon", "muonw", "muonh", "normuon", "muown", "muon_vs", "muon_nsr"}
TAKEN |= {"muon_squared", "hopper", "adamuon", "halley_muon", "nanochat_muon"}
FIXED = {"muonh", "hopper", "adamuon", "halley_muon", "nanochat_muon"}


@pytest.mark.parametrize("name", [*STAGES, *sorted(om.MATRIX_OPTIMIZERS - TAKEN)])
def test_what_needs_whole_matrices_refuses_it(name):
    with pytest.raises(ValueError, match="`placement` must have period 1"):
        getattr(om, name)(**STAGES.get(name, {}), placement=om.Placement(period=2))


@pytest.mark.parametrize(
    "name", [case(name, slow=TAKEN - {"muon", "hopper"}) for name in sorted(TAKEN)]
)
def test_optimizers_use_it_or_refuse_a_scale(name):
    mesh = mesh_of(AxisType.Explicit)
    params = {"up": {"kernel": problems.normal((16, 64))}}
    grads = [{"up": {"kernel": problems.normal((16, 64), t)}} for t in (1, 2)]
    place = NamedSharding(mesh, P("y", "x"))

    def second(**fields):
        tx = getattr(om, name)(0.1, placement=om.Placement(**fields))
        with jax.set_mesh(mesh):
            p, *gs = (jax.device_put(tree, place) for tree in (params, *grads))
            update, state = jax.jit(tx.update), tx.init(p)
            _, state = update(gs[0], state, p)
            return np.asarray(update(gs[1], state, p)[0]["up"]["kernel"])

    whole, pieces = second(), second(period=2)
    assert np.linalg.norm(pieces - whole) > 0.05 * np.linalg.norm(whole)
    if name in FIXED:
        with pytest.raises(ValueError, match="`placement` must have `piece_scale` 1"):
            second(period=2, piece_scale=0.5)
    else:
        half = second(period=2, piece_scale=0.5)
        if name in {
            "muonw",
            "muown",
            "normuon",
        }:  # with decay, or a variance of outputs
            assert np.linalg.norm(half) < 0.9 * np.linalg.norm(pieces)
        else:
            np.testing.assert_allclose(half, pieces / 2, rtol=1e-4, atol=1e-6)


def test_it_needs_the_shardings_on_auto_axes():
    mesh = mesh_of(AxisType.Auto)
    tx = om.orthogonalize(placement=om.Placement(period=2))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, P("x")))
        with pytest.raises(
            ValueError, match=r"no `sharding`, .*Placement\(params, per"
        ):
            tx.init(x)


@pytest.mark.parametrize(
    "field, value, error",
    [
        *(("period", value, ValueError) for value in (0, -1)),
        *(("period", value, TypeError) for value in (2.0, True, None, jnp.int32(3))),
        *(("piece_scale", value, ValueError) for value in (-0.5, np.inf, np.nan)),
        *(("piece_scale", value, TypeError) for value in (None, "1", jnp.ones(()))),
    ],
)
def test_absurd_values_are_refused_by_name(field, value, error):
    with pytest.raises(error, match=f"`{field}`"):
        om.Placement(**{field: value})
