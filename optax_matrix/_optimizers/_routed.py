"""What all matrix optimizers share: who takes the leaves that are not matrices."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

import optax

from optax_matrix import (
    _check,
    _layout,
    _linalg,
    _placement,
    _routing,
    _transforms,
)

Auxiliary = optax.GradientTransformation | Mapping[str, Any] | None


def routed(
    matrix: Callable[[_layout.Layout], optax.GradientTransformation],
    *,
    learning_rate: optax.ScalarOrSchedule,
    routing: _routing.Routing,
    auxiliary: Auxiliary,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None,
) -> optax.GradientTransformationExtraArgs:
    """`matrix` for the hidden matrices, the auxiliary optimizer for the rest."""
    _check.in_range("learning_rate", learning_rate, 0.0)
    _check.in_range("auxiliary_learning_rate", auxiliary_learning_rate, 0.0)
    rest = _auxiliary(auxiliary, auxiliary_learning_rate, learning_rate)
    matrix(None)  # The stages check their arguments now, not at `init`.
    return _routing.partition(matrix, rest, routing)


def _auxiliary(
    auxiliary: Auxiliary,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    if isinstance(auxiliary, optax.GradientTransformation):
        if auxiliary_learning_rate is not None:
            raise ValueError(
                "`auxiliary_learning_rate` has no effect on an `auxiliary` that is a "
                "transformation: give it its learning rate, or pass its settings as "
                "a dict."
            )
        return auxiliary
    if not isinstance(auxiliary, Mapping | None):
        raise TypeError(
            "`auxiliary` must be an optax.GradientTransformation, a dict of settings "
            f"of optax.adamw, or None, got {auxiliary!r}."
        )
    # As in nanoGPT's line of recipes; b2 of 0.999 forgets too slowly for short runs.
    settings: dict[str, Any] = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.0}
    given = dict(auxiliary or {})
    known = set(inspect.signature(optax.adamw).parameters) - {"learning_rate"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"`auxiliary` has settings that optax.adamw does not take: {unknown}. "
            f"It takes {sorted(known)}; its learning rate is `auxiliary_learning_rate`."
        )
    rate = learning_rate if auxiliary_learning_rate is None else auxiliary_learning_rate
    return optax.adamw(rate, **(settings | given))


def momentum_average(
    momentum: Any, *, nesterov: bool, debias: bool = False
) -> optax.GradientTransformation:
    """`ema_momentum`, its decay called by the optimizers' name for it."""
    _check.in_range("momentum", momentum, 0.0, 1.0)
    return _transforms.ema_momentum(momentum, nesterov=nesterov, debias=debias)


def orthogonalized(
    method: str | _linalg.PolarMethod,
    layout: _layout.Layout,
    placement: _placement.Placement | None,
) -> optax.GradientTransformation:
    """`orthogonalize`, its method called by the optimizers' name for it."""
    if isinstance(method, str):
        _check.one_of("orthogonalize", method, ("newton_schulz", "halley", "exact"))
    return _transforms.orthogonalize(method, layout=layout, placement=placement)


def settings_of(
    transform: Callable[..., optax.GradientTransformation],
    given: Mapping[str, Any] | None,
    taken: Collection[str],
) -> dict[str, Any]:
    """Further settings of a transform, checked against what it takes.

    Args:
      transform: The transform.
      given: What the user gave as `preconditioner`.
      taken: What the optimizer has arguments for itself.
    """
    if not isinstance(given, Mapping | None):
        raise TypeError(
            f"`preconditioner` must be a dict of settings of {transform.__name__}, or "
            f"None, got {given!r}."
        )
    known = set(inspect.signature(transform).parameters) - {"layout", *taken}
    unknown = sorted(set(given or {}) - known)
    if unknown:
        raise ValueError(
            f"`preconditioner` has settings that it does not take: {unknown}. Those of "
            f"{transform.__name__} that are left are {sorted(known)}."
        )
    return dict(given or {})


def check_second_moment(b2: Any, eps: Any) -> None:
    """The stages would say `decay`."""
    _check.in_range("b2", b2, 0.0, 1.0)
    _check.in_range("eps", eps, 0.0, low_open=True)


def decayed(weight_decay: Any) -> optax.GradientTransformation:
    """Decoupled weight decay; nothing, and no need of parameters, for a plain 0."""
    _check.in_range("weight_decay", weight_decay, 0.0)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay)


def shaped(
    rule: _transforms.ShapeScale | None, layout: _layout.Layout
) -> optax.GradientTransformation:
    """The factor of the shape; nothing for None."""
    _check.one_of("shape_scale", rule, (None, *get_args(_transforms.ShapeScale)))
    if rule is None:
        return optax.identity()
    return _transforms.scale_by_shape(rule, layout=layout)


def rms_matched(rms: Any, layout: _layout.Layout) -> optax.GradientTransformation:
    """Entries of a given RMS; nothing for None."""
    _check.in_range("rms", rms, 0.0, low_open=True)
    if rms is None:
        return optax.identity()
    return _transforms.match_rms(rms, layout=layout)


def adam_direction(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformation:
    """Adam's update before the learning rate, its settings checked."""
    _check.in_range("b1", b1, 0.0, 1.0)
    check_second_moment(b2, eps)
    return _transforms.wide_statistics(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
