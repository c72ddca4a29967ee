"""What all matrix optimizers share: routing, and the arguments that go with it."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import (
    _check,
    _layout,
    _linalg,
    _placement,
    _routing,
    _transforms,
)
from optax_matrix._transforms import _arguments, _moments, _numerics

P = ParamSpec("P")
T = TypeVar("T")

COMMON = """\
weight_decay: :math:`\\lambda`, not negative, or a schedule: decoupled decay of the
  hidden matrices.
weight_decay_mask: Which hidden matrices decay, as in `optax.add_decayed_weights`;
  None is all of them.
mu_dtype: The dtype of the momentum in the state, see `ema_momentum`; None is float32,
  and float64 for float64 parameters. If it has 8 bits, second moments of entries are
  float8_e4m3fn. Those in eigenbases (`soap`, `kl_soap`, `soap_muon`, `track3`) have
  the other dtypes too. Not int8 where entries of the momentum are divided by their
  second moment.
routing: Which leaves are hidden matrices, and which of their axes are inputs and
  outputs: None for the rules for Flax trees, a function of (path, leaf), or a tree
  of labels; see `route`. Under `optax.inject_hyperparams` name a function in
  ``static_args``, because functions are taken for schedules there.
placement: Where the parameters lie on a mesh with auto axes, and the size of
  stacks, see `Placement`. None: infer shardings from explicit axes and choose the
  size of stacks automatically.
auxiliary: The transformation that trains all other leaves. None: `optax.adamw` with
  ``b1=0.9, b2=0.95, weight_decay=0``.
auxiliary_learning_rate: The learning rate of that AdamW, or a schedule. None:
  ``learning_rate`` times {factor}.
"""

# The factor of the optimizers with a `shape_scale`, see `factor`.
FACTOR = "0.15, or 1 with ``shape_scale='rms'``"


def routed(
    matrix: Callable[[_layout.Layout], optax.GradientTransformation],
    routing: _routing.Routing,
    auxiliary: optax.GradientTransformation | None,
    learning_rate: optax.ScalarOrSchedule,
    factor: float,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None,
) -> optax.GradientTransformationExtraArgs:
    """Gives the hidden matrices to `matrix` and all other leaves to the auxiliary.

    Args:
      matrix: Returns the optimizer of the matrices, given their layout.
      routing: See `_routing.partition`.
      auxiliary: The auxiliary optimizer; None is AdamW.
      learning_rate: The learning rate of the matrices.
      factor: The default learning rate of AdamW over that of the matrices.
      auxiliary_learning_rate: The learning rate of AdamW; None is the default.
    """
    _check.in_range("auxiliary_learning_rate", auxiliary_learning_rate, 0.0)
    matrix(None)  # The stages check their arguments now, not at `init`.
    if auxiliary is None:
        rate = auxiliary_learning_rate
        rate = product(learning_rate, factor) if rate is None else rate
        # As in nanoGPT and its successors; 0.999 forgets too slowly for short runs.
        auxiliary = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)
    else:
        _check.transformation("auxiliary", auxiliary)
        if auxiliary_learning_rate is not None:
            raise ValueError(
                "`auxiliary_learning_rate` is that of the default auxiliary optimizer "
                "and has no effect on `auxiliary`. Pass it to `auxiliary` itself."
            )
    return _routing.partition(matrix, auxiliary, routing)


def factor(shape_scale: _transforms.ShapeScale | None) -> float:
    """Returns the learning rate of AdamW over that of matrices scaled by shape."""
    _check.one_of("shape_scale", shape_scale, (None, "spectral", "mup", "rms"))
    return 1.0 if shape_scale == "rms" else 0.15


def decayed(
    weight_decay: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformation:
    """Returns `optax.add_decayed_weights` that keeps the dtype of updates.

    With an array or a schedule, Optax returns float32 for bfloat16.
    """
    _arguments.mask("weight_decay_mask", mask)
    return _transforms.float32_statistics(optax.add_decayed_weights(weight_decay, mask))


def product(
    a: optax.ScalarOrSchedule, b: optax.ScalarOrSchedule
) -> optax.ScalarOrSchedule:
    """Returns the product of two numbers or schedules; 0.0 if `b` is a Python 0."""
    if isinstance(b, int | float) and b == 0:
        return 0.0
    if callable(a) or callable(b):
        return lambda count: _numerics.value_at(a, count) * _numerics.value_at(b, count)
    return a * b


def check(learning_rate: Any, weight_decay: Any, orthogonalize: Any = None) -> None:
    """Checks arguments that stages do not check, or know under another name."""
    if orthogonalize is not None:
        _linalg.as_method(orthogonalize, "orthogonalize")
    _arguments.number_or_schedule("learning_rate", learning_rate, 0.0)
    _arguments.number_or_schedule("weight_decay", weight_decay, 0.0)


def check_pieces(placement: _placement.Placement | None) -> None:
    """Raises for a `piece_scale` where a later stage fixes the size of each update."""
    if placement is not None:
        place = _placement.as_placement(placement, periodic=True)
        if place.piece_scale != 1:
            raise ValueError(
                "`placement` must have `piece_scale` 1 in an optimizer that fixes the "
                f"size of each update, which undoes it, got {place.piece_scale}. "
                "Change the learning rate by a schedule of the same period."
            )


def adam(
    momentum: optax.ScalarOrSchedule,
    b2: ArrayLike,
    eps: ArrayLike,
    mu_dtype: DTypeLike | None,
    name: str = "momentum",
) -> optax.GradientTransformation:
    """Returns Adam's direction; its second moment has float32 or 8 bits.

    `name` is that of the momentum in errors.
    """
    _arguments.number_or_schedule(name, momentum, 0.0, 1.0)
    mu_dtype = _arguments.mu_dtype(mu_dtype, divided=True)
    return _transforms.scale_by_variance(
        b2,
        eps=eps,
        inner=_transforms.ema_momentum(
            momentum, nesterov=False, debias=True, mu_dtype=mu_dtype
        ),
        nu_dtype=nu_dtype(mu_dtype),
    )


def nu_dtype(mu_dtype: DTypeLike | None) -> str | None:
    """Returns the dtype of second moments beside a momentum: 8 bits if it has 8.

    In bfloat16, where nothing is rounded stochastically, they would stop changing.
    """
    name = _arguments.mu_dtype(mu_dtype)
    return _moments.OF_SQUARES if name in _moments.EIGHT_BITS else None


def documented(factor: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Writes the common arguments into a docstring, at a line ``<common arguments>``.

    Args:
      factor: What `auxiliary_learning_rate` defaults to, as a factor.
    """

    def decorate(factory: Callable[P, T]) -> Callable[P, T]:
        if factory.__doc__:  # None under python -OO
            # Python 3.13 removes the indentation, earlier versions keep it.
            doc = inspect.cleandoc(factory.__doc__)
            text = textwrap.indent(COMMON.replace("{factor}", factor), "  ")
            factory.__doc__ = doc.replace("  <common arguments>\n", text)
        return factory

    return decorate
