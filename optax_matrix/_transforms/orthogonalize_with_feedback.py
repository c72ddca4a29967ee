"""Orthogonalizes summed gradients, and keeps what the update leaves out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_matrix import _layout, _linalg, _placement
from optax_matrix._transforms import _arguments, _moments, _numerics
from optax_matrix._transforms._moments import Moment
from optax_matrix._transforms.orthogonalize import orthogonalize


class OrthogonalizeWithFeedbackState(NamedTuple):
    """State of `orthogonalize_with_feedback`."""

    count: jax.Array  # int32, updates seen so far
    momentum: Any  # M, with the shape of a leaf, float32 or `mu_dtype`


def orthogonalize_with_feedback(
    method: str | _linalg.PolarMethod | None = _linalg.LargestSlices(),
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalizes a part of the sum of gradients, and decays only that part.

    With :math:`\mu` = ``momentum``, :math:`M_0 = 0` and :math:`P` the ``method``, which
    may leave inputs or outputs of its result zero,

    .. math::
      M \leftarrow M + G, \qquad
      U = P(M), \qquad
      M_{ij} \leftarrow \mu M_{ij} \text{ where neither } U_{i\cdot} \text{ nor }
        U_{\cdot j} \text{ is zero}.

    What `LargestSlices` leaves out of one update stays in :math:`M` undiminished and
    grows until it is large enough for another (error feedback). With a method that
    leaves out nothing, this is :math:`P` of ``optax.trace(momentum)``.

    Args:
      method: See `orthogonalize`. The default takes the quarter of the inputs or
        outputs, whichever are fewer, that has the largest entries.
      momentum: :math:`\mu`, in [0, 1), or a schedule.
      mu_dtype: See `ema_momentum`.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Each matrix of a stack has its own largest slices.
      placement: See `orthogonalize`.

    Returns:
      A transformation. Updates keep their shape and dtype; the state is one array per
      leaf. NaN or Inf in one matrix does not affect the others.

    Raises:
      ValueError: As `orthogonalize`; at construction, if ``momentum`` is outside
        [0, 1) or ``mu_dtype`` is another dtype.
      TypeError: As `orthogonalize`; at construction, for arguments of another type.

    Sharding:
      Any, as `orthogonalize`. Each owner receives its whole matrices and selects there,
      so that the result does not depend on the sharding. Selecting slices makes the
      products cheaper, but not the exchanges.

    References:
      Ahn et al., 2025, Dion2, `arXiv:2512.16928 <https://arxiv.org/abs/2512.16928>`_.
      Differs from the authors' code, https://github.com/microsoft/dion: on a mesh it
      selects on each device by default, among the inputs or outputs that are sharded;
      this is its ``selection_scope="global"``.
    """
    _placement.as_placement(placement)  # Refuses a period.
    whole = orthogonalize(method, layout=layout, placement=placement)
    _arguments.number_or_schedule("momentum", momentum, 0.0, 1.0)
    mu_dtype = _arguments.mu_dtype(mu_dtype)

    def init(params: optax.Params) -> OrthogonalizeWithFeedbackState:
        _layout.tree_views(layout, params)  # Raises for a leaf that does not fit.
        whole.init(params)
        zeros = _numerics.zero_moments(params, mu_dtype)
        return OrthogonalizeWithFeedbackState(jnp.zeros((), jnp.int32), zeros)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        decay = _numerics.value_at(momentum, state.count)

        def add(g: jax.Array, m: Moment) -> jax.Array:
            g = _numerics.wide(g)
            return _moments.read(m, g.dtype) + g

        def feed_back(
            view: _layout.MatrixView, u: jax.Array, m: jax.Array
        ) -> jax.Array:
            size = jnp.abs(_numerics.wide(u))
            taken = view.expand(view.sum(size, outputs=False)) != 0
            taken &= view.expand(view.sum(size, inputs=False)) != 0
            return jnp.where(taken, _numerics.as_scalar(decay, m) * m, m)

        total = _numerics.with_moments(add, updates, state.momentum)
        given = jax.tree.map(lambda m, g: m.astype(g.dtype), total, updates)
        done, _ = whole.update(given, optax.EmptyState())
        left = _layout.tree_map(feed_back, layout, done, total)
        count = _numerics.next_count(state.count)
        kept = _numerics.stored(left, state.momentum, count)
        return done, OrthogonalizeWithFeedbackState(count, kept)

    return optax.GradientTransformationExtraArgs(init, update)
