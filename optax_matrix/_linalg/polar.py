"""Methods of orthogonalization with their settings, one frozen dataclass each."""

import abc
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jax import Array
from jax.typing import DTypeLike

from optax_matrix import _check
from optax_matrix._linalg import numerics
from optax_matrix._linalg.coefficients import (
    NORMALIZATIONS,
    TABLES,
    Normalization,
    Rows,
    resolve,
)
from optax_matrix._linalg.exact import DECOMPOSITIONS, Decomposition, exact_polar
from optax_matrix._linalg.minimax import polar_express_rows
from optax_matrix._linalg.mud import mud, mud_flops
from optax_matrix._linalg.newton_schulz import (
    METHODS,
    Method,
    gram_restarts,
    newton_schulz,
    newton_schulz_flops,
)
from optax_matrix._linalg.numerics import Precision
from optax_matrix._linalg.rational import (
    RationalMap,
    rational_factor,
    rational_flops,
    rational_polar,
    zolotarev,
)

_FACTORIZABLE = ("float32", "float64")
_MULTIPLIABLE = ("bfloat16", "float16", *_FACTORIZABLE)


@runtime_checkable
class PolarMethod(Protocol):
    """A method that orthogonalizes matrices, for `orthogonalize`.

    Any hashable object with a ``polar`` method is one; a frozen dataclass of settings
    is the usual form. It must not be callable: `optax.inject_hyperparams` takes
    callables for schedules. Two attributes are optional:

    - ``transposable``: True if ``polar(x.mT)`` equals ``polar(x).mT`` to rounding. Tall
      and wide matrices may then be stacked together. Missing means False.
    - ``flops(m, n, dtype, backend)``: the FLOPs of one m×n matrix, which
      `describe_placement` needs.
    """

    def polar(self, x: Array) -> Array:
        """Returns the (approximate) polar factor of each matrix of (..., m, n)."""
        ...


@dataclass(frozen=True)
class NewtonSchulz:
    """Orthogonalizes by Newton-Schulz, with a named coefficient table or your own rows.

    Args:
      steps: Number of steps, at least 1; fewer orthogonalize less. None is the table's
        own number: 5 for ``"jordan"``. A count that the table does not define raises.
      coefficients: A key of `coefficients.TABLES`, or rows ``(a, b, c)``.
      method: ``"plain"``, ``"gram"``, or ``"auto"`` for the one with fewer FLOPs.
      safety: s ≥ 1 of ``(a/s, b/s³, c/s⁵)`` on all rows but the table's last, for
        ``"polar_express"`` (None is 1.01) and ``"cans"`` (None is 1, as published;
        that diverges in bfloat16, 1.01 does not).
      normalization: ``"frobenius"``, ``"schatten4"`` or ``"aol"``; None is the one the
        table was made for, and ``"frobenius"`` for your own rows.
      dtype: Dtype of the products: bfloat16, float16, float32 or float64. None is
        float64 for float64 input and float32 otherwise.
      precision: Precision of the matmuls: None, ``"default"``, ``"high"``,
        ``"highest"`` or a `jax.lax.DotAlgorithmPreset`. None is JAX's default.

    Raises:
      ValueError: If an argument is not one of the above.
      TypeError: If `steps` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
      >>> print(NewtonSchulz(coefficients="polar_express").polar(x).round(2))
      [[1. 0. 0.]
       [0. 1. 0.]]

    See `newton_schulz.newton_schulz` for the mathematics, cost and references.
    """

    steps: int | None = None
    coefficients: str | Sequence[Sequence[float]] = "jordan"
    method: Method = "auto"
    safety: float | None = None
    normalization: Normalization | None = None
    dtype: DTypeLike | None = None
    precision: Precision | str = None

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        rows = self.rows
        if not isinstance(self.coefficients, str):
            # As given, not resolved, so that `dataclasses.replace` can change `steps`.
            given = rows[: len(self.coefficients)]
            object.__setattr__(self, "coefficients", given)
        _check.one_of("method", self.method, METHODS)
        _check.one_of("normalization", self.normalization, (None, *NORMALIZATIONS))
        _store_types(self, self.dtype, self.precision, _MULTIPLIABLE)

    @property
    def rows(self) -> Rows:
        """The coefficients of the run, one row per step."""
        return resolve(self.coefficients, self.steps, self.safety)

    @property
    def transposable(self) -> bool:
        """Whether ``polar(x.mT)`` is ``polar(x).mT``; AOL rescales one side only."""
        return self._normalization != "aol"

    def polar(self, x: Array) -> Array:
        """Orthogonalizes each matrix of (..., m, n); see `newton_schulz`."""
        return newton_schulz(
            x,
            self.rows,
            normalization=self._normalization,
            method=self.method,
            dtype=numerics.as_dtype(self.dtype, _MULTIPLIABLE),
            precision=numerics.as_precision(self.precision),
        )

    def flops(
        self,
        m: int,
        n: int,
        dtype: DTypeLike = "float32",
        backend: str | None = None,
    ) -> int:
        """Returns the FLOPs of one m×n matrix; see `newton_schulz_flops`.

        Args:
          m: One side.
          n: The other side.
          dtype: The dtype of the matrix.
          backend: ``"cpu"``, ``"gpu"`` or ``"tpu"``: the rounding of its products
            decides how often the Gram form restarts. None is JAX's default backend.
        """
        rows = self.rows
        points = gram_restarts(
            m,
            n,
            rows,
            self.method,
            numerics.as_dtype(self.dtype, _MULTIPLIABLE)
            or numerics.at_least_float32(dtype),
            numerics.as_precision(self.precision),
            backend,
        )
        restarts = None if points is None else len(points)
        cubic = sum(row[2] == 0.0 for row in rows)
        return newton_schulz_flops(m, n, len(rows), restarts, cubic)

    @property
    def _normalization(self) -> Normalization:
        if self.normalization is None and isinstance(self.coefficients, str):
            return TABLES[self.coefficients].normalization
        return self.normalization or "frobenius"


class _Rational(abc.ABC):
    """What `Halley` and `Zolotarev` share: maps, and products around them."""

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
            dtype=numerics.as_dtype(self.dtype, _FACTORIZABLE),
            precision=numerics.as_precision(self.precision),
        )

    def factor(self, x: Array) -> Array:
        """Returns the factor of each matrix, for one map; see `rational_factor`."""
        (h,) = self.maps
        return rational_factor(
            x,
            h,
            self.rows,
            dtype=numerics.as_dtype(self.dtype, _FACTORIZABLE),
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
      lower_bound: ℓ, in (0, 1]: the smallest singular value that matters, relative to
        the Schatten-4 norm. One step maps [ℓ, 1] into [0.25, 1], [0.51, 1] or
        [0.87, 1] for 1e-3, 1e-2 or 1e-1. Its float32 error grows as it falls: 1e-5,
        2e-4 and 4e-3 at 1e-2, 1e-3 and 1e-4.
      steps: Number of steps, at least 1. Two map [ℓ, 1] into [0.96, 1] for 1e-3.
      polish: Number of Newton-Schulz steps after the last one, on the Gram matrix,
        with no further product with the long side; see `polar_express_rows`. Two
        after one step map [ℓ, 1] into [0.997, 1.003] for 1e-3.
      dtype: Dtype of the products: float32 or float64. None is float64 for float64
        input and float32 otherwise.
      precision: Precision of the matmuls, as in `NewtonSchulz`.

    Raises:
      ValueError: If an argument is not one of the above.
      TypeError: If `steps` or `polish` is not an int or `lower_bound` not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
      >>> print(Halley(lower_bound=0.1, steps=2).polar(x).round(2))
      [[1. 0. 0.]
       [0. 1. 0.]]

    See `rational.rational_polar` for the mathematics, cost and references.
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
        _store_types(self, self.dtype, self.precision, _FACTORIZABLE)

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
      lower_bound: ℓ, in (0, 1]: the smallest singular value that matters, relative to
        the Schatten-4 norm. Two poles map [ℓ, 1] into [0.66, 1], [0.77, 1] or [0.88, 1]
        for 1e-3, 3e-3 or 1e-2.
      poles: Number of poles, at least 1, each of which is a factorization of the short
        side.
      dtype: Dtype of the products: float32 or float64. None is float64 for float64
        input and float32 otherwise.
      precision: Precision of the matmuls, as in `NewtonSchulz`.

    Raises:
      ValueError: If an argument is not one of the above.
      TypeError: If `poles` is not an int or `lower_bound` not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
      >>> print(Zolotarev(lower_bound=0.1, poles=2).polar(x).round(2))
      [[1.   0.   0.  ]
       [0.   0.99 0.  ]]

    See `rational.rational_polar` for the mathematics, cost and references.
    """

    lower_bound: float = 3e-3
    poles: int = 2
    dtype: DTypeLike | None = None
    precision: Precision | str = "highest"

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        _check_bound(self.lower_bound)
        _check.static_int("poles", self.poles, 1)
        _store_types(self, self.dtype, self.precision, _FACTORIZABLE)

    @functools.cached_property
    def maps(self) -> tuple[RationalMap, ...]:
        """The rational map."""
        return (zolotarev(float(self.lower_bound), self.poles),)


@dataclass(frozen=True)
class MUD:
    """Whitens by triangular solves with half of the Gram matrix; hardly orthogonalizes.

    Args:
      passes: Number of passes, at least 1.
      dtype: Dtype of the products: float32 or float64. None is float64 for float64
        input and float32 otherwise.
      precision: Precision of the matmuls, as in `NewtonSchulz`.

    Raises:
      ValueError: If an argument is not one of the above.
      TypeError: If `passes` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
      >>> print(MUD().polar(x))
      [[1. 0. 0.]
       [0. 1. 0.]]

    See `mud.mud` for the mathematics, cost and references.
    """

    transposable: ClassVar[bool] = False
    passes: int = 1
    dtype: DTypeLike | None = None
    precision: Precision | str = "highest"

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        _check.static_int("passes", self.passes, 1)
        _store_types(self, self.dtype, self.precision, _FACTORIZABLE)

    def polar(self, x: Array) -> Array:
        """Whitens each matrix of (..., m, n); see `mud`."""
        return mud(
            x,
            passes=self.passes,
            dtype=numerics.as_dtype(self.dtype, _FACTORIZABLE),
            precision=numerics.as_precision(self.precision),
        )

    def flops(
        self,
        m: int,
        n: int,
        dtype: DTypeLike = "float32",
        backend: str | None = None,
    ) -> int:
        """Returns the FLOPs of one m×n matrix, on any backend; see `mud_flops`."""
        del dtype, backend
        return mud_flops(m, n, self.passes)


@dataclass(frozen=True)
class Exact:
    """Orthogonalizes exactly, by SVD or eigendecomposition; slow, for reference and
    tests.

    Args:
      method: ``"svd"``, or ``"eigh"`` of the smaller Gram matrix.
      dtype: Dtype of the decomposition: float32 or float64. None is float64 for float64
        input and float32 otherwise.
      precision: Precision of the matmuls, as in `NewtonSchulz`.

    Raises:
      ValueError: If an argument is not one of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])  # rank 1
      >>> print(jnp.abs(Exact().polar(x)))
      [[0. 1. 0.]
       [0. 0. 0.]]

    See `exact.exact_polar` for the mathematics, cost and references.
    """

    transposable: ClassVar[bool] = True
    method: Decomposition = "svd"
    dtype: DTypeLike | None = None
    precision: Precision | str = "highest"

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        _check.one_of("method", self.method, DECOMPOSITIONS)
        _store_types(self, self.dtype, self.precision, _FACTORIZABLE)

    def polar(self, x: Array) -> Array:
        """Orthogonalizes each matrix of (..., m, n); see `exact_polar`."""
        return exact_polar(
            x,
            method=self.method,
            dtype=numerics.as_dtype(self.dtype, _FACTORIZABLE),
            precision=numerics.as_precision(self.precision),
        )


_NAMED = {
    "newton_schulz": NewtonSchulz,
    "halley": Halley,
    "zolotarev": Zolotarev,
    "mud": MUD,
    "exact": Exact,
}


def as_method(value: str | PolarMethod, name: str = "method") -> PolarMethod:
    """Returns the method of a name, or the method itself.

    Args:
      value: ``"newton_schulz"``, ``"halley"``, ``"zolotarev"``, ``"mud"`` or
        ``"exact"`` with default settings, or an object with a ``polar`` method.
      name: The name of the argument, for errors.

    Raises:
      ValueError: If the name is unknown.
      TypeError: If `value` is neither a name nor a method, or is a class, or is not
        hashable.
    """
    if isinstance(value, str):
        _check.one_of(name, value, tuple(_NAMED))
        return _NAMED[value]()
    if isinstance(value, type) or not isinstance(value, PolarMethod):
        raise TypeError(
            f"`{name}` must be one of {', '.join(map(repr, _NAMED))}, or an "
            f"object with a `polar` method such as `NewtonSchulz()`, got {value!r}."
        )
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be hashable, as a frozen dataclass is, got {value!r}."
        ) from None
    return value


def _check_bound(lower_bound: float) -> None:
    _check.static_number("lower_bound", lower_bound)
    _check.in_range(
        "lower_bound", lower_bound, 0.0, 1.0, low_open=True, high_open=False
    )


def _store_types(
    method: NewtonSchulz | Halley | Zolotarev | MUD | Exact,
    dtype: DTypeLike | None,
    precision: Precision | str,
    allowed: tuple[str, ...],
) -> None:
    """Stores dtype and precision in a hashable form on a frozen instance."""
    found = numerics.as_dtype(dtype, allowed)
    # By name, because NumPy takes None for float64: `np.dtype("float64") == None`.
    object.__setattr__(method, "dtype", None if found is None else found.name)
    object.__setattr__(method, "precision", numerics.as_precision(precision))
