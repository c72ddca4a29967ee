"""What the checks of arguments accept, and how they name what they refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_matrix as om
from optax_matrix import _check

# One value of every kind that a number can come as.
KINDS = (float, np.float32, np.float64, np.asarray, jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_range_of_every_concrete_number_is_checked(kind):
    for good in (0.0, 0.5):
        _check.in_range("b2", kind(good), 0.0, 1.0)
    for bad, seen in ((-1.0, "-1"), (1.0, "1"), (np.nan, "nan"), (np.inf, "inf")):
        with pytest.raises(ValueError, match=rf"`b2` must lie in \[0, 1\), got {seen}"):
            _check.in_range("b2", kind(bad), 0.0, 1.0)
    with pytest.raises(ValueError, match=r"`eps` must lie in \(0, inf\), got 0"):
        _check.in_range("eps", kind(0.0), 0.0, low_open=True)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.asarray, jnp.int32])
def test_integers_are_numbers(kind):
    _check.in_range("step", kind(3), 0.0)
    with pytest.raises(ValueError, match=r"`step` must lie in \[4, inf\), got 3"):
        _check.in_range("step", kind(3), 4)


@pytest.mark.parametrize("value", [None, optax.constant_schedule(-1.0)])
def test_none_and_schedules_pass(value):
    _check.in_range("learning_rate", value, 0.0)


def test_traced_numbers_pass_and_concrete_ones_are_checked_under_jit():
    closed_over = jnp.float32(-1)

    def scaled(traced):
        _check.in_range("learning_rate", traced, 0.0)
        with pytest.raises(ValueError, match="`learning_rate` must lie in"):
            _check.in_range("learning_rate", closed_over, 0.0)
        return traced

    jax.jit(scaled)(-1.0)
    jax.vmap(scaled)(-jnp.ones(2))
    with pytest.raises(TypeError, match="`learning_rate` must be a real number"):
        jax.jit(scaled)(True)


@pytest.mark.parametrize(
    "value",
    [
        *("0.1", b"0.1", True, np.True_, jnp.array(True), 1j, jnp.complex64(1)),
        *([0.1], {"w": 0.1}, np.ones(1), jnp.ones((1, 1)), jax.random.key(0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_raises(value):
    with pytest.raises(TypeError, match="`momentum` must be a real number, got "):
        _check.in_range("momentum", value, 0.0, 1.0)


def test_errors_are_short_whatever_was_passed():
    tree = {f"layer{i}": np.ones((100, 100)) for i in range(100)}
    checks = (
        lambda: _check.in_range("x", tree, 0.0),
        lambda: _check.one_of("x", tree, ("a",)),
        lambda: _check.static_int("x", tree, 0),
        lambda: _check.static_number("x", tree),
        lambda: _check.boolean("x", tree),
    )
    for check in checks:
        with pytest.raises((TypeError, ValueError), match=r"^`x` .*got") as raised:
            check()
        assert len(str(raised.value)) < 500


def test_optimizers_check_at_construction():
    with pytest.raises(TypeError, match=r"`learning_rate` .*, got '0\.1'"):
        om.muon("0.1")
    with pytest.raises(TypeError, match=r"`momentum` .*, got '0\.9'"):
        om.muon(momentum="0.9")
    with pytest.raises(ValueError, match=r"`learning_rate` .*, got nan"):
        om.muon(jnp.float32("nan"))
    with pytest.raises(ValueError, match=r"`b2` .*, got 1\.5"):
        om.normuon(b2=np.float32(1.5))


def test_injected_values_are_checked_by_init():
    injected = optax.inject_hyperparams(om.ema_momentum)(momentum=1.5)
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\), got 1\.5"):
        injected.init(jnp.ones((3, 2)))


@pytest.mark.parametrize("value", ["a", None])
def test_one_of_accepts_its_choices(value):
    _check.one_of("root", value, (None, "a", "b"))


@pytest.mark.parametrize("value", ["c", 1, np.ones(2), ["a"]])
def test_one_of_lists_its_choices(value):
    listed = "`root` must be one of None, 'a', 'b', got "
    with pytest.raises(ValueError, match=re.escape(listed)):
        _check.one_of("root", value, (None, "a", "b"))


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_static_integers(kind):
    _check.static_int("steps", kind(3), 3)
    with pytest.raises(ValueError, match="`steps` must be at least 4, got 3"):
        _check.static_int("steps", kind(3), 4)


@pytest.mark.parametrize("value", ["3", 3.0, np.float32(3), True, np.True_, None])
def test_other_values_are_no_static_integers(value):
    with pytest.raises(TypeError, match="`steps` must be an int, got "):
        _check.static_int("steps", value, 1)


def test_static_integers_may_not_be_jax_arrays():
    def check(value):
        _check.static_int("steps", value, 1)

    advice = r"`steps` .*`static_args=\('steps',\)`"
    for call in (check, jax.jit(check)):
        with pytest.raises(TypeError, match=advice):
            call(jnp.int32(3))


def test_static_numbers():
    for good in (1, 0.5):
        _check.static_number("lower_bound", good)
    for bad in ("1", True, None, jnp.float32(1), 1j):
        with pytest.raises(TypeError, match=r"`lower_bound` .*a Python number, got "):
            _check.static_number("lower_bound", bad)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_booleans(value):
    _check.boolean("nesterov", value)


@pytest.mark.parametrize("value", ["no", 1, None, jnp.array(True)])
def test_what_is_no_boolean_raises(value):
    with pytest.raises(TypeError, match="`nesterov` must be True or False, got "):
        _check.boolean("nesterov", value)


def test_the_transformation_that_needs_parameters_is_named():
    _check.params_given({}, "match_rms")
    with pytest.raises(ValueError, match="`match_rms` needs the parameters"):
        _check.params_given(None, "match_rms")


@pytest.mark.parametrize("value", [3, np.int64(3), jnp.int32(3), np.uint8(3)])
def test_whole_numbers_pass_traced_or_not(value):
    _check.whole_number("refresh", value, 3)
    jax.jit(lambda traced: _check.whole_number("refresh", traced, 4))(value)
    with pytest.raises(ValueError, match="`refresh` must be at least 4, got 3"):
        _check.whole_number("refresh", value, 4)


@pytest.mark.parametrize("value", [2.5, jnp.float32(3), True, "3", None, [3]])
def test_what_is_not_a_whole_number_raises(value):
    with pytest.raises(TypeError, match="`refresh` must be an int"):
        _check.whole_number("refresh", value, 1)


def test_an_object_of_another_class_raises():
    _check.instance("preconditioner", om.SOAP(), om.SOAP)
    match = r"`preconditioner` must be a `SOAP`, such as `SOAP\(\)`, got \{\}"
    with pytest.raises(TypeError, match=match):
        _check.instance("preconditioner", {}, om.SOAP)
