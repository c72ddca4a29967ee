"""Powers of symmetric positive semidefinite matrices, for preconditioners."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_matrix._linalg import numerics

RootMethod = Literal["eigh", "newton"]

# The limit of the coupled iteration: a small eigenvalue grows by (1 + 1/p)^p >= 2 per
# step, so one of 1e-12 of the largest reaches it in 40 steps and converges in a few
# more.
_MAX_STEPS = 60
# The estimate of the largest eigenvalue, of which damping is a small multiple.
_POWER_STEPS = 32
_STARTS = 4


class Root(NamedTuple):
    """A power of a matrix and its error.

    Attributes:
      value: (..., m, m).
      residual: (...,); NaN or Inf where the computation broke down.
    """

    value: Array
    residual: Array


def power_by_eigh(a: Array, exponent: float, damping: ArrayLike) -> Root:
    r"""Returns a power of damped matrices by their eigendecomposition.

    With A = Q diag(w) Qᵀ,

    .. math:: Q \operatorname{diag}(\max(w, 0) + \epsilon \max w)^{p} \, Q^\top.

    Args:
      a: (..., m, m), symmetric positive semidefinite, float32 or float64.
      exponent: p, any number.
      damping: ε, relative to the largest eigenvalue.

    Returns:
      The power, and max |A Q - Q diag(w)| relative to the largest eigenvalue. The power
      of a zero matrix is zero for every p.
    """
    a = _symmetric(a)
    w, q = jnp.linalg.eigh(a, symmetrize_input=False)
    top = jnp.maximum(w[..., -1:], 0)
    lifted = jnp.maximum(w, 0) + jnp.asarray(damping, a.dtype) * top
    zero = lifted == 0
    powers = jnp.where(zero, 0, jnp.where(zero, 1, lifted) ** exponent)
    off = jnp.matmul(a, q, precision="highest") - q * w[..., None, :]
    residual = (
        jnp.max(jnp.abs(off), axis=(-2, -1)) / jnp.where(top == 0, 1, top)[..., 0]
    )
    value = jnp.matmul(
        q * powers[..., None, :], numerics.transpose(q), precision="highest"
    )
    return Root(value, residual)


def _symmetric(a: Array) -> Array:
    return (a + numerics.transpose(a)) / 2


def inverse_root_by_newton(a: Array, p: int, damping: ArrayLike) -> Root:
    r"""Returns A^{-1/p} of damped matrices by the coupled Newton iteration.

    On A + ε λ I, with λ the largest eigenvalue by power iteration, and c the Frobenius
    norm of that,

    .. math::
      z = \tfrac{p+1}{2c}, \quad X = z^{1/p} I, \quad M = zA, \quad
      T = \tfrac{(p+1) I - M}{p}, \quad X \leftarrow X T, \quad M \leftarrow T^p M

    until M is I to rounding or gets no closer.

    Args:
      a: (..., m, m), symmetric positive semidefinite, float32 or float64.
      p: At least 1.
      damping: ε, relative to the largest eigenvalue. It bounds the condition number
        and with it the number of steps and the error.

    Returns:
      The root, and max |M - I|. A zero matrix gives zero.

    References:
      Iannazzo, 2006, `On the Newton method for the matrix p-th root
      <https://doi.org/10.1137/050624790>`_; Anil et al., 2020, `arXiv:2002.09018
      <https://arxiv.org/abs/2002.09018>`_.
    """
    a = _symmetric(a)
    eye = numerics.eye_like(a)
    # Scaled to about 1 first: squares of the entries must neither over- nor underflow.
    peak = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    zero = peak == 0
    peak = jnp.where(zero, 1, peak)
    unit = a / peak
    lifted = unit + jnp.asarray(damping, a.dtype) * _largest(unit) * eye
    c = numerics.frobenius(lifted)
    z = (p + 1) / (2 * c)
    tolerance = jnp.finfo(a.dtype).eps * 4

    def residual(m: Array) -> Array:
        return jnp.max(jnp.abs(m - eye), axis=(-2, -1))

    def unfinished(error: Array, before: Array) -> Array:
        # Small eigenvalues hide behind an error of about 1 until they have grown;
        # from there on it falls at every step but for rounding.
        return (error > tolerance) & ((error >= 0.5) | (error < before))

    def going_on(carry):
        step, _, _, error, before = carry
        return (step < _MAX_STEPS) & jnp.any(unfinished(error, before))

    def iterate(carry):
        step, x, m, error, _ = carry
        t = ((p + 1) * eye - m) / p
        next_x = jnp.matmul(x, t, precision="highest")
        next_m = jnp.matmul(_whole_power(t, p), m, precision="highest")
        next_error = residual(next_m)
        better = (next_error < error) | (error >= 0.5)
        x = jnp.where(better[..., None, None], next_x, x)
        m = jnp.where(better[..., None, None], next_m, m)
        return step + 1, x, m, jnp.where(better, next_error, error), error

    m = z * lifted
    x = z ** (1 / p) * eye
    error = residual(m)
    start = (0, x, m, error, jnp.full_like(error, jnp.inf))
    _, x, _, error, _ = jax.lax.while_loop(going_on, iterate, start)
    value = jnp.where(zero, 0, x * peak ** (-1 / p))
    return Root(value, jnp.where(zero[..., 0, 0], 0, error))


def _largest(a: Array) -> Array:
    """Returns the largest eigenvalue to a few percent, (..., 1, 1), by power iteration.

    It starts from several random vectors, always the same ones: a single vector can be
    orthogonal to the leading eigenvector.
    """
    shape = (*a.shape[:-1], _STARTS)
    v = jax.random.normal(jax.random.key(0), shape, a.dtype)

    def step(_, carry):
        v, _ = carry
        v = jnp.matmul(a, v, precision="highest")
        length = jnp.linalg.norm(v, axis=-2, keepdims=True)
        return v / jnp.where(length == 0, 1, length), length

    unit = v / jnp.linalg.norm(v, axis=-2, keepdims=True)
    _, lengths = jax.lax.fori_loop(0, _POWER_STEPS, step, (unit, unit[..., :1, :]))
    return jnp.max(lengths, axis=-1, keepdims=True)


def _whole_power(t: Array, p: int) -> Array:
    """Returns tᵖ by repeated squaring."""
    result = None
    while p:
        if p % 2:
            result = t if result is None else jnp.matmul(result, t, precision="highest")
        p //= 2
        if p:
            t = jnp.matmul(t, t, precision="highest")
    assert result is not None
    return result
