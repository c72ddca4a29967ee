"""Checks of arguments that several transformations and optimizers have."""

import math
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_matrix import _check, _paths
from optax_matrix._transforms import _moments


def number_or_schedule(
    name: str, value: Any, low: float, high: float = math.inf
) -> None:
    """Raises unless `value` is a schedule, or a real number in [low, high)."""
    if not callable(value):
        _check.number(name, value, low, high)


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


def mask(name: str, value: Any) -> None:
    """Raises unless `value` is a tree of booleans, a function, or None.

    Raises:
      TypeError: With the path of another leaf.
    """
    if callable(value):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        is_array = hasattr(leaf, "dtype") and leaf.dtype == bool and np.ndim(leaf) == 0
        if not isinstance(leaf, bool) and not is_array:
            raise TypeError(
                f"`{name}` must be a function of the parameters or a tree of booleans, "
                f"got {reprlib.repr(leaf)} at '{_paths.path_name(path)}'."
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
    if divided and isinstance(value, str) and value == "int8":
        raise ValueError(
            "`mu_dtype` must not be 'int8' where a momentum is divided by its second "
            "moment: errors of the size of the largest entries would become huge "
            f"steps. Use '{_moments.OF_SQUARES}', whose errors are relative."
        )
    return state_dtype("mu_dtype", value, more)


def nu_dtype(value: DTypeLike | None) -> str | None:
    """Returns the name of a dtype for a second moment, see `_moments`.

    Raises:
      ValueError: If it is not one for state, nor float8_e4m3fn.
    """
    return state_dtype("nu_dtype", value, (_moments.OF_SQUARES,))
