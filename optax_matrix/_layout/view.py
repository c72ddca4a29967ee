"""A layout fitted to one shape: cuts a leaf into matrices and joins them again."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_matrix import _mesh
from optax_matrix._layout.layout import LayoutSpec, as_layout, int_tuple


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A layout fitted to one shape: cuts a leaf into matrices and joins them again.

    Attributes:
      shape: The leaf's shape.
      batch: The batch axes, ascending, counted from the front like the next two.
      inputs: The input axes, in the order they are flattened.
      outputs: The output axes, likewise.
      input_widths: Widths of the input blocks, one if that side is not split.
      output_widths: Widths of the output blocks, likewise.
      path: The leaf's name, for error messages.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_widths: tuple[int, ...]
    output_widths: tuple[int, ...]
    path: str = ""

    @property
    def _batch_size(self) -> int:
        return math.prod(self.shape[axis] for axis in self.batch)

    def _groups(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Block indices (i, j) by the (m, n) of the block, in order of appearance."""
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, m in enumerate(self.input_widths):
            for j, n in enumerate(self.output_widths):
                groups.setdefault((m, n), []).append((i, j))
        return groups

    @property
    def matrices(self) -> tuple[tuple[int, int, int], ...]:
        """(count, inputs, outputs) of each stack, in the order of `to_stacks`."""
        batch = self._batch_size
        return tuple((batch * len(ij), *mn) for mn, ij in self._groups().items())

    @property
    def count(self) -> int:
        """Number of matrices in the leaf."""
        return self._batch_size * len(self.input_widths) * len(self.output_widths)

    def to_stacks(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the matrices of ``x`` as one (count, m, n) stack per distinct (m, n).

        Within a stack the leaf's batch index is the slowest, then the input block,
        then the output block.
        """
        if tuple(x.shape) != self.shape:
            raise ValueError(f"The view is of shape {self.shape}, got {x.shape}.")
        order = (*self.batch, *self.inputs, *self.outputs)
        if order != tuple(range(len(order))):
            x = jnp.transpose(x, order)
        batch = self._batch_size
        if x.ndim == 2:
            x = jnp.expand_dims(x, 0)
        flat = (batch, sum(self.input_widths), sum(self.output_widths))
        if x.shape != flat:
            x = jnp.reshape(x, flat)
        groups = self._groups()
        if len(groups) == 1:
            ((m, n),) = groups
            return (_cut(x, len(self.input_widths), len(self.output_widths), m, n),)
        starts_in = np.cumsum((0, *self.input_widths))
        starts_out = np.cumsum((0, *self.output_widths))
        stacks = []
        for (m, n), blocks in groups.items():
            parts = [
                x[:, starts_in[i] : starts_in[i] + m, starts_out[j] : starts_out[j] + n]
                for i, j in blocks
            ]
            stack = jnp.stack(parts, axis=1).reshape(batch * len(parts), m, n)
            stacks.append(stack)
        return tuple(stacks)

    def from_stacks(self, stacks: Sequence[jax.Array]) -> jax.Array:
        """Returns the leaf whose `to_stacks` is ``stacks``: the exact inverse."""
        shapes = tuple(tuple(stack.shape) for stack in stacks)
        if shapes != self.matrices:
            raise ValueError(f"Expected stacks {self.matrices}, got {shapes}.")
        batch, groups = self._batch_size, self._groups()
        if len(groups) == 1:
            x = _paste(
                stacks[0], batch, len(self.input_widths), len(self.output_widths)
            )
        else:
            parts = {}
            for stack, ((m, n), blocks) in zip(stacks, groups.items(), strict=True):
                grid = jnp.reshape(stack, (batch, len(blocks), m, n))
                parts |= {block: grid[:, k] for k, block in enumerate(blocks)}
            rows = [
                jnp.concatenate(
                    [parts[i, j] for j in range(len(self.output_widths))], axis=2
                )
                for i in range(len(self.input_widths))
            ]
            x = jnp.concatenate(rows, axis=1)
        order = (*self.batch, *self.inputs, *self.outputs)
        permuted = tuple(self.shape[axis] for axis in order)
        if len(permuted) == 2:
            x = jnp.squeeze(x, 0)
        elif x.shape != permuted:
            x = jnp.reshape(x, permuted)
        if order != tuple(range(len(order))):
            x = jnp.transpose(x, tuple(int(axis) for axis in np.argsort(order)))
        return x

    def apply(self, fn: Callable[..., jax.Array], *xs: jax.Array) -> jax.Array:
        """Applies ``fn``, (count, m, n) -> (count, m, n), to every stack of the leaves.

        Args:
          fn: Takes one stack per leaf of ``xs``.
          *xs: Arrays of the view's shape.

        Returns:
          The results, joined in the shape of the view.
        """
        stacks = zip(*(self.to_stacks(x) for x in xs), strict=True)
        return self.from_stacks([fn(*stack) for stack in stacks])

    def _sides(
        self, inputs: bool, outputs: bool
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        sides = []
        if inputs:
            sides.append((self.inputs, self.input_widths))
        if outputs:
            sides.append((self.outputs, self.output_widths))
        return sides

    def sum(self, x: jax.Array, inputs: bool = True, outputs: bool = True) -> jax.Array:
        """Sums ``x`` over the input and/or output axes within each matrix.

        Args:
          x: Array of the view's shape.
          inputs: Whether to sum over the input axes.
          outputs: Whether to sum over the output axes.

        Returns:
          Array of the leaf's rank and ``x``'s dtype. A summed axis has size 1, or the
          number of blocks where that side is split. `expand` brings it back.

        Sharding:
          Any. A side that is split is gathered along its axis; one that is not needs
          only a `jnp.sum` and no reshape.
        """
        return self._reduce(jnp.sum, x, inputs, outputs)

    def gathered(
        self, x: jax.Array, inputs: bool = True, outputs: bool = True
    ) -> jax.Array:
        """Returns ``x`` as `sum` over these axes needs it, for several such sums.

        Axes that are split are gathered.
        """
        for side, widths in self._sides(inputs, outputs):
            if len(widths) > 1:
                x = _mesh.gathered(x, side[0])
        return x

    def max(self, x: jax.Array) -> jax.Array:
        """Returns the largest entry of each matrix, or 0, in the shape of `sum`."""
        return self._reduce(_max_or_zero, x, inputs=True, outputs=True)

    def _reduce(
        self,
        reduce: Callable[..., jax.Array],
        x: jax.Array,
        inputs: bool,
        outputs: bool,
    ) -> jax.Array:
        axes = ()
        for side, widths in self._sides(inputs, outputs):
            if len(widths) == 1:
                axes += side
            else:
                # Explicit mode cannot cut a sharded axis into blocks.
                x = _mesh.gathered(x, side[0])
                x = _block_reduce(reduce, x, side[0], widths)
        return reduce(x, axis=axes, keepdims=True) if axes else x

    def expand(self, r: Any) -> Any:
        """Repeats a result of `sum` or `size` so that it broadcasts against the leaf.

        The identity where no side is split, and on scalars.
        """
        for side, widths in self._sides(True, True):
            if np.ndim(r) and len(widths) > 1 and r.shape[side[0]] == len(widths):
                repeat = np.repeat if isinstance(r, np.ndarray) else _repeat
                r = repeat(r, np.asarray(widths), side[0])
        return r

    def size(self, inputs: bool = True, outputs: bool = True) -> float | np.ndarray:
        """Returns the number of entries that `sum` adds up.

        Returns:
          A Python float, or where a summed side is split by unequal widths a float32
          NumPy array of the leaf's rank that broadcasts against the sum.
        """
        size: float | np.ndarray = 1.0
        for side, widths in self._sides(inputs, outputs):
            if len(set(widths)) == 1:
                size = size * float(widths[0])
            else:
                shape = [1] * len(self.shape)
                shape[side[0]] = len(widths)
                size = size * np.asarray(widths, np.float32).reshape(shape)
        return size

    def fan_in(self) -> float | np.ndarray:
        """Returns the number of inputs of each matrix, as `size` does."""
        return self.size(inputs=True, outputs=False)

    def fan_out(self) -> float | np.ndarray:
        """Returns the number of outputs of each matrix, as `size` does."""
        return self.size(inputs=False, outputs=True)


def _max_or_zero(x: jax.Array, **axes: Any) -> jax.Array:
    # Matrices without entries have no largest one.
    return jnp.max(x, initial=0, **axes)


def _cut(x: jax.Array, rows: int, columns: int, m: int, n: int) -> jax.Array:
    """(B, rows·m, columns·n) -> (B·rows·columns, m, n)."""
    if rows == columns == 1:
        return x
    grid = jnp.reshape(x, (x.shape[0], rows, m, columns, n))
    grid = jnp.transpose(grid, (0, 1, 3, 2, 4))
    return jnp.reshape(grid, (x.shape[0] * rows * columns, m, n))


def _paste(stack: jax.Array, batch: int, rows: int, columns: int) -> jax.Array:
    """The inverse of `_cut`."""
    if rows == columns == 1:
        return stack
    _, m, n = stack.shape
    grid = jnp.reshape(stack, (batch, rows, columns, m, n))
    grid = jnp.transpose(grid, (0, 1, 3, 2, 4))
    return jnp.reshape(grid, (batch, rows * m, columns * n))


def _block_reduce(
    reduce: Callable[..., jax.Array], x: jax.Array, axis: int, widths: tuple[int, ...]
) -> jax.Array:
    if x.shape[axis] != sum(widths):
        raise ValueError(f"Blocks {widths} do not fit axis {axis} of shape {x.shape}.")
    if len(set(widths)) == 1:
        grid = (*x.shape[:axis], len(widths), widths[0], *x.shape[axis + 1 :])
        return reduce(jnp.reshape(x, grid), axis=axis + 1)
    parts = jnp.split(x, np.cumsum(widths)[:-1], axis=axis)
    reduced = [reduce(part, axis=axis, keepdims=True) for part in parts]
    return jnp.concatenate(reduced, axis=axis)


def _repeat(r: Any, widths: np.ndarray, axis: int) -> jax.Array:
    # `jnp.repeat` computes these indices at each step.
    return jnp.take(r, np.repeat(np.arange(len(widths)), widths), axis, mode="clip")


def _widths(
    split: int | tuple[int, ...] | None, size: int, name: str, where: str
) -> tuple[int, ...]:
    if split is None:
        return (size,)
    if isinstance(split, Sequence):
        widths = tuple(split)
        if sum(widths) != size:
            raise ValueError(
                f"`{name}={widths}` adds up to {sum(widths)}, but the axis has {size} "
                f"entries {where}. Pass widths that sum to {size}."
            )
        return widths
    if size % split:
        raise ValueError(
            f"`{name}={split}` does not divide the {size} entries of the axis {where}. "
            "Pass a tuple of widths for unequal blocks."
        )
    return (size // split,) * split


def view(shape: Sequence[int], spec: LayoutSpec = None, path: str = "") -> MatrixView:
    """Fits a layout to a shape.

    Args:
      shape: The leaf's shape, of at least 2 axes.
      spec: Its layout; None is the last two axes.
      path: The leaf's name in error messages.

    Returns:
      The view.

    Raises:
      ValueError: If the leaf has fewer than 2 axes, an axis is out of range or named
        twice, or a split does not fit its axis.
    """
    shape = tuple(shape)
    layout = as_layout(spec)
    where = f"at '{path}', shape {shape}" if path else f"in shape {shape}"
    if len(shape) < 2:
        raise ValueError(
            f"A matrix leaf needs at least 2 axes, got one {where}. Route it to the "
            "auxiliary optimizer, see `describe`."
        )
    sides = []
    for name in ("inputs", "outputs"):
        axes = int_tuple(name, getattr(layout, name))
        for axis in axes:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"`{name}` names axis {axis}, which does not exist {where}. Pass "
                    f"axes from {-len(shape)} to {len(shape) - 1}; got {layout}."
                )
        sides.append(tuple(axis % len(shape) for axis in axes))
    inputs, outputs = sides
    if len({*inputs, *outputs}) < len(inputs) + len(outputs):
        raise ValueError(
            f"The layout names an axis twice {where}: inputs {inputs}, outputs "
            f"{outputs}. Pass disjoint axes; got {layout}."
        )
    return MatrixView(
        shape=shape,
        batch=tuple(a for a in range(len(shape)) if a not in inputs + outputs),
        inputs=inputs,
        outputs=outputs,
        input_widths=_widths(
            layout.split_inputs,
            math.prod(shape[axis] for axis in inputs),
            "split_inputs",
            where,
        ),
        output_widths=_widths(
            layout.split_outputs,
            math.prod(shape[axis] for axis in outputs),
            "split_outputs",
            where,
        ),
        path=path,
    )


def blocked(view: MatrixView, size: int) -> MatrixView:
    """Returns the view with blocks cut to at most `size`, the last one smaller."""

    def cut(widths: tuple[int, ...]) -> tuple[int, ...]:
        pieces = []
        for width in widths:
            whole, rest = divmod(width, size)
            pieces += [size] * whole + [rest] * (rest > 0)
        return tuple(pieces)

    return dataclasses.replace(
        view,
        input_widths=cut(view.input_widths),
        output_widths=cut(view.output_widths),
    )
