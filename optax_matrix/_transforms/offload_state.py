"""Keeps the state of an optimizer in the memory of the host."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_matrix import _check


def offload_state(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` with its state in host memory between the updates.

    An update copies the state to the device, runs ``inner``, and copies the new state
    back. The device then has room for the rest of the training step, which is when the
    most memory is needed; during the update the compiler decides how much of the state
    is there at once. The arithmetic is that of ``inner``.

    Args:
      inner: The optimizer or transformation, such as ``om.muon(0.02)``.

    Returns:
      A transformation with the state of ``inner``, all arrays of which, but for
      scalars, lie in the memory that JAX calls ``pinned_host``, with the sharding that
      they have on the devices. `describe_state` counts it separately.

    Donation:
      A jitted step that takes and returns the parameters and then the state may donate
      both. If only the state is donated, JAX (0.10) reuses its memory for updates of
      the same shape, and aborts because these are on the device.

    Raises:
      TypeError: At construction, if ``inner`` is not a transformation.

    Sharding:
      Any. Each device copies its own shards. JAX 0.8 ignores it on CPU.

    Example:
      >>> import jax.numpy as jnp, optax_matrix as om
      >>> tx = om.offload_state(om.muon(0.02))
      >>> state = tx.init({"up": {"kernel": jnp.ones((8, 8))}})
    """
    _check.transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.OptState:
        return _moved(inner.init(params), jax.memory.Space.Host)

    def update(updates, state, params=None, **extra_args):
        state = _moved(state, jax.memory.Space.Device)
        updates, state = inner.update(updates, state, params, **extra_args)
        return updates, _moved(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(state: optax.OptState, space: Any) -> optax.OptState:
    # Scalars are what schedules and branches depend on.
    return jax.tree.map(lambda x: jax.device_put(x, space) if jnp.ndim(x) else x, state)
