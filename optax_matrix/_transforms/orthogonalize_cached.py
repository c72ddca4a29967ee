"""Orthogonalizes by factors that are kept for several updates."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_matrix import _check, _layout, _linalg, _placement
from optax_matrix._transforms import _per_matrix
from optax_matrix._transforms._per_matrix import Scalars

Rational = _linalg.Halley | _linalg.Zolotarev


@dataclasses.dataclass(frozen=True)
class CachedPolar:
    """Multiplies matrices of one shape by their factors; work for `map_matrices`."""

    method: Rational
    stack_size: int | None

    def __call__(
        self,
        arrays: Sequence[Array],
        state: _placement.MatrixStack,
        scalars: Scalars,
    ) -> tuple[list[Array], _placement.MatrixStack]:
        """Returns the products and the factors, which are new if they are due."""
        x, (numbers, factors) = _placement.concatenated(arrays), state
        m, n = x.shape[-2:]
        size = self.stack_size or _placement.stack_size(m, n)
        due = scalars["count"] % scalars["refresh"] == 0
        missing = jnp.all(factors == 0, axis=(-2, -1))
        # 0 for a matrix of zeros or subnormal numbers, and NaN where one is not finite.
        square = jnp.sum(jnp.square(_linalg.unit_frobenius(x)), axis=(-2, -1))
        wanted = (due | missing) & (square > 0)

        def refreshed() -> Array:
            return _placement.map_stack(self.factor, (x, factors, wanted), size)

        factors = jax.lax.cond(jnp.any(wanted), refreshed, lambda: factors)
        y = _placement.map_stack(self.product, (x, factors), size)
        done = _placement.split_like(y.astype(x.dtype), arrays)
        return done, _placement.MatrixStack(numbers, factors)

    def factor(self, x: Array, old: Array, wanted: Array) -> Array:
        """Returns the factor of a matrix; the old one if it is not wanted or finite."""
        new = self.method.factor(x).astype(old.dtype)
        return jnp.where(wanted & jnp.isfinite(jnp.sum(new)), new, old)

    def product(self, x: Array, factor: Array) -> Array:
        """Returns a matrix of norm 1 times a factor."""
        unit = _linalg.unit_frobenius(x).astype(factor.dtype)
        pair = (unit, factor) if _linalg.is_tall(unit) else (factor, unit)
        return jnp.matmul(*pair, precision=self.method.precision)


def orthogonalize_cached(
    method: Literal["halley", "zolotarev"] | Rational = _linalg.Halley(),
    *,
    refresh: ArrayLike = 2,
    layout: _layout.Layout = None,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalizes each matrix by a factor that several updates share.

    The result of `Halley` and `Zolotarev` is :math:`Q(\hat X) \hat X` with a matrix
    :math:`Q` of the smaller side and :math:`\hat X = X / \|X\|_F`. With :math:`k` =
    ``refresh``, in update :math:`t = 0, 1, \dots`,

    .. math:: X_t \leftarrow Q(\hat X_s) \, \hat X_t, \qquad s = k \lfloor t/k \rfloor.

    A matrix that has no factor yet, because its updates were zero or not finite, gets
    one in the first update that is neither.

    Momentum changes slowly, so an old factor fits the new momentum, but not as well.
    Singular vectors that :math:`X_s` lacks are multiplied by up to :math:`h'(0) \,
    \|X_s\|_F / \|X_s\|_{S_4}`, where :math:`h'(0)` is 54 for ``Halley()``, 12 for
    ``Halley(0.1)`` and 318 for ``Zolotarev()``. With Nesterov momentum 0.95 of Gaussian
    16×24 gradients and ``refresh=5``, the largest singular value between refreshes was
    4.7 for ``Halley()`` and 4.6 for ``Halley(0.1)``; for gradients of rank one it was
    38 and 9. So prefer a larger ``lower_bound`` if gradients have a low rank, and put a
    stage after it that fixes the norm, such as `match_rms` or `normalize_frobenius`.

    Args:
      method: `Halley` with one step, or `Zolotarev`; or ``"halley"`` or ``"zolotarev"``
        with default settings.
      refresh: :math:`k`, the number of updates from one factor to the next, at least 1;
        1 computes it in every update.
      layout: See `orthogonalize`, as the following.
      placement: See `orthogonalize`.

    Returns:
      A transformation. The state is one square matrix of the smaller side per matrix,
      in float32 or float64, on the device that owns the matrix. Updates keep their
      shape and dtype. Zero matrices stay zero; NaN or Inf in one matrix does not affect
      the others, and is not kept in its factor.

    Raises:
      ValueError: At construction, for ``refresh`` below 1, another name or several
        steps; at ``init``, as `orthogonalize`.
      TypeError: At construction, for another method, or if ``refresh`` is not an int;
        at ``init``, as `orthogonalize`.

    Cost:
      One product with the long side, and in one of ``refresh`` updates the factor:
      another product, and the factorizations of ``Halley.flops``.

    References:
      CacheMuon, 2026, `arXiv:2606.16371 <https://arxiv.org/abs/2606.16371>`_, reuses
      polar computations too; its rule is another one.
    """
    if isinstance(method, str):
        _check.one_of("method", method, ("halley", "zolotarev"))
        method = cast(Rational, _linalg.as_method(method))
    _check.instance("method", method, _linalg.Halley, _linalg.Zolotarev)
    if len(method.maps) != 1:
        raise ValueError(
            f"`method` must have one step, so that it has one factor, got {method!r}."
        )
    _check.whole_number("refresh", refresh, 1)
    place = _placement.as_placement(placement)
    work = CachedPolar(method, place.stack_size)

    def zeros(m: int, n: int, dtype: DTypeLike) -> Array:
        return jnp.zeros((min(m, n),) * 2, dtype)

    return _per_matrix.per_matrix(
        zeros, lambda leaves: work, {"refresh": refresh}, layout, place
    )
