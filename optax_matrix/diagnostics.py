"""What to log of a training run: spectra, step sizes, orthogonality, signal to noise.

The functions take trees of matrix leaves (updates, parameters, gradients) and return
trees with one number a matrix: an array of shape (matrices,) for each leaf, in the
order of its batch axes. All run inside jit. Those marked *cheap* take a pass or two
over the leaf, or one product on its small side, and can run at every step; the others
need all singular values.

Leaves are read through ``layout`` as everywhere: None takes the last two axes as
(inputs, outputs).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_matrix import _layout, _mesh, _paths
from optax_matrix._transforms import Health, _numerics

__all__ = [
    "check_refreshes",
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
    """Singular values of each matrix, in falling order.

    Args:
      tree: Matrix leaves.
      layout: Which axes are the matrix.

    Returns:
      The tree with an array (matrices, min(in, out)) for each leaf; where a leaf is
      split into blocks of several shapes, shorter rows are filled up with zeros.
    """

    def values(x: jax.Array) -> jax.Array:
        return jnp.linalg.svd(x, compute_uv=False)

    return _per_matrix(values, layout, tree)


def spectral_entropy(tree: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Entropy of the squared singular values: how evenly a matrix spends its energy.

    .. math::
      H = -\sum_i p_i \log p_i, \qquad p_i = \sigma_i^2 / \textstyle\sum_j \sigma_j^2.

    From 0 (rank one) to log of the smaller side (orthogonal). Its fall during training
    while the norm is kept is the "spectral squeeze".

    Args:
      tree: Matrix leaves.
      layout: Which axes are the matrix.

    Returns:
      The tree with one number a matrix; 0 for a zero matrix.
    """

    def entropy(x: jax.Array) -> jax.Array:
        energy = jnp.square(jnp.linalg.svd(_unit(x), compute_uv=False))
        p = _numerics.divide_or_zero(energy, energy.sum(-1, keepdims=True))
        return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axis=-1)

    return _per_matrix(entropy, layout, tree)


def participation_ratio(tree: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Effective number of singular directions. *Cheap*: one Gram matrix.

    .. math:: (\sum_i \sigma_i^2)^2 / \sum_i \sigma_i^4 = \|X\|_F^4 / \|X X^\top\|_F^2.

    From 1 (rank one) to the smaller side (orthogonal).

    Args:
      tree: Matrix leaves.
      layout: Which axes are the matrix.

    Returns:
      The tree with one number a matrix; 0 for a zero matrix.
    """

    def ratio(x: jax.Array) -> jax.Array:
        gram = _gram(_unit(x))
        trace = jnp.trace(gram, axis1=-2, axis2=-1)
        return _numerics.divide_or_zero(
            jnp.square(trace), jnp.sum(jnp.square(gram), axis=(-2, -1))
        )

    return _per_matrix(ratio, layout, tree)


def stable_rank(tree: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Stable rank, :math:`\|X\|_F^2 / \sigma_1^2`.

    Args:
      tree: Matrix leaves.
      layout: Which axes are the matrix.

    Returns:
      The tree with one number a matrix, at least 1; 0 for a zero matrix.
    """

    def rank(x: jax.Array) -> jax.Array:
        energy = jnp.square(jnp.linalg.svd(_unit(x), compute_uv=False))
        return _numerics.divide_or_zero(energy.sum(-1), energy[..., 0])

    return _per_matrix(rank, layout, tree)


def orthogonality_error(tree: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Distance from semi-orthogonal, :math:`\|O O^\top - I\|_F`. *Cheap*.

    The Gram matrix is taken on the smaller side. Singular values spread by
    :math:`\delta` about one give about :math:`2 \delta \sqrt{p}` for a smaller side
    :math:`p`.

    Args:
      tree: Matrix leaves, such as updates before the scale of the shape and the
        learning rate.
      layout: Which axes are the matrix.

    Returns:
      The tree with one number a matrix.
    """

    def error(x: jax.Array) -> jax.Array:
        gram = _gram(x)
        return jnp.linalg.norm(
            gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)[None], axis=(-2, -1)
        )

    return _per_matrix(error, layout, tree)


def root_mean_square(tree: Any, *, layout: _layout.Layout = None) -> Any:
    """Root mean square entry of each matrix. *Cheap*.

    Of updates before the learning rate AdamW has about 0.2, see `match_rms`.

    Args:
      tree: Matrix leaves.
      layout: Which axes are the matrix.

    Returns:
      The tree with one number a matrix.
    """

    def rms(x: jax.Array) -> jax.Array:
        return _norm(x) / jnp.sqrt(jnp.asarray(x.shape[-2] * x.shape[-1], x.dtype))

    return _per_matrix(rms, layout, tree)


def update_to_weight(
    updates: Any, params: Any, *, layout: _layout.Layout = None
) -> Any:
    r"""Relative length of a step, :math:`\|\Delta W\|_F / \|W\|_F`. *Cheap*.

    Args:
      updates: Matrix leaves: the steps, learning rate included.
      params: The parameters they are added to.
      layout: Which axes are the matrix.

    Returns:
      The tree with one number a matrix; infinite where a zero matrix takes a step.
    """

    def ratio(u: jax.Array, p: jax.Array) -> jax.Array:
        return _norm(u) / _norm(p)

    return _per_matrix(ratio, layout, updates, params)


def rotation_angle(before: Any, after: Any, *, layout: _layout.Layout = None) -> Any:
    r"""Angle in radians by which each matrix, taken as a vector, has turned. *Cheap*.

    .. math::
      \angle(A, B) = 2 \operatorname{atan2}(\|a - b\|, \|a + b\|),
      \quad a = A / \|A\|_F, \; b = B / \|B\|_F,

    which is right for small angles too, where the arc cosine of the product is not.

    Args:
      before: Matrix leaves, such as parameters before a step.
      after: The same after it.
      layout: Which axes are the matrix.

    Returns:
      The tree with one number a matrix, from 0 to pi.
    """

    def angle(a: jax.Array, b: jax.Array) -> jax.Array:
        a = _numerics.divide_or_zero(a, _norm(a, keepdims=True))
        b = _numerics.divide_or_zero(b, _norm(b, keepdims=True))
        return 2 * jnp.arctan2(_norm(a - b), _norm(a + b))

    return _per_matrix(angle, layout, before, after)


def signal_to_noise(first: Any, second: Any, *, eps: ArrayLike = 1e-30) -> Any:
    r"""Signal-to-noise ratio of each parameter, :math:`|\hat m| / \sqrt{\hat v}`.

    *Cheap*. 1 for a constant gradient, about :math:`\sqrt{(1-\beta_1)/(1+\beta_1)}` for
    pure noise.

    Args:
      first: Bias-corrected first moments, leaves of any shape.
      second: Bias-corrected second moments.
      eps: Added to the second moment, so that a gradient that was always 0 gives 0.

    Returns:
      The tree with the leaves' own shapes, in float32 or wider.
    """

    def ratio(m: jax.Array, v: jax.Array) -> jax.Array:
        m, v = _numerics.wide(m), _numerics.wide(v)
        return jnp.abs(m) * jax.lax.rsqrt(v + _numerics.as_scalar(eps, v))

    return jax.tree.map(ratio, first, second)


def refreshes(state: Any) -> dict[str, Health]:
    """How the refreshes of roots and bases went, in any state that has some. *Cheap.*

    Args:
      state: The state of an optimizer with `shampoo_precondition`, `soap_precondition`
        or a KL rule in it.

    Returns:
      By the place in the state, as in ``matrices/384x1536/left``, an array of each kind
      with one number a matrix of that shape, or for each of its parts where several
      devices share it: ``failures``, how many refreshes in a row failed by now, and
      ``stuck``, whether that ever were ``max_failures``. Empty if there is no
      preconditioner.
    """

    def is_health(node: Any) -> bool:
        return isinstance(node, Health)

    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_health)
    found = [(path, node) for path, node in nodes if is_health(node)]
    return {_paths.path_name(path[:-1]): node for path, node in found}


def check_refreshes(state: Any) -> dict[str, Health]:
    """Raises if a preconditioner has stopped working; outside of `jax.jit`.

    Args:
      state: As of `refreshes`.

    Returns:
      What `refreshes` does.

    Raises:
      RuntimeError: If any matrix is ``stuck``, with its place in the state.
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


def _per_matrix(
    fn: Callable[..., jax.Array], layout: _layout.Layout, *trees: Any
) -> Any:
    """Maps `fn`, from stacks (count, m, n) to (count, ...), over the leaves."""

    def on_leaf(view: _layout.MatrixView, *leaves: jax.Array) -> jax.Array:
        stacks = [
            view.to_stacks(_mesh.gathered(_numerics.wide(leaf))) for leaf in leaves
        ]
        return _join([fn(*stack) for stack in zip(*stacks, strict=True)])

    return _layout.tree_map(on_leaf, layout, *trees)


def _join(parts: list[jax.Array]) -> jax.Array:
    if parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        parts = [jnp.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts]
    return jnp.concatenate(parts)


def _unit(x: jax.Array) -> jax.Array:
    """`x` over its largest entry: squares then neither underflow nor overflow."""
    return _numerics.divide_or_zero(x, jnp.max(jnp.abs(x), (-2, -1), keepdims=True))


def _gram(x: jax.Array) -> jax.Array:
    """The product of `x` with itself on its smaller side."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    return jnp.matmul(x, x.mT, precision="highest")


def _norm(x: jax.Array, keepdims: bool = False) -> jax.Array:
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    unit = jnp.linalg.norm(_numerics.divide_or_zero(x, largest), axis=(-2, -1))
    norm = unit[..., None, None] * largest
    return norm if keepdims else jnp.squeeze(norm, (-2, -1))
