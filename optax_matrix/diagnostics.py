"""Diagnostics to log during training: spectra, step sizes, orthogonality, and noise.

Most functions take trees of matrix leaves (updates, parameters or gradients) and return
trees with one number per matrix: an array of shape (matrices,) for each leaf, in the
order of its batch axes. These functions work inside `jax.jit`. Functions marked *cheap*
make one or two passes over the leaf, or compute one product on its smaller side, and
can run at every step. The others compute all singular values.
`coordinate_check` compares models of several widths, and `check_clipping` looks for a
clip in the wrong place of a chain.

The argument ``layout`` has the same meaning as in the transforms. None: the last two
axes of each leaf are (inputs, outputs).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_matrix import _check, _curvature, _layout, _mesh, _paths
from optax_matrix._clipping import check_clipping
from optax_matrix._coordinates import CoordinateCheck, coordinate_check
from optax_matrix._curvature import Curvature
from optax_matrix._transforms import Health, _numerics

__all__ = [
    "CoordinateCheck",
    "check_clipping",
    "check_refreshes",
    "coordinate_check",
    "largest_curvature",
    "orthogonality_error",
    "participation_ratio",
    "refreshes",
    "root_mean_square",
    "rotation_angle",
    "signal_to_noise",
    "singular_values",
    "spectral_entropy",
    "stable_rank",
    "update_to_weight",
]


def singular_values(tree: Any, *, layout: _layout.Layout = None) -> Any:
    """Returns the singular values of each matrix, in descending order.

    Args:
      tree: Matrix leaves.
      layout: The axes that form the matrix, see `MatrixLayout`.

    Returns:
      A tree with an array of shape (matrices, min(inputs, outputs)) for each leaf. If a
      leaf is split into blocks of different shapes, shorter rows are padded with zeros.
    """

    def values(x: jax.Array) -> jax.Array:
        return jnp.linalg.svd(x, compute_uv=False)

    return _per_matrix(values, layout, tree)


def spectral_entropy(tree: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Returns the entropy of the normalized squared singular values of each matrix.

    .. math::
      H = -\sum_i p_i \log p_i, \qquad p_i = \sigma_i^2 / \textstyle\sum_j \sigma_j^2.

    It ranges from 0 (rank one) to the logarithm of the smaller side (orthogonal). If it
    falls during training while the norm stays the same, a few singular directions
    dominate increasingly (the "spectral squeeze").

    Args:
      tree: Matrix leaves.
      layout: The axes that form the matrix, see `MatrixLayout`.

    Returns:
      A tree with one number per matrix; 0 for a zero matrix.
    """

    def entropy(x: jax.Array) -> jax.Array:
        energy = jnp.square(jnp.linalg.svd(_unit(x), compute_uv=False))
        p = _numerics.divide_or_zero(energy, energy.sum(-1, keepdims=True))
        return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axis=-1)

    return _per_matrix(entropy, layout, tree)


def participation_ratio(tree: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Returns the effective number of singular directions. *Cheap*: one Gram matrix.

    .. math:: (\sum_i \sigma_i^2)^2 / \sum_i \sigma_i^4 = \|X\|_F^4 / \|X X^\top\|_F^2.

    It ranges from 1 (rank one) to the smaller side (orthogonal).

    Args:
      tree: Matrix leaves.
      layout: The axes that form the matrix, see `MatrixLayout`.

    Returns:
      A tree with one number per matrix; 0 for a zero matrix.
    """

    def ratio(x: jax.Array) -> jax.Array:
        gram = _gram(_unit(x))
        trace = jnp.trace(gram, axis1=-2, axis2=-1)
        return _numerics.divide_or_zero(
            jnp.square(trace), jnp.sum(jnp.square(gram), axis=(-2, -1))
        )

    return _per_matrix(ratio, layout, tree)


def stable_rank(tree: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Returns the stable rank of each matrix, :math:`\|X\|_F^2 / \sigma_1^2`.

    Args:
      tree: Matrix leaves.
      layout: The axes that form the matrix, see `MatrixLayout`.

    Returns:
      A tree with one number per matrix, at least 1; 0 for a zero matrix.
    """

    def rank(x: jax.Array) -> jax.Array:
        energy = jnp.square(jnp.linalg.svd(_unit(x), compute_uv=False))
        return _numerics.divide_or_zero(energy.sum(-1), energy[..., 0])

    return _per_matrix(rank, layout, tree)


def orthogonality_error(tree: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Returns the distance from semi-orthogonal, :math:`\|O O^\top - I\|_F`. *Cheap*.

    The Gram matrix is computed on the smaller side, whose length is :math:`p`. If the
    singular values deviate from 1 by :math:`\delta`, the distance is about
    :math:`2 \delta \sqrt{p}`.

    Args:
      tree: Matrix leaves, such as updates before they are scaled by their shape and by
        the learning rate.
      layout: The axes that form the matrix, see `MatrixLayout`.

    Returns:
      A tree with one number per matrix.
    """

    def error(x: jax.Array) -> jax.Array:
        gram = _gram(x)
        return jnp.linalg.norm(
            gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)[None], axis=(-2, -1)
        )

    return _per_matrix(error, layout, tree)


def root_mean_square(tree: Any, *, layout: _layout.Layout = None) -> Any:
    """Returns the root mean square of the entries of each matrix. *Cheap*.

    The updates of AdamW, before the learning rate, have about 0.2; see `match_rms`.

    Args:
      tree: Matrix leaves.
      layout: The axes that form the matrix, see `MatrixLayout`.

    Returns:
      A tree with one number per matrix.
    """

    def rms(x: jax.Array) -> jax.Array:
        return _norm(x) / jnp.sqrt(jnp.asarray(x.shape[-2] * x.shape[-1], x.dtype))

    return _per_matrix(rms, layout, tree)


def update_to_weight(
    updates: Any, params: Any, *, layout: _layout.Layout = None
) -> Any:
    r"""Returns the relative step length :math:`\|\Delta W\|_F / \|W\|_F`. *Cheap*.

    Args:
      updates: Matrix leaves: the steps, including the learning rate.
      params: The parameters that the steps are added to.
      layout: The axes that form the matrix, see `MatrixLayout`.

    Returns:
      A tree with one number per matrix. A step from a zero matrix gives infinity.
    """

    def ratio(u: jax.Array, p: jax.Array) -> jax.Array:
        return _norm(u) / _norm(p)

    _check_trees(updates=updates, params=params)
    return _per_matrix(ratio, layout, updates, params)


def rotation_angle(before: Any, after: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Returns the angle in radians between two states of each matrix. *Cheap*.

    Each matrix is treated as a vector of its entries.

    .. math::
      \angle(A, B) = 2 \operatorname{atan2}(\|a - b\|, \|a + b\|),
      \quad a = A / \|A\|_F, \; b = B / \|B\|_F,

    This formula is accurate for small angles too, unlike the arc cosine of the inner
    product.

    Args:
      before: Matrix leaves, such as the parameters before a step.
      after: The same leaves after the step.
      layout: The axes that form the matrix, see `MatrixLayout`.

    Returns:
      A tree with one number per matrix, from 0 to pi.
    """

    def angle(a: jax.Array, b: jax.Array) -> jax.Array:
        a = _numerics.divide_or_zero(a, _norm(a, keepdims=True))
        b = _numerics.divide_or_zero(b, _norm(b, keepdims=True))
        return 2 * jnp.arctan2(_norm(a - b), _norm(a + b))

    _check_trees(before=before, after=after)
    return _per_matrix(angle, layout, before, after)


def signal_to_noise(first: Any, second: Any, *, eps: ArrayLike = 1e-30) -> Any:
    r"""Returns the signal-to-noise ratio :math:`|\hat m| / \sqrt{\hat v}`. *Cheap*.

    The ratio of an entry is 1 if its gradient is constant, and about
    :math:`\sqrt{(1-\beta_1)/(1+\beta_1)}` if its gradient is pure noise.

    Args:
      first: The bias-corrected first moments, with leaves of any shape.
      second: The bias-corrected second moments.
      eps: Added to the second moments, so that an entry whose gradient was always 0 has
        the ratio 0.

    Returns:
      A tree with one number per entry of each leaf, in float32 or wider.
    """

    def ratio(m: jax.Array, v: jax.Array) -> jax.Array:
        m, v = _numerics.wide(m), _numerics.wide(v)
        return jnp.abs(m) * jax.lax.rsqrt(v + _numerics.as_scalar(eps, v))

    _check.number("eps", eps, 0.0)
    _check_trees(first=first, second=second)
    return jax.tree.map(ratio, first, second)


def largest_curvature(
    loss: Callable[..., jax.Array], params: Any, *, key: jax.Array, steps: int = 20
) -> Curvature:
    """Estimates the largest and the smallest eigenvalue of a loss's Hessian.

    Lanczos iterations from a random vector, with full reorthogonalization. Gradient
    descent on a quadratic diverges at learning rates above 2 over the largest one.

    Args:
      loss: A function of the parameters that returns a number.
      params: The parameters, a tree of real floating arrays.
      key: For the random vector.
      steps: The number of iterations, at least 1. Each takes a Hessian-vector product,
        about two gradients, and keeps a copy of the parameters.

    Returns:
      The estimates, and how far the largest one is at most from an eigenvalue. The
      largest is never above the true one but for rounding, and the smallest never
      below it. Exact if ``steps`` is at least the number of distinct eigenvalues.

    Raises:
      TypeError: If ``loss`` is not a function, ``key`` not one key, ``steps`` not an
        int, or a leaf not real floating.
      ValueError: If ``steps`` is below 1.

    References:
      Lanczos, 1950; Golub and Van Loan, Matrix Computations, chapter 10.
    """
    return _curvature.extreme_curvature(loss, params, key, steps)


def refreshes(state: Any) -> dict[str, Health]:
    """Returns whether the refreshes of preconditioners succeed. *Cheap*.

    Args:
      state: The state of any optimizer. Only states of `whiten_momentum` and of the
        transforms called ``..._precondition`` have roots or bases to refresh.

    Returns:
      A dict from the path of each stack of roots or bases in the state, such as
      ``matrices/384x1536/state/left``, to a named tuple of two arrays, each with one
      number per row of the stack: ``failures`` is the current number of consecutive
      failed refreshes, and ``stuck`` is whether it has ever reached ``max_failures``.
      The dict is empty if the state has no preconditioner.
    """

    def is_health(node: Any) -> bool:
        return isinstance(node, Health)

    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_health)
    found = [(path, node) for path, node in nodes if is_health(node)]
    return {_paths.path_name(path[:-1]): node for path, node in found}


def check_refreshes(state: Any) -> dict[str, Health]:
    """Raises if a preconditioner has stopped working. Call it outside of `jax.jit`.

    Args:
      state: The state of any optimizer, as in `refreshes`.

    Returns:
      The result of `refreshes`.

    Raises:
      RuntimeError: If any matrix is ``stuck``. The message contains its path in the
        state and its row of the stack.
    """
    found, stuck = refreshes(state), {}
    for name, health in found.items():
        where = [int(i) for i in jnp.flatnonzero(jnp.ravel(health.stuck))]
        if where:
            stuck[name] = where
    if stuck:
        raise RuntimeError(
            "Roots or bases could not be refreshed `max_failures` times in a row; the "
            f"last good ones are in use. Stacks and their entries: {stuck}. Look "
            "for non-finite or vanishing gradients, or raise `damping`."
        )
    return found


def _check_trees(**trees: Any) -> None:
    """Raises unless trees have the structure of the first, and floating leaves."""
    (name, first), *_ = trees.items()
    wanted = jax.tree.structure(_paths.unboxed(first))
    for other, tree in trees.items():
        try:
            _layout.check_all_floating(tree)
        except TypeError as error:
            raise TypeError(f"`{other}`: {error}") from None
        found = jax.tree.structure(_paths.unboxed(tree))
        if found != wanted:
            raise ValueError(
                f"`{other}` must have the structure of `{name}`, {wanted}, got {found}."
            )


def _per_matrix(
    fn: Callable[..., jax.Array], layout: _layout.Layout, *trees: Any
) -> Any:
    """Applies `fn` to the matrices of each leaf.

    It takes stacks of shape (count, m, n) and returns an array of shape (count, ...).
    """

    def on_leaf(view: _layout.MatrixView, *leaves: jax.Array) -> jax.Array:
        stacks = [
            view.to_stacks(_mesh.gathered(_numerics.wide(leaf))) for leaf in leaves
        ]
        return _join([fn(*stack) for stack in zip(*stacks, strict=True)])

    return _layout.tree_map(on_leaf, layout, *trees)


def _join(parts: list[jax.Array]) -> jax.Array:
    """Concatenates the results for the blocks of a leaf, padding rows with zeros."""
    if parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        parts = [jnp.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts]
    return jnp.concatenate(parts)


def _unit(x: jax.Array) -> jax.Array:
    """Divides each matrix by its largest entry, so that no square overflows."""
    return _numerics.divide_or_zero(x, jnp.max(jnp.abs(x), (-2, -1), keepdims=True))


def _gram(x: jax.Array) -> jax.Array:
    """Returns the Gram matrix of `x` on its smaller side."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    return jnp.matmul(x, x.mT, precision="highest")


def _norm(x: jax.Array, keepdims: bool = False) -> jax.Array:
    """Returns the Frobenius norm of each matrix, without overflow or underflow."""
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    unit = jnp.linalg.norm(_numerics.divide_or_zero(x, largest), axis=(-2, -1))
    norm = unit[..., None, None] * largest
    return norm if keepdims else jnp.squeeze(norm, (-2, -1))
