"""The parameters to evaluate a model with, if an optimizer keeps others to train."""

from typing import Any

import jax
import optax

from optax_matrix import _paths

_WHOLE = "`ema_lookahead` and `tail_average` must wrap a whole optimizer."


def _is_wrapper(node: Any) -> bool:
    return hasattr(node, "evaluation_params")


def evaluation_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """Returns the parameters to evaluate a model with, and to save for inference.

    `ema_lookahead` and `tail_average` train other parameters than those to evaluate. To
    resume a run, save the trained ones and the state. For the state of an optimizer
    without a wrapper the result is ``params``.

    Args:
      state: The state of the whole optimizer after an update, with the types that it
        has (Orbax restores them with a target). Inside `jax.vmap` it is that of one
        member.
      params: The parameters after the same update.

    Returns:
      Parameters with the types of ``params``.

    Raises:
      ValueError: If several parts of the optimizer are wrapped, or a part that does not
        train all parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_matrix as om
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> tx = om.tail_average(om.muon(0.02), start=100)
      >>> weights = evaluation_params(tx.init(params), params)
    """
    nodes = jax.tree.leaves(_paths.unboxed(state), is_leaf=_is_wrapper)
    wrappers = [
        # It may be in the memory of the host, see `offload_state`.
        jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), node)
        for node in nodes
        if _is_wrapper(node)
    ]
    if not wrappers:
        return params
    if len(wrappers) > 1:
        raise ValueError(
            f"{_WHOLE} The state has {len(wrappers)} of them side by side."
        )
    shown = wrappers[0].evaluation_params(_paths.unboxed(params))
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(shown))


def check_whole(params: optax.Params, own: Any) -> None:
    """Raises unless a wrapper's own tree has the structure of the parameters."""
    found, wanted = jax.tree.structure(own), jax.tree.structure(params)
    if found != wanted:
        raise ValueError(f"{_WHOLE} The state has {found}, and `params` {wanted}.")
