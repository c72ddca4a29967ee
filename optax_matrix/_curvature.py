"""Second derivatives of a loss: products with the Hessian, Newton's step, Lanczos."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _linalg, _mesh


def hessian_vector_product(
    loss: Callable[..., jax.Array], params: optax.Params, vector: optax.Params
) -> optax.Params:
    r"""Returns the product of the Hessian of a loss with a vector.

    .. math:: H v = \frac{d}{d\epsilon} \nabla L(\theta + \epsilon v) \Big|_{\epsilon=0}

    One forward-mode derivative of the gradient: it costs about two gradients, and the
    Hessian is never formed.

    Args:
      loss: A function of the parameters that returns a number.
      params: :math:`\theta`, a tree of real floating arrays.
      vector: :math:`v`, with the structure, shapes and dtypes of ``params``.

    Returns:
      :math:`H v`, a tree like ``params``.

    Raises:
      TypeError: If ``loss`` is not a function, or a leaf is not real floating.
      ValueError: If ``vector`` has another structure than ``params``.

    References:
      Pearlmutter, 1994, "Fast exact multiplication by the Hessian".

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params):
      ...     return 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * params["w"] ** 2)
      >>> params = {"w": jnp.ones(2)}
      >>> print(hessian_vector_product(loss, params, params)["w"])
      [1. 3.]
    """
    _check.function("loss", loss, "the parameters")
    _layout.check_all_floating(params)
    found, wanted = jax.tree.structure(vector), jax.tree.structure(params)
    if found != wanted:
        raise ValueError(
            f"`vector` must have the structure of `params`, {wanted}, got {found}."
        )
    _layout.check_all_floating(vector)
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


def newton_step(
    loss: Callable[..., jax.Array],
    params: optax.Params,
    *,
    damping: ArrayLike = 0.0,
) -> optax.Updates:
    r"""Returns the step to the stationary point of the loss's quadratic model.

    With :math:`\delta` = ``damping``,

    .. math:: U = -(H + \delta I)^{-1} \nabla L(\theta).

    It forms the Hessian, whose size is the square of the number of parameters, so it is
    for problems of up to some thousand parameters. On a convex quadratic it ends at the
    minimum. Where :math:`H + \delta I` has negative eigenvalues it goes to a saddle
    point or a maximum.

    Args:
      loss: A function of the parameters that returns a number.
      params: :math:`\theta`, a tree of real floating arrays. The loss is differentiated
        in float32, or float64.
      damping: :math:`\delta`, not negative, in the unit of the Hessian. It shortens the
        step where the curvature is small.

    Returns:
      The step, a tree like ``params``, to be added (`optax.apply_updates`). It is huge
      or not finite if the matrix is singular.

    Raises:
      TypeError: If ``loss`` is not a function, ``damping`` not a number, or a leaf not
        real floating.
      ValueError: If ``damping`` is a negative number.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"x": jnp.ones(3), "y": jnp.ones(2)}
      >>> def loss(params):
      ...     return jnp.sum((params["x"] - 2) ** 2) + jnp.sum(params["y"] ** 2)
      >>> end = optax.apply_updates(params, newton_step(loss, params))
      >>> print(end["x"], end["y"])
      [2. 2. 2.] [0. 0.]
    """
    _check.function("loss", loss, "the parameters")
    _check.number("damping", damping, 0.0)
    flat, unravel = ravel_pytree(_wide(params))

    def flat_loss(x: jax.Array) -> jax.Array:
        return loss(unravel(x))

    hessian = jax.hessian(flat_loss)(flat)
    damped = hessian + damping * jnp.eye(len(flat), dtype=flat.dtype)
    step = unravel(-jnp.linalg.solve(damped, jax.grad(flat_loss)(flat)))
    return jax.tree.map(lambda u, p: u.astype(jnp.result_type(p)), step, params)


def _wide(params: optax.Params) -> optax.Params:
    """Returns the parameters in float32, or float64 where they are."""
    _layout.check_all_floating(params)
    arrays = jax.tree.map(jnp.asarray, params)
    return jax.tree.map(lambda p: p.astype(_linalg.at_least_float32(p.dtype)), arrays)


class Curvature(NamedTuple):
    """Estimates of the extreme eigenvalues of a Hessian."""

    largest: jax.Array
    smallest: jax.Array
    error: jax.Array  # at most how far `largest` is from an eigenvalue


def extreme_curvature(
    loss: Callable[..., jax.Array],
    params: optax.Params,
    key: jax.Array,
    steps: int = 20,
) -> Curvature:
    """Estimates the extreme eigenvalues of the Hessian by Lanczos iterations.

    See `optax_matrix.diagnostics.largest_curvature`.
    """
    _check.function("loss", loss, "the parameters")
    _check.static_int("steps", steps, 1)
    params = _wide(params)
    try:
        jax.random.split(key)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`key` must be one key, such as `jax.random.key(0)`, got "
            f"{type(key).__name__}."
        ) from error
    vector = optax.tree.random_like(key, params, jax.random.normal)
    vector = optax.tree.scale(1 / optax.tree.norm(vector), vector)
    vector = jax.tree.map(_mesh.like, vector, params)
    basis = jax.tree.map(lambda v: jnp.stack([jnp.zeros_like(v)] * steps), vector)

    def coefficients(basis: Any, w: Any) -> jax.Array:
        # Sums of products: matmuls over sharded axes need more on explicit meshes.
        products = jax.tree.map(
            lambda b, x: jnp.sum(b * x[None], axis=tuple(range(1, b.ndim))), basis, w
        )
        return jnp.sum(jnp.stack(jax.tree.leaves(products)), axis=0)

    def without(basis: Any, w: Any) -> Any:
        c = coefficients(basis, w)
        return jax.tree.map(lambda b, x: x - jnp.tensordot(c, b, 1), basis, w)

    def iterate(carry: Any, i: jax.Array) -> Any:
        v, basis = carry
        basis = jax.tree.map(lambda b, x: b.at[i].set(x), basis, v)
        w = hessian_vector_product(loss, params, v)
        along, size = coefficients(basis, w)[i], optax.tree.norm(w)
        # Twice, because rounding leaves a part of the basis the first time.
        w = without(basis, without(basis, w))
        rest = optax.tree.norm(w)
        # A space that is exhausted has only rounding left.
        rest = jnp.where(rest > 1e-5 * size, rest, 0.0)
        scale = jnp.where(rest > 0, 1 / jnp.where(rest > 0, rest, 1.0), 0.0)
        return (optax.tree.scale(scale, w), basis), (along, rest)

    _, (diagonal, beside) = jax.lax.scan(iterate, (vector, basis), jnp.arange(steps))
    # Behind the end of an exhausted space, a value that is no extreme.
    alive = jnp.cumprod(jnp.concatenate([jnp.ones(1), beside[:-1] > 0])) > 0
    diagonal = jnp.where(alive, diagonal, diagonal[0])
    beside = jnp.where(alive, beside, 0.0)
    matrix = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return Curvature(values[-1], values[0], jnp.abs(beside[-1] * vectors[-1, -1]))
