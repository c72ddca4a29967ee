"""What the tests of the preconditioners share: gradients, and all that becomes of them.

A history is a tree of NumPy arrays (steps, ...).
"""

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 30
# Twice the smaller side is above the larger one: the second gradient fills both
# statistics, and from then on every basis is unique but for signs.
SHAPES = {"square": (6, 6), "tall": (8, 5), "wide": (5, 8), "stack": (2, 4, 4)}


def gradients(shapes, steps=STEPS):
    """Standard normal ones in float64: a tree, or a leaf if `shapes` is one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: rng.standard_normal((steps, *shape)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def of(tx, grads, dtype="float64", jit=False):
    """Updates and states after each gradient of a history.

    Without jit, what the library compiles by itself is shared by all transforms of the
    same program, whatever their numbers, and by all tests.
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
    """The history of each matrix of a leaf."""
    if history.ndim == 3:
        return [history]
    return [history[:, i] for i in range(history.shape[1])]


def pairs(got, grads):
    """(name, history, gradients) of each matrix of a tree."""
    return [
        (name, *pair)
        for name, leaf in grads.items()
        for pair in zip(matrices(got[name]), matrices(leaf), strict=True)
    ]


def blocks(shape, size):
    """Slices of the blocks of at most `size`, row by row."""
    rows, columns = (
        [slice(i, min(i + size, side)) for i in range(0, side, size)] for side in shape
    )
    return [(slice(None), i, j) for i in rows for j in columns]


def close(got, want, tolerance, message=""):
    """Raises unless errors are below this share of the largest entry."""
    atol = tolerance * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=message)


class Turn:
    """Stands for `refresh` in the references: at 0, and then at its turn of each round.

    They ask for `since % refresh == 0`.
    """

    def __init__(self, turn, every):
        self.turn, self.every = turn, every

    def __rmod__(self, since):
        return since and (since - self.turn) % self.every


def turns(changed, refresh):
    """In which update of a round each matrix is refreshed.

    Args:
      changed: (updates, matrices), whether it was, from an update on in which all were.
      refresh: How many updates are a round.

    Raises:
      AssertionError: Unless each was once in every round, always in the same update.
    """
    rounds = len(changed) // refresh
    assert rounds >= 2
    whole = changed[: rounds * refresh].reshape(rounds, refresh, -1)
    np.testing.assert_array_equal(whole.sum(axis=1), 1)
    np.testing.assert_array_equal(whole, np.stack([whole[0]] * rounds))
    return np.argmax(whole[0], axis=0)
