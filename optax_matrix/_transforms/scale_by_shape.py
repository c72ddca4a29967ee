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
    shape_scale: ShapeScale | None = "spectral",
    *,
    rms: ArrayLike = 0.2,
    layout: _layout.Layout = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each matrix of an update by a factor of its shape.

    For a matrix of :math:`in \times out`, the factor is

    - ``"spectral"``: :math:`\sqrt{\max(1, out/in)}` (KellerJordan/Muon);
    - ``"mup"``: :math:`\sqrt{out/in}`, the spectral condition for feature learning;
    - ``"rms"``: :math:`\rho\sqrt{\max(in, out)}` with :math:`\rho` = ``rms``, which
      gives a semi-orthogonal update entries of RMS :math:`\rho` (Moonlight).

    `match_rms` measures the update instead and is right for any update. This one is
    right for semi-orthogonal updates, and keeps their size relative to each other.

    Args:
      shape_scale: Which factor; None is 1.
      rms: :math:`\rho` of ``"rms"``, positive; the others do not use it.
      layout: Which axes of a leaf are the matrix, see `MatrixLayout`. None: the last
        two are (inputs, outputs). Blocks of a split leaf have their own factor.

    Returns:
      A transformation without state. Updates keep their shape and dtype.

    Raises:
      ValueError: At construction, for an unknown factor or an ``rms`` that is not
        positive; at ``init``, if a leaf does not fit ``layout``, with its path.

    References:
      Jordan et al., 2024, `Muon <https://kellerjordan.github.io/posts/muon/>`_; Yang
      et al., 2023, `arXiv:2310.17813 <https://arxiv.org/abs/2310.17813>`_; Liu et al.,
      2025, `arXiv:2502.16982 <https://arxiv.org/abs/2502.16982>`_.
    """
    _check.one_of("shape_scale", shape_scale, (None, "spectral", "mup", "rms"))
    _check.number("rms", rms, 0.0, low_open=True)
    if shape_scale is None:
        return _stateless.unchanged()

    def rescale(view: _layout.MatrixView, u: jax.Array) -> jax.Array:
        wide = _numerics.wide(u)
        if not u.size:
            return u
        fan_in, fan_out = np.asarray(view.fan_in()), np.asarray(view.fan_out())
        if shape_scale == "spectral":
            factor = np.sqrt(np.maximum(1.0, fan_out / fan_in))
        elif shape_scale == "mup":
            factor = np.sqrt(fan_out / fan_in)
        else:
            factor = np.sqrt(np.maximum(fan_in, fan_out) * 1.0)
        factor = jnp.asarray(factor, wide.dtype)
        if shape_scale == "rms":
            factor = factor * _numerics.as_scalar(rms, wide)
        if factor.ndim:
            factor = view.expand(factor)
        return (wide * factor).astype(u.dtype)

    return _stateless.per_matrix(rescale, layout)
