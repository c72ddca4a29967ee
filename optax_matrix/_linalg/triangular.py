"""Settings of the methods that solve triangular systems: rational ones, and MUD."""

import abc
import functools
from dataclasses import dataclass
from typing import ClassVar

from jax import Array
from jax.typing import DTypeLike

from optax_matrix import _check
from optax_matrix._linalg import numerics
from optax_matrix._linalg.coefficients import Rows
from optax_matrix._linalg.minimax import polar_express_rows
from optax_matrix._linalg.mud import mud, mud_flops
from optax_matrix._linalg.numerics import FACTORIZABLE, Precision
from optax_matrix._linalg.rational import (
    RationalMap,
    rational_factor,
    rational_flops,
    rational_polar,
    zolotarev,
)


class _Rational(abc.ABC):
    """Base class of `Halley` and `Zolotarev`."""

    transposable: ClassVar[bool] = True
    dtype: DTypeLike | None
    precision: Precision | str

    @property
    @abc.abstractmethod
    def maps(self) -> tuple[RationalMap, ...]:
        """The rational maps, first applied first."""

    @property
    def rows(self) -> Rows:
        """The Newton-Schulz steps after the last map."""
        return ()

    def polar(self, x: Array) -> Array:
        """Orthogonalizes each matrix of (..., m, n); see `rational_polar`."""
        return rational_polar(
            x,
            self.maps,
            self.rows,
            dtype=numerics.as_dtype(self.dtype, FACTORIZABLE),
            precision=numerics.as_precision(self.precision),
        )

    def factor(self, x: Array) -> Array:
        """Returns the factor of each matrix, for one map; see `rational_factor`.

        Raises:
          ValueError: If there are several steps, and as `rational_factor`.
        """
        if len(self.maps) != 1:
            raise ValueError(f"Only a method with one step has a factor, got {self!r}.")
        (h,) = self.maps
        return rational_factor(
            x,
            h,
            self.rows,
            dtype=numerics.as_dtype(self.dtype, FACTORIZABLE),
            precision=numerics.as_precision(self.precision),
        )

    def flops(
        self,
        m: int,
        n: int,
        dtype: DTypeLike = "float32",
        backend: str | None = None,
    ) -> int:
        """Returns the FLOPs of one m×n matrix, on any backend; see `rational_flops`."""
        del dtype, backend
        return rational_flops(m, n, self.maps, self.rows)


@dataclass(frozen=True)
class Halley(_Rational):
    """Orthogonalizes by Halley's rational iteration, with few large products.

    Args:
      lower_bound: ℓ, in [1e-7, 1]: the smallest singular value that matters, relative
        to the Schatten-4 norm. One step maps [ℓ, 1] into [0.24, 1], [0.50, 1] or
        [0.86, 1] for 1e-3, 1e-2 or 1e-1. Its float32 error grows as it falls, to a
        spectral norm of 2e-5, 4e-4 and 5e-3 at 1e-2, 1e-3 and 1e-4. Below 5.2e-5 it
        needs float64.
      steps: Number of steps, at least 1. Two map [ℓ, 1] into [0.96, 1] for 1e-3.
      polish: Number of Newton-Schulz steps after the last one, on the Gram matrix,
        with no further product with the long side; see `polar_express_rows`. Two
        after one step map [ℓ, 1] into [0.997, 1.003] for 1e-3.
      dtype: Dtype of the products: float32 or float64. None is float64 for float64
        input and float32 otherwise.
      precision: Precision of the matmuls, as in `NewtonSchulz`.

    Raises:
      ValueError: If an argument is not one of the above; in ``polar`` and ``factor``,
        if ``lower_bound`` is too small for the dtype of the products.
      TypeError: If ``steps`` or ``polish`` is not an int or ``lower_bound`` not a
        number.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
      >>> print(Halley(lower_bound=0.1, steps=2).polar(x).round(2))
      [[1. 0. 0.]
       [0. 1. 0.]]

    See ``rational.rational_polar`` for the mathematics, cost and references.
    """

    lower_bound: float = 1e-2
    steps: int = 1
    polish: int = 0
    dtype: DTypeLike | None = None
    precision: Precision | str = "highest"

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        _check_bound(self.lower_bound)
        _check.static_int("steps", self.steps, 1)
        _check.static_int("polish", self.polish, 0)
        numerics.store_types(self, self.dtype, self.precision, FACTORIZABLE)

    @functools.cached_property
    def maps(self) -> tuple[RationalMap, ...]:
        """The rational maps, each for the interval that the one before leaves."""
        maps, low = [], float(self.lower_bound)
        for _ in range(self.steps):
            maps.append(zolotarev(low))
            # Rounding must not carry the bound past 1.
            low = min(maps[-1](low), 1.0)
        return tuple(maps)

    @functools.cached_property
    def rows(self) -> Rows:
        """The Newton-Schulz steps for the interval that the maps leave."""
        low = float(self.lower_bound)
        for h in self.maps:
            low = min(h(low), 1.0)
        return polar_express_rows(low, self.polish) if self.polish else ()


@dataclass(frozen=True)
class Zolotarev(_Rational):
    """Orthogonalizes by one rational map with several poles, in two large products.

    The best map of its degree: `Halley` is the one with one pole.

    Args:
      lower_bound: ℓ, in [1e-7, 1]: the smallest singular value that matters, relative
        to the Schatten-4 norm. Two poles map [ℓ, 1] into [0.66, 1], [0.77, 1] or
        [0.87, 1] for 1e-3, 3e-3 or 1e-2. Their float32 error grows as it falls, to a
        spectral norm of 5e-5, 3e-4 and 3e-3 at 1e-2, 3e-3 and 1e-3. Below 3.5e-4 two
        poles need float64, below 7e-4 three.
      poles: Number of poles, at least 1, each of which is a factorization of the short
        side.
      dtype: Dtype of the products: float32 or float64. None is float64 for float64
        input and float32 otherwise.
      precision: Precision of the matmuls, as in `NewtonSchulz`.

    Raises:
      ValueError: If an argument is not one of the above; in ``polar`` and ``factor``,
        if ``lower_bound`` is too small for ``poles`` and the dtype of the products.
      TypeError: If ``poles`` is not an int or ``lower_bound`` not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
      >>> print(Zolotarev(lower_bound=0.1, poles=2).polar(x).round(2))
      [[1. 0. 0.]
       [0. 1. 0.]]

    See ``rational.rational_polar`` for the mathematics, cost and references.
    """

    lower_bound: float = 3e-3
    poles: int = 2
    dtype: DTypeLike | None = None
    precision: Precision | str = "highest"

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        _check_bound(self.lower_bound)
        _check.static_int("poles", self.poles, 1)
        numerics.store_types(self, self.dtype, self.precision, FACTORIZABLE)

    @functools.cached_property
    def maps(self) -> tuple[RationalMap, ...]:
        """The rational map."""
        return (zolotarev(float(self.lower_bound), self.poles),)


@dataclass(frozen=True)
class MUD:
    """Decorrelates by triangular solves; the result is only roughly orthogonal.

    Args:
      passes: Number of passes, at least 1.
      dtype: Dtype of the products: float32 or float64. None is float64 for float64
        input and float32 otherwise.
      precision: Precision of the matmuls, as in `NewtonSchulz`.

    Raises:
      ValueError: If an argument is not one of the above.
      TypeError: If ``passes`` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
      >>> print(MUD().polar(x))
      [[1. 0. 0.]
       [0. 1. 0.]]

    See ``mud.mud`` for the mathematics, cost and references.
    """

    transposable: ClassVar[bool] = False
    passes: int = 1
    dtype: DTypeLike | None = None
    precision: Precision | str = "highest"

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        _check.static_int("passes", self.passes, 1)
        numerics.store_types(self, self.dtype, self.precision, FACTORIZABLE)

    def polar(self, x: Array) -> Array:
        """Decorrelates the slices of each matrix of (..., m, n); see ``mud``."""
        return mud(
            x,
            passes=self.passes,
            dtype=numerics.as_dtype(self.dtype, FACTORIZABLE),
            precision=numerics.as_precision(self.precision),
        )

    def flops(
        self,
        m: int,
        n: int,
        dtype: DTypeLike = "float32",
        backend: str | None = None,
    ) -> int:
        """Returns the FLOPs of one m×n matrix, on any backend; see ``mud_flops``."""
        del dtype, backend
        return mud_flops(m, n, self.passes)


def _check_bound(lower_bound: float) -> None:
    _check.static_number("lower_bound", lower_bound)
    # See `zolotarev`.
    _check.in_range("lower_bound", lower_bound, 1e-7, 1.0, high_open=False)
