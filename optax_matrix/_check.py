"""Checks of arguments, at construction where their values are known by then."""

import math
import reprlib
from collections.abc import Collection
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax


def in_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = True,
) -> None:
    """Raises unless `value` is a real number in [low, high), or with other ends.

    Accepts Python numbers and NumPy's and JAX's scalars and 0-d arrays. Traced numbers,
    such as injected hyperparameters, have no value yet and are not compared with the
    bounds. Schedules and None are not checked.
    """
    if value is None or callable(value):
        return
    if not _is_real(value):
        raise TypeError(f"`{name}` must be a real number, got {_short(value)}.")
    if isinstance(value, jax.core.Tracer):
        return
    number = float(value)
    # Written so that NaN fails too.
    inside = low < number < high
    at_end = (number == low and not low_open) or (number == high and not high_open)
    if not inside and not at_end:
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(
            f"`{name}` must lie in {left}{low:g}, {high:g}{right}, got {value}."
        )


def number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = True,
) -> None:
    """Raises unless `value` is a real number in the range, see `in_range`.

    Raises:
      TypeError: If `value` is something else, such as None or a schedule.
      ValueError: If it is outside the range.
    """
    if value is None:
        raise TypeError(f"`{name}` must be a real number, got None.")
    if callable(value):
        raise TypeError(
            f"`{name}` must be a real number, got {_short(value)}. For a schedule, use "
            "`optax.inject_hyperparams`."
        )
    in_range(name, value, low, high, low_open=low_open, high_open=high_open)


def one_of(name: str, value: Any, choices: Collection[str | None]) -> None:
    """Raises unless `value` is one of `choices`."""
    if not isinstance(value, str | None) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {_short(value)}.")


def static_int(name: str, value: Any, low: int) -> None:
    """Raises unless `value` is a Python or NumPy integer of at least `low`.

    Such an argument fixes the shape of the program, so no JAX array is accepted: under
    `optax.inject_hyperparams` it would have a value in `init` and none in `update`.
    """
    _refuse_array(name, value, "an int")
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be an int, got {_short(value)}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def whole_number(name: str, value: Any, low: int) -> None:
    """Raises unless `value` is an integer of at least `low`, traced or not."""
    kind = isinstance(value, int | np.integer)
    if isinstance(value, jax.Array):
        kind = value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    if isinstance(value, bool) or not kind:
        raise TypeError(f"`{name}` must be an int, got {_short(value)}.")
    if not isinstance(value, jax.core.Tracer) and int(value) < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def static_number(name: str, value: Any) -> None:
    """Raises unless `value` is a Python number, for arguments that fix the program."""
    _refuse_array(name, value, "a Python number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{name}` fixes the program and must be a Python number, "
            f"got {_short(value)}."
        )


def _refuse_array(name: str, value: Any, wanted: str) -> None:
    """Raises for a JAX array in place of an argument that fixes the program."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` fixes the program and must be {wanted}, got a JAX array. Under "
            f"`optax.inject_hyperparams`, pass `static_args=({name!r},)`."
        )


def boolean(name: str, value: Any) -> None:
    """Raises unless `value` is True or False, of Python or NumPy."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {_short(value)}.")


def instance(name: str, value: Any, *kinds: type) -> None:
    """Raises unless `value` is an instance of one of `kinds`."""
    if not isinstance(value, kinds):
        names = [kind.__name__ for kind in kinds]
        listed = " or ".join(f"`{kind}`" for kind in names)
        raise TypeError(
            f"`{name}` must be a {listed}, such as `{names[0]}()`, got {_short(value)}."
        )


def function(name: str, value: Any, of: str) -> None:
    """Raises unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function of {of}, got {_short(value)}.")


def transformation(name: str, value: Any) -> None:
    """Raises unless `value` is an `optax.GradientTransformation`."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation, such as "
            f"`optax.adamw(3e-3)`, got {_short(value)}."
        )


def params_given(params: Any, user: str) -> None:
    """Raises if `params` is None, naming the transformation that needs it."""
    if params is None:
        raise ValueError(
            f"`{user}` needs the parameters: call `tx.update(updates, state, params)` "
            "with `params`, got None."
        )


def _is_real(value: Any) -> bool:
    """Returns whether `value` is one real number, traced or not."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        kinds = (jnp.integer, jnp.floating)
        return value.ndim == 0 and any(jnp.issubdtype(value.dtype, k) for k in kinds)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """Returns a representation that fits an error message, whatever was passed."""
    return reprlib.repr(value)
