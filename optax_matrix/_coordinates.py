"""How much the activations of a model change in training, by width."""

import dataclasses
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from optax_matrix import _check, _paths, _table


@dataclasses.dataclass(frozen=True)
class CoordinateCheck:
    """Changes of activations; `str` formats their exponents as a table.

    Attributes:
      widths: The widths, ascending.
      changes: From the name of an activation to an array (steps, widths): the root mean
        square of its change since before the first step.
      exponents: From the name to an array (steps,): p of changes that grow as the width
        to the power of p, by least squares of logarithms; NaN if a change is 0 or not
        finite.
    """

    widths: tuple[int, ...]
    changes: dict[str, np.ndarray]
    exponents: dict[str, np.ndarray]

    def __str__(self) -> str:
        """Returns one line per activation: its changes after the last step, and p."""
        widths = [f"width {width}" for width in self.widths]
        header = ("activation", *widths, "exponent")
        rows = []
        for name, changes in self.changes.items():
            exponent = f"{self.exponents[name][-1]:+.2f}"
            rows.append((name, *(f"{x:.3g}" for x in changes[-1]), exponent))
        return _table.aligned(header, rows, [], right=set(range(1, len(header))))

    def plot(self, axes: Any) -> None:
        """Draws the changes after the last step over the width, a line per activation.

        Args:
          axes: The axes of a Matplotlib figure.
        """
        for name, changes in self.changes.items():
            label = f"{name}: {self.exponents[name][-1]:+.2f}"
            axes.loglog(self.widths, changes[-1], "o-", base=2, label=label)
        axes.set(xlabel="width", ylabel="RMS change of the activation")


def coordinate_check(
    run: Callable[[int], Sequence[Any]], widths: Sequence[int]
) -> CoordinateCheck:
    r"""Measures how much activations change in training, for models of several widths.

    In a model whose learning rates transfer over width, the change of each activation
    after a few steps, :math:`\sqrt{\operatorname{mean}((h_t - h_0)^2)}`, has the same
    size at all widths: :math:`p = 0` in width :math:`^p`. Positive exponents mean that
    wide models become unstable at this learning rate, negative ones that they learn
    less.

    Args:
      run: Trains the model of a given width and returns its activations before the
        first step and after each step, always for the same inputs: at least two trees
        of arrays, such as the outputs of layers, with the same names for all widths.
      widths: At least two widths, ascending.

    Returns:
      The changes and their exponents. Print it to get a table.

    Raises:
      TypeError: If ``run`` is not a function, or ``widths`` not a sequence of ints.
      ValueError: If there are fewer than two widths, they do not ascend, or the
        activations have different names or shapes after two steps, or different names
        or numbers of steps for two widths.

    References:
      Yang et al., 2022, `arXiv:2203.03466 <https://arxiv.org/abs/2203.03466>`_,
      appendix D.1.
    """
    _check.function("run", run, "the width")
    if not isinstance(widths, Sequence):
        raise TypeError(f"`widths` must be a sequence of ints, got {widths!r}.")
    widths = tuple(widths)
    for width in widths:
        _check.static_int("widths", width, 1)
    if len(widths) < 2 or list(widths) != sorted(set(widths)):
        raise ValueError(
            f"`widths` must have at least 2 entries, ascending, got {widths}."
        )
    found = {width: _changes(run(width), width) for width in widths}
    kinds = {
        width: {name: len(steps) for name, steps in each.items()}
        for width, each in found.items()
    }
    for width, kind in kinds.items():
        if kind != kinds[widths[0]]:
            raise ValueError(
                "`run` must return the same activations for all widths, as often; the "
                f"numbers of steps are {kind} at width {width} and "
                f"{kinds[widths[0]]} at {widths[0]}."
            )
    changes = {
        name: np.array([each[name] for each in found.values()]).T
        for name in sorted(kinds[widths[0]])
    }
    exponents = {name: _slopes(widths, x) for name, x in changes.items()}
    return CoordinateCheck(widths, changes, exponents)


def _changes(steps: Any, width: int) -> dict[str, list[float]]:
    """Returns by name the root mean square of the change after each step."""
    if not isinstance(steps, Sequence) or len(steps) < 2:
        raise ValueError(
            "`run` must return at least 2 trees of activations, of before the first "
            f"step and after each, got {reprlib.repr(steps)} at width {width}."
        )
    first = _by_name(steps[0])
    shapes = {name: x.shape for name, x in first.items()}
    found: dict[str, list[float]] = {name: [] for name in first}
    for step in map(_by_name, steps[1:]):
        others = {name: x.shape for name, x in step.items()}
        if others != shapes:
            raise ValueError(
                "`run` must return the same activations after each step, got the "
                f"shapes {shapes} and {others} at width {width}."
            )
        for name, x in step.items():
            change = np.abs(x - first[name])
            found[name].append(float(np.sqrt(np.mean(np.square(change)))))
    return found


def _by_name(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_paths.path_name(path): _wide(leaf) for path, leaf in leaves}


def _wide(leaf: Any) -> np.ndarray:
    x = np.asarray(leaf)
    return x.astype(np.result_type(x.dtype, np.float64))


def _slopes(widths: Sequence[int], changes: np.ndarray) -> np.ndarray:
    """Returns the slope of the logarithm of each row over that of the width."""
    x = np.log(np.array(widths, np.float64))
    x = x - x.mean()
    defined = np.all(np.isfinite(changes) & (changes > 0), axis=1, keepdims=True)
    logs = np.log(np.where(defined, changes, 1.0))
    return np.where(defined[:, 0], logs @ x / (x @ x), np.nan)
