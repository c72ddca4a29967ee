"""What a layout says: which axes of a leaf are inputs, outputs and batch."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import optax

MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers


def int_tuple(name: str, value: Any) -> tuple[int, ...]:
    items = value if isinstance(value, Sequence) else (value,)
    if isinstance(value, str | bytes) or any(isinstance(item, bool) for item in items):
        raise TypeError(f"`{name}` must hold integers, got {value!r}.")
    try:
        return tuple(operator.index(item) for item in items)
    except TypeError:
        raise TypeError(f"`{name}` must hold integers, got {value!r}.") from None


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
    """Says which axes of a leaf make its matrices; every other axis is batch.

    The default reads a Flax kernel, (..., in, out): the last two axes are one matrix
    and leading axes are a batch of independent ones. Several axes on a side are
    flattened in the order given. A fused kernel is several matrices side by side,
    which ``split_inputs`` and ``split_outputs`` separate.

    A layout is not a pytree: `jax.tree` sees it as a leaf.

    Args:
      inputs: The axis or axes that are contracted with the input of the layer.
      outputs: The axis or axes of the output of the layer.
      split_inputs: The number of equal blocks of the input axis, or a tuple of their
        widths. Needs a single input axis.
      split_outputs: The same for the output axis.

    Raises:
      TypeError: If an axis or a width is not an integer, at construction.
      ValueError: If a side has no axis, names one twice, or has a split and several
        axes, or if a width is below 1, at construction.

    Example:
      >>> fused_qkv = MatrixLayout(split_outputs=3)  # (d, 3 d)
      >>> grouped_query = MatrixLayout(split_outputs=(512, 128, 128))  # (d, q + k + v)
      >>> per_head = MatrixLayout(inputs=0, outputs=2)  # (d, heads, head_dim)
      >>> per_head_out = MatrixLayout(split_inputs=12)  # (heads * head_dim, d)
      >>> torch_linear = MatrixLayout(inputs=-1, outputs=-2)  # (out, in)
    """

    inputs: int | tuple[int, ...] = -2
    outputs: int | tuple[int, ...] = -1
    split_inputs: int | tuple[int, ...] | None = None
    split_outputs: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks what needs no shape, and turns lists into tuples."""
        for side in ("inputs", "outputs"):
            self._check_side(side, f"split_{side}")

    def _check_side(self, side: str, split: str) -> None:
        axes = int_tuple(side, getattr(self, side))
        if not axes or len(set(axes)) != len(axes):
            raise ValueError(
                f"`{side}` must name at least one axis and none twice, got {axes}."
            )
        if isinstance(getattr(self, side), list):
            object.__setattr__(self, side, axes)
        value = getattr(self, split)
        if value is None:
            return
        widths = int_tuple(split, value)
        if not widths or min(widths) < 1:
            raise ValueError(
                f"`{split}` must be a number of equal blocks or a tuple of widths, all "
                f"at least 1, got {value!r}."
            )
        if len(axes) > 1:
            raise ValueError(
                f"`{split}` cuts a single axis, but `{side}` names {axes}. Leave the "
                f"axis that counts the blocks out of `{side}`: it is then batch."
            )
        if isinstance(value, list):
            object.__setattr__(self, split, widths)


LayoutSpec: TypeAlias = MatrixLayout | MuonDimensionNumbers | None


def as_layout(spec: LayoutSpec) -> MatrixLayout:
    """Returns `spec` as a `MatrixLayout`; None is the default layout."""
    if spec is None:
        return MatrixLayout()
    if isinstance(spec, MuonDimensionNumbers):
        return MatrixLayout(
            int_tuple("reduction_axis", spec.reduction_axis),
            int_tuple("output_axis", spec.output_axis),
        )
    if isinstance(spec, MatrixLayout):
        return spec
    raise TypeError(
        "A layout must be a `MatrixLayout`, an `optax.contrib.MuonDimensionNumbers` or "
        f"None, got {spec!r}."
    )
