"""Gradients and results over many steps, shared by the tests of preconditioners.

A history is a tree of NumPy arrays of shape (steps, ...).
"""

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 30
# Twice the smaller side exceeds the larger one, so both statistics have full rank after
# two gradients. From then on every basis is unique up to signs.
SHAPES = {"square": (6, 6), "tall": (8, 5), "wide": (5, 8), "stack": (2, 4, 4)}


def gradients(shapes, steps=STEPS):
    """Returns standard normal gradients in float64, in a tree like that of `shapes`."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: rng.standard_normal((steps, *shape)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def of(tx, grads, dtype="float64", jit=False):
    """Returns the updates and the states of `tx` after each gradient of a history.

    Without `jit`, only the functions that the library itself compiles are compiled.
    Tests share them, even if the numerical settings of their transforms differ.
    """
    update = jax.jit(tx.update) if jit else tx.update
    state, seen = None, []
    with jax.enable_x64(dtype == "float64"):
        for i in range(len(jax.tree.leaves(grads)[0])):
            grad = jax.tree.map(lambda g, i=i: jnp.asarray(g[i], dtype), grads)
            state = tx.init(grad) if i == 0 else state
            got, state = update(grad, state)
            seen.append(jax.tree.map(np.asarray, (got, state)))
    return jax.tree.map(lambda *xs: np.stack(xs), *seen)


def matrices(history):
    """Returns the history of each matrix of a leaf."""
    if history.ndim == 3:
        return [history]
    return [history[:, i] for i in range(history.shape[1])]


def pairs(got, grads):
    """Returns (name, history, gradients) for each matrix of a tree."""
    return [
        (name, *pair)
        for name, leaf in grads.items()
        for pair in zip(matrices(got[name]), matrices(leaf), strict=True)
    ]


def blocks(shape, size):
    """Returns the slices of blocks whose sides are at most `size`, row by row."""
    rows, columns = (
        [slice(i, min(i + size, side)) for i in range(0, side, size)] for side in shape
    )
    return [(slice(None), i, j) for i in rows for j in columns]


def close(got, want, tolerance, message=""):
    """Asserts that errors are at most `tolerance` times the largest entry of `want`."""
    atol = tolerance * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=message)


def changes(history):
    """Returns whether each update changed each matrix, (updates - 1, matrices)."""
    return (np.diff(history, axis=0) != 0).any(axis=(2, 3))


def turns(changed, refresh):
    """Returns the turn of each matrix, as the references count it.

    Args:
      changed: Whether each update refreshed each matrix, of shape (updates, matrices).
        It starts after the update that refreshes all of them for the first time.
      refresh: The number of updates in a round.

    Raises:
      AssertionError: Unless each matrix was refreshed once per round, at the same place
        in every round.
    """
    rounds = len(changed) // refresh
    assert rounds >= 2
    whole = changed[: rounds * refresh].reshape(rounds, refresh, -1)
    np.testing.assert_array_equal(whole.sum(axis=1), 1)
    np.testing.assert_array_equal(whole, np.stack([whole[0]] * rounds))
    return (np.argmax(whole[0], axis=0) + 1) % refresh


def symmetric(packed):
    """Whole symmetric matrices (..., m, m) from those that a state has packed.

    Entry by entry: with h = ⌈m/2⌉, (i, j) of the lower triangle is in column j, below
    what the other half puts there, if j < h, and else at the transposed place of the
    second half.
    """
    packed = np.asarray(packed)
    rows, h = packed.shape[-2:]
    m = 2 * h - (rows != 2 * h + 1)
    even = 1 - m % 2
    whole = np.zeros((*packed.shape[:-2], m, m), packed.dtype)
    for i in range(m):
        for j in range(i + 1):
            place = (i + even, j) if j < h else (j - h, i - h + 1 - even)
            whole[..., i, j] = whole[..., j, i] = packed[..., *place]
    return whole
