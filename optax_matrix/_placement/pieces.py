"""Applies work to what each device holds of a matrix, without an exchange."""

import math
from collections.abc import Sequence
from functools import partial

import jax
from jax import Array

from optax_matrix._layout import MatrixView
from optax_matrix._placement.execute import Work, map_matrices, on_one_device
from optax_matrix._placement.groups import Plan, make_plans
from optax_matrix._placement.placement import Leaf


def map_pieces(
    work: Work, leaves: Sequence[Leaf], *, transposable: bool
) -> tuple[list[Array], list[float]]:
    """Applies `work` to every piece as if it were a matrix.

    Args:
      work: What to do; it has no state.
      leaves: The leaves.
      transposable: Whether `work` may be given pieces transposed.

    Returns:
      Arrays like the leaves, with their shardings, and for each leaf the RMS of polar
      factors of its matrices over that of its pieces.
    """
    results, ratios = [leaf.value for leaf in leaves], [1.0] * len(leaves)
    for where, plan in make_plans(leaves, transposable, None):
        some = [leaves[i] for i in where]
        if plan is None:
            done, _ = map_matrices(work, some, transposable=transposable)
        else:
            done = _on_mesh(plan, work, transposable, [leaf.value for leaf in some])
            for i, view in zip(where, plan.views, strict=True):
                ratios[i] = _polar_rms(leaves[i].view) / _polar_rms(view)
        for i, x in zip(where, done, strict=True):
            results[i] = x
    return results, ratios


@partial(jax.jit, static_argnums=(0, 1, 2))
def _on_mesh(
    plan: Plan, work: Work, transposable: bool, arrays: Sequence[Array]
) -> tuple[Array, ...]:
    def on_device(*pieces: Array) -> tuple[Array, ...]:
        return on_one_device(work, plan.views, transposable, pieces, None, None)[0]

    return jax.shard_map(
        on_device,
        mesh=plan.mesh,
        in_specs=plan.specs,
        out_specs=plan.specs,
        check_vma=False,  # As for whole matrices, it says nothing here.
    )(*arrays)


def _polar_rms(view: MatrixView) -> float:
    square = sum(count * min(m, n) for count, m, n in view.matrices)
    return math.sqrt(square / math.prod(view.shape))
