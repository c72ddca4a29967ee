"""Argument checks that let traced values through."""

from collections.abc import Collection
from typing import Any

import jax


def in_range(
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    low_open: bool = False,
) -> None:
    """Raises if a Python number lies outside [low, high), or (low, high).

    Arrays pass unread: an injected hyperparameter is traced when the factory runs, and
    a schedule has no value yet. So does None, where that is a default.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    # Written so that NaN fails too.
    if not (low < value < high or (value == low and not low_open)):
        left = "(" if low_open else "["
        raise ValueError(
            f"`{name}` must lie in {left}{low:g}, {high:g}), got {value!r}."
        )


def one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises unless `value` is one of `choices`."""
    if not any(value is choice or value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def static_int(name: str, value: Any, low: int) -> None:
    """Raises unless `value` is a Python integer of at least `low`.

    Step counts fix the shape of the program, so a traced one cannot be used.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` fixes the program and cannot be a traced array, got {value}. "
            f"Under `optax.inject_hyperparams` pass `static_args=({name!r},)`."
        )
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def static_number(name: str, value: Any) -> None:
    """Raises unless `value` is a Python number: one that fixes the program."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{name}` fixes the program and must be a Python number, got {value!r}."
        )


def params_given(params: Any, user: str) -> None:
    """Raises if `params` is None, naming the transform that needs it."""
    if params is None:
        raise ValueError(
            f"`{user}` needs the parameters: call `tx.update(updates, state, params)` "
            "with `params`, got None."
        )
