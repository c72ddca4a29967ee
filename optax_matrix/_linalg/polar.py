"""The protocol of polar methods, and the settings of Newton-Schulz and of `Exact`."""

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
from optax_matrix._linalg.newton_schulz import (
    METHODS,
    Method,
    gram_restarts,
    newton_schulz,
    newton_schulz_flops,
)
from optax_matrix._linalg.numerics import FACTORIZABLE, Precision
from optax_matrix._linalg.triangular import MUD, Halley, Zolotarev

_MULTIPLIABLE = ("bfloat16", "float16", *FACTORIZABLE)


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
      coefficients: A key of ``coefficients.TABLES``, or rows ``(a, b, c)``.
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
      TypeError: If ``steps`` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
      >>> print(NewtonSchulz(coefficients="polar_express").polar(x).round(2))
      [[1. 0. 0.]
       [0. 1. 0.]]

    See ``newton_schulz.newton_schulz`` for the mathematics, cost and references.
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
        numerics.store_types(self, self.dtype, self.precision, _MULTIPLIABLE)

    @property
    def rows(self) -> Rows:
        """The coefficients of the run, one row per step."""
        return resolve(self.coefficients, self.steps, self.safety)

    @property
    def transposable(self) -> bool:
        """Whether ``polar(x.mT)`` is ``polar(x).mT``; AOL rescales one side only."""
        return self._normalization != "aol"

    def polar(self, x: Array) -> Array:
        """Orthogonalizes each matrix of (..., m, n); see ``newton_schulz``."""
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
        """Returns the FLOPs of one m×n matrix; see ``newton_schulz_flops``.

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

    See ``exact.exact_polar`` for the mathematics, cost and references.
    """

    transposable: ClassVar[bool] = True
    method: Decomposition = "svd"
    dtype: DTypeLike | None = None
    precision: Precision | str = "highest"

    def __post_init__(self) -> None:
        """Checks the arguments and stores them in a hashable form."""
        _check.one_of("method", self.method, DECOMPOSITIONS)
        numerics.store_types(self, self.dtype, self.precision, FACTORIZABLE)

    def polar(self, x: Array) -> Array:
        """Orthogonalizes each matrix of (..., m, n); see ``exact_polar``."""
        return exact_polar(
            x,
            method=self.method,
            dtype=numerics.as_dtype(self.dtype, FACTORIZABLE),
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
