"""Replaces updates by exact polar factors every few updates."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _placement
from optax_matrix._transforms.orthogonalize import orthogonalize


def svd_supplement(
    every: ArrayLike,
    *,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each matrix by its exact polar factor in one of several updates.

    With the singular value decomposition :math:`X = U S V^\top` and :math:`k` =
    ``every``, in update :math:`t = 0, 1, \dots`,

    .. math::
      X \leftarrow U V^\top \text{ if } t \bmod k = 0, \quad X \text{ otherwise}.

    Put it after a stage that orthogonalizes cheaply, and a stage that fixes the norm
    after it, because cheap methods return matrices of another norm:

    >>> import optax_matrix as om
    >>> tx = optax.chain(
    ...     om.ema_momentum(),
    ...     om.orthogonalize("halley"),
    ...     om.svd_supplement(every=4),
    ...     om.match_rms(0.2),
    ... )

    Args:
      every: :math:`k`, at least 1.
      layout: See `orthogonalize`, as the following.
      placement: See `orthogonalize`.

    Returns:
      A transformation. Updates keep their shape and dtype. Zero matrices stay zero; NaN
      or Inf in one matrix does not affect the others. The state is the number of
      updates.

    Raises:
      ValueError: At construction, for ``every`` below 1; at ``init``, as
        `orthogonalize`.
      TypeError: At construction, if ``every`` is not an int; at ``init``, as
        `orthogonalize`.

    Cost:
      That of `Exact` in one of ``every`` updates, and nothing in the others.
    """
    _check.whole_number("every", every, 1)
    _placement.as_placement(placement)  # Refuses a period.
    return optax.conditionally_transform(
        orthogonalize("exact", layout=layout, placement=placement),
        lambda step, **extra_args: jnp.mod(step, every) == 0,
    )
