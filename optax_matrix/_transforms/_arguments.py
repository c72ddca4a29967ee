"""Checks of arguments that several transformations and optimizers have."""

import math
import reprlib
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_matrix import _check
from optax_matrix._transforms import _moments


def number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = True,
) -> None:
    """Raises unless `value` is a real number in the range, see `_check.in_range`.

    Raises:
      TypeError: If `value` is something else, such as None or a schedule.
      ValueError: If it is outside the range.
    """
    if value is None:
        raise TypeError(f"`{name}` must be a real number, got None.")
    if callable(value):
        raise TypeError(
            f"`{name}` must be a real number, got {reprlib.repr(value)}. For a "
            "schedule, use `optax.inject_hyperparams`."
        )
    _check.in_range(name, value, low, high, low_open=low_open, high_open=high_open)


def number_or_schedule(
    name: str, value: Any, low: float, high: float = math.inf
) -> None:
    """Raises unless `value` is a schedule, or a real number in [low, high)."""
    if not callable(value):
        number(name, value, low, high)


def mixture(decays: Any, weights: Any) -> None:
    """Raises unless `decays` and `weights` are of a mixture, see `mixed_momentum`."""
    for name, values, high in (("decays", decays, 1.0), ("weights", weights, math.inf)):
        if not isinstance(values, tuple | list):
            raise TypeError(f"`{name}` must be a tuple of numbers, got {values!r}.")
        for value in values:
            number_or_schedule(name, value, 0.0, high)
    if not decays or len(decays) != len(weights):
        raise ValueError(
            "`decays` and `weights` must have the same length, at least 1, got "
            f"{len(decays)} and {len(weights)}."
        )


def transformation(name: str, value: Any) -> None:
    """Raises unless `value` is an `optax.GradientTransformation`."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation, such as "
            f"`optax.adamw(3e-3)`, got {reprlib.repr(value)}."
        )


def state_dtype(
    name: str, value: DTypeLike | None, more: tuple[str, ...] = ()
) -> str | None:
    """Returns the name of a dtype for state; None is that of the arithmetic.

    Raises:
      ValueError: If the dtype is not bfloat16, float32 or float64, or one of `more`.
    """
    if value is None:
        return None
    try:
        value = jnp.dtype(value).name
    except TypeError:
        pass  # `one_of` names the argument.
    _check.one_of(name, value, ("bfloat16", "float32", "float64", *more))
    return str(value)


def mu_dtype(value: DTypeLike | None, *, divided: bool = False) -> str | None:
    """Returns the name of a dtype for a first moment, see `_moments`.

    Args:
      value: The dtype.
      divided: Whether every entry is divided by an own number, which is small where the
        entry is. Then int8 will not do, whose error is that of the largest entry.

    Raises:
      ValueError: If it is not one for state, nor int8 or float8_e4m3fn.
    """
    more = (_moments.OF_SQUARES,) if divided else tuple(_moments.EIGHT_BITS)
    return state_dtype("mu_dtype", value, more)


def nu_dtype(value: DTypeLike | None) -> str | None:
    """Returns the name of a dtype for a second moment, see `_moments`.

    Raises:
      ValueError: If it is not one for state, nor float8_e4m3fn.
    """
    return state_dtype("nu_dtype", value, (_moments.OF_SQUARES,))
