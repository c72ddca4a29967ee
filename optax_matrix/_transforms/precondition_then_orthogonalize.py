"""A preconditioner's direction, orthogonalized (SOAP-Muon)."""

import optax

from optax_matrix import _layout, _linalg, _placement
from optax_matrix._transforms.orthogonalize import orthogonalize


def precondition_then_orthogonalize(
    precondition: optax.GradientTransformation,
    method: str | _linalg.PolarMethod = "newton_schulz",
    *,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces what a preconditioner makes of an update by its polar factor.

    The plain chain ``optax.chain(precondition, orthogonalize(method))``: with
    `soap_precondition` for :math:`P` SOAP-Muon,

    .. math:: U = \operatorname{polar}(P(G)).

    Args:
      precondition: The first stage; any transformation.
      method: See `orthogonalize`.
      layout: See `orthogonalize`; the preconditioner has its own.
      placement: See `orthogonalize`.

    Returns:
      A transformation.

    Raises:
      TypeError: At construction, if ``precondition`` is not a transformation.
      ValueError: As `orthogonalize`.
    """
    if not isinstance(precondition, optax.GradientTransformation):
        raise TypeError(
            "`precondition` must be an optax.GradientTransformation, such as "
            f"`soap_precondition()`, got {precondition!r}."
        )
    return optax.chain(
        precondition, orthogonalize(method, layout=layout, placement=placement)
    )
