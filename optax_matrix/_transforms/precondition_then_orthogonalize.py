"""Orthogonalizes the direction of a preconditioner (SOAP-Muon)."""

import optax

from optax_matrix import _check, _layout, _linalg, _placement
from optax_matrix._transforms.orthogonalize import orthogonalize


def precondition_then_orthogonalize(
    precondition: optax.GradientTransformation,
    method: str | _linalg.PolarMethod | None = "newton_schulz",
    *,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the output of a preconditioner by its polar factor.

    The chain ``optax.chain(precondition, orthogonalize(method))``; SOAP-Muon with
    `soap_precondition` for :math:`P`,

    .. math:: U = \operatorname{polar}(P(G)).

    Args:
      precondition: The first stage; any transformation.
      method: See `orthogonalize`.
      layout: See `orthogonalize`. Pass it to the preconditioner, too.
      placement: See `orthogonalize`.

    Returns:
      A transformation.

    Raises:
      TypeError: At construction, if ``precondition`` is not a transformation.
      ValueError: As `orthogonalize`.
    """
    _check.transformation("precondition", precondition)
    return optax.chain(
        precondition, orthogonalize(method, layout=layout, placement=placement)
    )
