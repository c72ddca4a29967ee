"""Muon's update of a product of two factors, such as LoRA's."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _linalg, _mesh, _paths, _placement
from optax_matrix._transforms import _numerics
from optax_matrix._transforms.orthogonalize import orthogonalize

# Takes the path of a leaf, and returns which product it is a factor of, and of which
# side: (..., inputs, rank) or (..., rank, outputs).
FactorOf = Callable[[str], tuple[str, Literal["inputs", "outputs"]]]


class _Pair(NamedTuple):
    """The positions of two factors among the leaves."""

    inputs: int
    outputs: int


def orthogonalize_factors(
    factors: FactorOf | None = None,
    method: str | _linalg.PolarMethod = "newton_schulz",
    *,
    damping: ArrayLike = 1e-2,
    placement: _placement.Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates of two factors so that their product takes a step of Muon.

    For a weight :math:`W = A B` of inputs × rank and rank × outputs, updates
    :math:`U_A, U_B`, :math:`R_A = (A^\top A)^{-1/2}` and
    :math:`R_B = (B B^\top)^{-1/2}`,

    .. math::
      U_A \leftarrow \tfrac12 \operatorname{polar}(U_A R_B) R_B, \qquad
      U_B \leftarrow \tfrac12 R_A \operatorname{polar}(R_A U_B).

    To first order :math:`W` changes by :math:`U_A B + A U_B`, the sum of two matrices
    whose singular values are 1/2, or less where ``damping`` acts, so its spectral norm
    is at most 1, whatever the sizes of the factors. Put it after a momentum of both
    factors and before the learning rate, which is then that of Muon with
    ``shape_scale=None``::

        optax.chain(
            om.ema_momentum(0.95), om.orthogonalize_factors(),
            optax.add_decayed_weights(weight_decay / 2),
            optax.scale_by_learning_rate(0.02),
        )

    where half of the weight decay for each factor decays :math:`W` by all of it.

    Args:
      factors: Takes the path of a leaf, as in ``blocks/0/attn/q/lora_a``, and returns
        the name of its product and ``"inputs"`` for :math:`A` or ``"outputs"`` for
        :math:`B`. None: the names of Flax, ``lora_a`` and ``lora_b``.
      method: See `orthogonalize`.
      damping: What is added to the eigenvalues of :math:`A^\top A` and
        :math:`B B^\top`, relative to the largest; not negative. Where gradients have a
        lower rank than the factors, as in LoRA with few tokens, updates are rounding
        errors that are divided by its root, so that runs diverge if it is tiny.
      placement: See `orthogonalize`, for the factors on a mesh with auto axes.

    Returns:
      A transformation without state that needs ``params``, for trees whose leaves are
      all factors: give others to another optimizer by `optax.partition`. Leading axes
      are stacks of products. Updates keep their shape and dtype. If a factor is zero,
      as LoRA's second one is at first, the update of the other one is zero, like its
      gradient.

    Raises:
      TypeError: At construction, for arguments of another type; at ``init``, for leaves
        that are not real floating, with their paths.
      ValueError: At construction, as `orthogonalize`; at ``init``, for a leaf that is
        not a factor, a factor without the other one, or two that do not fit, with
        their paths; in ``update`` without ``params``.

    Precision:
      Roots of float32 factors are those of matrices of rank × rank, by
      eigendecomposition.

    References:
      Cesista et al., 2026, LoRA-Muon, `arXiv:2606.12921
      <https://arxiv.org/abs/2606.12921>`_. Differs: the paper decays the weight by
      :math:`\sqrt{1 - \lambda\eta}` per factor and divides the updates by it, which
      is the same to first order. ``damping`` is ours.
    """
    if factors is not None and not _paths.is_function(factors):
        raise TypeError(f"`factors` must be a function of a path, got {factors!r}.")
    of_path = _flax_factor if factors is None else factors
    _check.number("damping", damping, 0.0)
    _placement.as_placement(placement)  # Refuses a period.
    polar = orthogonalize(_linalg.as_method(method), placement=placement)

    def init(params: optax.Params) -> optax.EmptyState:
        _layout.check_all_floating(params)
        _pairs(params, of_path)
        polar.init(params)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check.params_given(params, "orthogonalize_factors")
        given, structure = jax.tree.flatten(updates)
        weights = _paths.at_leaves(updates, params)
        roots: dict[int, tuple[bool, jax.Array]] = {}
        for pair in _pairs(updates, of_path):
            a, b = weights[pair.inputs], weights[pair.outputs]
            roots[pair.inputs] = True, _inverse_root(b.mT, damping)
            roots[pair.outputs] = False, _inverse_root(a, damping)
        wide = [_times(_numerics.wide(u), *roots[i]) for i, u in enumerate(given)]
        done, _ = polar.update(structure.unflatten(wide), optax.EmptyState())
        halves = [
            (_times(x, *roots[i]) / 2).astype(u.dtype)
            for i, (x, u) in enumerate(zip(jax.tree.leaves(done), given, strict=True))
        ]
        return structure.unflatten(halves), state

    return optax.GradientTransformationExtraArgs(init, update)


def _flax_factor(path: str) -> tuple[str, Literal["inputs", "outputs"]]:
    product, _, name = path.rpartition("/")
    if name not in ("lora_a", "lora_b"):
        raise ValueError(
            f"'{path}' is not a factor of Flax's LoRA, `lora_a` or `lora_b`. Pass "
            "`factors`, or give it to another optimizer with `optax.partition`."
        )
    return product, "inputs" if name == "lora_a" else "outputs"


def _pairs(tree: Any, of_path: FactorOf) -> list[_Pair]:
    """Returns the factors of every product."""
    places = [place for place in _paths.places(tree) if not place.empty]
    found: dict[str, dict[str, int]] = {}
    for i, place in enumerate(places):
        factor = of_path(place.name)
        if (
            not isinstance(factor, tuple)
            or len(factor) != 2
            or factor[1] not in ("inputs", "outputs")
        ):
            raise ValueError(
                "`factors` must return the name of a product and 'inputs' or "
                f"'outputs', got {factor!r} at '{place.name}'."
            )
        product, side = factor
        other = found.setdefault(product, {}).setdefault(side, i)
        if other != i:
            raise ValueError(
                f"'{places[other].name}' and '{place.name}' are both the {side} of "
                f"the product {product!r}."
            )
    pairs = []
    for product, sides in found.items():
        if len(sides) < 2:
            ((side, i),) = sides.items()
            raise ValueError(
                f"'{places[i].name}' is the only factor of the product {product!r}, "
                f"its {side}: both factors must be trained together."
            )
        pair = _Pair(**sides)
        a, b = (places[i] for i in pair)
        if (
            len(a.leaf.shape) < 2
            or a.leaf.shape[:-2] != b.leaf.shape[:-2]
            or (a.leaf.shape[-1] != b.leaf.shape[-2])
        ):
            raise ValueError(
                f"'{a.name}' {a.leaf.shape} and '{b.name}' {b.leaf.shape} are not "
                "(..., inputs, rank) and (..., rank, outputs)."
            )
        pairs.append(pair)
    return pairs


def _inverse_root(tall: jax.Array, damping: ArrayLike) -> jax.Array:
    """Returns (AᵀA)^{-1/2}, damped."""
    tall = _mesh.gathered(_numerics.wide(tall))
    gram = jnp.matmul(tall.mT, tall, precision="highest")
    return _linalg.power_by_eigh(gram, -0.5, damping).value


def _times(x: jax.Array, right: bool, root: jax.Array) -> jax.Array:
    """Returns x times the root, from the right or from the left."""
    whole = _mesh.gathered(x, x.ndim - (1 if right else 2))
    pair = (whole, root) if right else (root, whole)
    return _mesh.like(jnp.matmul(*pair, precision="highest"), x)
