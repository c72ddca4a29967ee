"""What every polar method promises, and the errors of its constructor."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_matrix._linalg import (
    MUD,
    Exact,
    Halley,
    NewtonSchulz,
    PolarMethod,
    Zolotarev,
    as_method,
    newton_schulz,
    resolve,
)
from tests.linalg.problems import METHODS, ROTATABLE, SHAPES, gaussian, run
from tests.references import polar as reference

# Float32 rounding, amplified by up to the ∏ aᵢ of polar_express on small values.
ATOL = 2e-4

# Rational methods share all but their maps with the Halley that is not slow.
SLOW = [Halley(lower_bound=1e-2, polish=1), Zolotarev()]


def named(methods):
    return [
        pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in methods
    ]


every = pytest.mark.parametrize("method", named(METHODS), ids=str)
rotatable = pytest.mark.parametrize("method", named(ROTATABLE), ids=str)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@rotatable
def test_rotations_pass_through(method, shape):
    rng = np.random.default_rng(1)
    x = gaussian(shape)
    q, p = reference.orthogonal(rng, shape[-2]), reference.orthogonal(rng, shape[-1])
    got = run(method, (q @ x @ p).astype(np.float32))
    want = q @ np.asarray(run(method, x.astype(np.float32)), np.float64) @ p
    chex.assert_trees_all_close(got, want.astype(np.float32), atol=ATOL)


@pytest.mark.parametrize("shape", [(4, 9), (5, 5), (1, 7)])
@every
def test_transpose_passes_through(method, shape):
    x = gaussian(shape).astype(np.float32)
    got = run(method, np.swapaxes(x, -2, -1))
    want = np.swapaxes(run(method, x), -2, -1)
    if shape == (5, 5) and not method.transposable:
        assert np.abs(got - want).max() > 100 * ATOL
    else:
        chex.assert_trees_all_close(got, want, atol=ATOL)


def test_what_rescales_one_of_two_equal_sides_is_not_transposable():
    assert [m for m in METHODS if not m.transposable] == [
        NewtonSchulz(coefficients="aol"),
        MUD(passes=2),
    ]
    assert not NewtonSchulz(normalization="aol").transposable
    assert NewtonSchulz(coefficients="aol", normalization="frobenius").transposable


def test_flops_are_those_of_the_backend():
    # Four blocks of Polar Express in the float32 of a GPU (TF32), two on a CPU. A block
    # costs two rectangular products; a step costs four small ones, the first of a block
    # one.
    m, n, method = 64, 1024, NewtonSchulz(coefficients="polar_express", method="gram")
    for backend, dtype, blocks in (
        ("cpu", "float32", 2),
        ("gpu", "float32", 4),
        ("tpu", "float32", 5),
        ("cpu", "float64", 2),
        ("gpu", "bfloat16", 4),
    ):
        small = 8 + 3 * (8 - blocks)
        want = 2 * blocks * (2 * m * m * n) + small * (2 * m**3)
        assert method.flops(m, n, dtype, backend) == want
        assert method.flops(n, m, dtype, backend) == want
    assert method.flops(m, n) == method.flops(m, n, "float32", "cpu")
    # The dtype of the products counts, not that of the input.
    half = dataclasses.replace(method, dtype="bfloat16")
    assert half.flops(m, n, "float32", "cpu") == method.flops(m, n, "float32", "tpu")
    whole = dataclasses.replace(method, precision="highest")
    assert whole.flops(m, n, "float32", "tpu") == method.flops(m, n, "float32", "cpu")


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30, 2.0**-99, 1e37])
@every
def test_scale_does_not_matter(method, scale):
    x = gaussian((4, 9)).astype(np.float32)
    got = run(method, x * np.float32(scale))
    # The product rounds once, and the condition number here is below 10.
    chex.assert_trees_all_close(got, run(method, x), atol=2e-5)


@every
def test_a_stack_is_its_slices(method):
    scale = np.array([1e-15, 1e-5, 1.0, 1e3, 1e9, 1e14]).reshape(2, 3, 1, 1)
    x = (scale * gaussian((2, 3, 4, 9))).astype(np.float32)
    got = run(method, x)
    want = jnp.stack([jnp.stack([run(method, y) for y in z]) for z in x])
    # The same operations in another order of summation.
    chex.assert_trees_all_close(got, want, atol=1e-5)


@every
def test_zero_gives_zero(method):
    for shape in SHAPES:
        got = run(method, jnp.zeros(shape))
        assert not np.any(got)
    x = gaussian((3, 4, 6)).astype(np.float32)
    x[1] = 0
    got = np.asarray(run(method, x))
    assert not got[1].any()
    assert np.linalg.norm(got[0]) > 1


@every
def test_empty_axes_pass(method):
    for shape in [(0, 3, 4), (0, 4), (3, 0)]:
        assert run(method, jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@every
def test_a_bad_matrix_harms_no_other(method, shape, bad):
    x = gaussian((3, *shape)).astype(np.float32)
    clean = np.asarray(run(method, x))
    x[1, 2, 3] = bad
    got = np.asarray(run(method, x))
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(4, 9), (7, 1)])
@every
def test_result_has_the_inputs_type(method, shape, dtype):
    x = jnp.asarray(gaussian(shape), dtype)
    got = run(method, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, x)
    want = run(method, x.astype(jnp.float32))
    # Computed in float32 whatever the input: they differ by the last rounding alone,
    # which is half an ulp of numbers below 2.
    chex.assert_trees_all_close(
        got.astype(jnp.float32), want, atol=float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**13])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("table", ["jordan", "aol"])
def test_half_precision_products(table, dtype, scale):
    x = gaussian((16, 40)).astype(np.float32)
    method = NewtonSchulz(coefficients=table, dtype=dtype)
    got = run(method, x * np.float32(scale))
    assert got.dtype == jnp.float32
    want = run(NewtonSchulz(coefficients=table), x)
    # Five steps of rounding at 2⁻⁸ (2⁻¹¹), each with coefficients up to 7.
    bound = 0.5 if dtype == "bfloat16" else 0.06
    assert np.linalg.norm(got - want, 2) < bound
    # And really computed in that type.
    assert np.abs(got - want).max() > 1e-5


@every
def test_float64_is_computed_in_float64(method):
    x = gaussian((4, 7))
    with jax.enable_x64(True):
        got = run(method, jnp.asarray(x))
        assert got.dtype == jnp.float64
        low = run(dataclasses.replace(method, dtype="float32"), jnp.asarray(x))
        assert low.dtype == jnp.float64
        again = run(method, jnp.asarray(x[:, ::-1]))[:, ::-1]
    # Reversing the columns changes the order of summation and no more.
    np.testing.assert_allclose(np.asarray(got), np.asarray(again), atol=1e-12)
    assert np.abs(np.asarray(got) - np.asarray(low)).max() > 1e-9


@every
def test_jit_and_vmap_equal_eager(method):
    x = gaussian((3, 4, 6)).astype(np.float32)
    want = method.polar(x)
    # Fusion and another batching may reorder sums.
    chex.assert_trees_all_close(jax.jit(method.polar)(x), want, atol=1e-5)
    chex.assert_trees_all_close(jax.vmap(method.polar)(x), want, atol=1e-5)
    chex.assert_trees_all_close(
        jax.vmap(method.polar, in_axes=-1, out_axes=-1)(np.moveaxis(x, 0, -1)),
        np.moveaxis(np.asarray(want), 0, -1),
        atol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 5, 3)])
@every
def test_gradient_matches_finite_differences(method, shape):
    x, dx = gaussian(shape, 1), gaussian(shape, 2)
    weight = gaussian(shape, 3)
    with jax.enable_x64(True):

        def loss(y):
            return jnp.vdot(jnp.asarray(weight), run(method, y))

        x, dx = jnp.asarray(x), jnp.asarray(dx)
        got = jnp.vdot(jax.jit(jax.grad(loss))(x), dx)
        step = 1e-6
        want = (loss(x + step * dx) - loss(x - step * dx)) / (2 * step)
        _, forward = jax.jit(jax.jvp, static_argnums=0)(loss, (x,), (dx,))
    # Central differences of a loss of order 10: rounding 1e-15 / step.
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=1e-6)
    np.testing.assert_allclose(got, forward, rtol=1e-9, atol=1e-9)


@every
def test_gradient_ignores_the_scale_and_survives_zero(method):
    x = gaussian((3, 4, 6)).astype(np.float32)
    weight = gaussian((3, 4, 6), 1).astype(np.float32)

    def loss(y):
        return jnp.sum(weight * run(method, y))

    gradient_of = jax.jit(jax.grad(loss))
    want = gradient_of(x)
    got = gradient_of(x * np.float32(2.0**-60)) * np.float32(2.0**-60)
    # Halley's inverse carries its float32 error into the gradient.
    chex.assert_trees_all_close(got, want, atol=2e-3)

    x[1] = 0
    gradient = gradient_of(x)
    chex.assert_tree_all_finite(gradient)
    assert not np.any(gradient[1])
    chex.assert_trees_all_close(gradient[0], want[0], atol=2e-3)


def test_second_derivatives_of_the_matmul_methods():
    for method in (NewtonSchulz(), Halley(1e-1)):
        with jax.enable_x64(True):
            x, dx = jnp.asarray(gaussian((3, 4))), jnp.asarray(gaussian((3, 4), 1))

            @jax.jit
            def slope(t, polar=method.polar, x=x, dx=dx):
                return jax.jvp(polar, (x + t * dx,), (dx,))[1].sum()

            got = jax.jit(jax.grad(slope))(0.0)
            want = (slope(1e-5) - slope(-1e-5)) / 2e-5
        # Central differences of a quantity of order 100.
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@every
def test_methods_are_static_values(method):
    assert hash(method) == hash(dataclasses.replace(method))
    assert method == dataclasses.replace(method)
    assert not callable(method)
    assert isinstance(method, PolarMethod)
    assert as_method(method) is method


@pytest.mark.parametrize("kind", [NewtonSchulz, Halley, Exact])
def test_float64_is_another_method_than_the_default(kind):
    # They share no compiled program.
    assert kind(dtype="float64") != kind()
    with jax.enable_x64(True):
        x = jnp.asarray(gaussian((3, 5)), "float32")
        got, low = run(kind(dtype="float64"), x), run(kind(), x)
        want = kind(dtype="float64").polar(x)
    np.testing.assert_allclose(got, want, atol=1e-7)
    assert np.abs(got - low).max() > 0


def test_a_method_survives_injection():
    def factory(learning_rate, how):
        def update(updates, state, params=None):
            del params
            scaled = jax.tree.map(lambda u: learning_rate * how.polar(u), updates)
            return scaled, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    x = jnp.asarray(gaussian((3, 5)), jnp.float32)
    tx = optax.inject_hyperparams(factory)(learning_rate=2.0, how=NewtonSchulz())
    got, _ = jax.jit(tx.update)(x, tx.init(x))
    chex.assert_trees_all_close(got, 2.0 * run(NewtonSchulz(), x), atol=1e-5)


def test_names():
    assert as_method("newton_schulz") == NewtonSchulz()
    assert as_method("halley") == Halley()
    assert as_method("zolotarev") == Zolotarev()
    assert as_method("mud") == MUD()
    assert as_method("exact") == Exact()
    names = "'newton_schulz', 'halley', 'zolotarev', 'mud', 'exact'"
    names = f"`method` must be one of {names}"
    with pytest.raises(ValueError, match=f"{names}, got 'svd'"):
        as_method("svd")
    for value in (NewtonSchulz, 3, np.linalg.svd):
        with pytest.raises(TypeError, match=f"{names}, or an object"):
            as_method(value)  # pyright: ignore[reportArgumentType]


def test_stored_form_is_hashable_and_replaceable():
    own = NewtonSchulz(coefficients=[[1.5, -0.5, 0.0]], steps=3, dtype=jnp.bfloat16)
    assert own.coefficients == ((1.5, -0.5, 0.0),)
    assert own.dtype == "bfloat16"
    assert own.rows == ((1.5, -0.5, 0.0),) * 3
    assert len(dataclasses.replace(own, steps=7).rows) == 7
    assert NewtonSchulz(precision="highest").precision is jax.lax.Precision.HIGHEST
    preset = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    assert NewtonSchulz(precision=preset).precision is preset
    assert len(NewtonSchulz().rows) == 5
    assert NewtonSchulz(coefficients="polar_express", safety=1.05).rows == resolve(
        "polar_express", None, 1.05
    )


BAD = [
    (NewtonSchulz, {"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
    (NewtonSchulz, {"steps": 2.0}, TypeError, "`steps` must be an int"),
    (
        NewtonSchulz,
        {"steps": 10, "coefficients": "quintic"},
        ValueError,
        "is a 5-step table; got `steps=10`",
    ),
    (NewtonSchulz, {"coefficients": "x"}, ValueError, "`coefficients` must be one of"),
    (NewtonSchulz, {"coefficients": [(1.0,)]}, ValueError, "three finite numbers"),
    (NewtonSchulz, {"method": "fast"}, ValueError, "`method` must be one of 'auto'"),
    (NewtonSchulz, {"safety": 1.1}, ValueError, "takes no safety factor"),
    (NewtonSchulz, {"normalization": "max"}, ValueError, "`normalization` must be one"),
    (NewtonSchulz, {"dtype": "int8"}, ValueError, "`dtype` must be one of 'bfloat16'"),
    (NewtonSchulz, {"dtype": "half a"}, ValueError, "`dtype` must be one of"),
    (NewtonSchulz, {"precision": "best"}, ValueError, "`precision` must be None"),
    (Halley, {"steps": 0}, ValueError, "`steps` must be at least 1"),
    (Halley, {"lower_bound": "a"}, TypeError, "`lower_bound` fixes the program"),
    (Halley, {"lower_bound": True}, TypeError, "`lower_bound` fixes the program"),
    (Halley, {"dtype": "bfloat16"}, ValueError, "`dtype` must be one of 'float32'"),
    (Halley, {"precision": 3.5}, ValueError, "`precision` must be None"),
    (Zolotarev, {"poles": 2.0}, TypeError, "`poles` must be an int"),
    (Zolotarev, {"lower_bound": "a"}, TypeError, "`lower_bound` fixes the program"),
    (Zolotarev, {"dtype": "bfloat16"}, ValueError, "`dtype` must be one of 'float32'"),
    (Zolotarev, {"precision": 3.5}, ValueError, "`precision` must be None"),
    (MUD, {"passes": 0}, ValueError, "`passes` must be at least 1"),
    (MUD, {"passes": 1.0}, TypeError, "`passes` must be an int"),
    (MUD, {"dtype": "float16"}, ValueError, "`dtype` must be one of 'float32'"),
    (MUD, {"precision": "best"}, ValueError, "`precision` must be None"),
    (Exact, {"method": "qr"}, ValueError, "`method` must be one of 'svd'"),
    (Exact, {"dtype": "float16"}, ValueError, "`dtype` must be one of 'float32'"),
    (Exact, {"precision": "best"}, ValueError, "`precision` must be None"),
]


@pytest.mark.parametrize("kind, arguments, error, message", BAD)
def test_constructors_name_the_bad_argument(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)


@every
def test_inputs_that_are_no_matrix_raise(method):
    with pytest.raises(ValueError, match=r"at least 2 axes \(..., m, n\), got shape"):
        run(method, jnp.ones(3))
    for dtype in ("int32", "complex64"):
        with pytest.raises(TypeError, match=f"real floating array, got dtype {dtype}"):
            run(method, jnp.ones((2, 3), dtype))


def test_the_pure_function_defaults_to_frobenius_and_auto():
    x = jnp.asarray(gaussian((4, 10)), jnp.float32)
    got = newton_schulz(x, resolve("jordan"))
    want = newton_schulz(x, resolve("jordan"), normalization="frobenius", method="gram")
    np.testing.assert_array_equal(got, want)


@every
def test_strict_promotion_changes_nothing(method):
    x = jnp.asarray(gaussian((4, 9)), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        got = method.polar(x)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, x)
