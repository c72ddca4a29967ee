"""Scales an orthogonalized update by a factor of its matrix's shape."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout
from optax_matrix._transforms import _numerics, _stateless

ShapeScale = Literal["spectral", "mup", "rms"]


def scale_by_shape(
    rule: ShapeScale = "spectral",
    *,
    rms: ArrayLike = 0.2,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each update by a factor that depends on its matrix's shape alone.

    For a matrix of :math:`in \times out`, the factor is

    - ``"spectral"``: :math:`\sqrt{\max(1, out/in)}` (KellerJordan/Muon);
    - ``"mup"``: :math:`\sqrt{out/in}`, the spectral condition for feature learning;
    - ``"rms"``: :math:`\rho\sqrt{\max(in, out)}` with :math:`\rho` = ``rms``, which
      gives a semi-orthogonal update entries of RMS :math:`\rho` (Moonlight).

    `match_rms` measures the update instead and is right for any update; this one is
    right for semi-orthogonal ones, and keeps the size that the stage before gave.

    Args:
      rule: Which factor.
      rms: :math:`\rho` of the rule ``"rms"``, positive; the others do not use it.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Blocks of a split leaf have their own factor.

    Returns:
      A transformation without state. Updates keep their shape and dtype.

    Raises:
      ValueError: At construction, for another rule or an ``rms`` that is not positive;
        at ``init``, if a leaf does not fit ``layout``, with its path.

    References:
      Jordan et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_; Yang
      et al., 2023, `arXiv:2310.17813 <https://arxiv.org/abs/2310.17813>`_; Liu et al.,
      2025, `arXiv:2502.16982 <https://arxiv.org/abs/2502.16982>`_.
    """
    _check.one_of("rule", rule, ("spectral", "mup", "rms"))
    _check.in_range("rms", rms, 0.0, low_open=True)

    def rescale(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        fan_in, fan_out = np.asarray(view.fan_in()), np.asarray(view.fan_out())
        if rule == "spectral":
            factor = np.sqrt(np.maximum(1.0, fan_out / fan_in))
        elif rule == "mup":
            factor = np.sqrt(fan_out / fan_in)
        else:
            factor = np.sqrt(np.maximum(fan_in, fan_out) * 1.0)
        factor = jnp.asarray(factor, wide.dtype)
        if rule == "rms":
            factor = factor * _numerics.as_scalar(rms, wide)
        if factor.ndim:
            factor = view.expand(factor)
        return (wide * factor).astype(u.dtype)

    return _stateless.per_matrix(rescale, layout)
