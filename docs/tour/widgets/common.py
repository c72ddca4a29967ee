"""What all widgets have: controls, and the results of their combinations."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Widget = dict[str, Any]


class Choice(NamedTuple):
    """A control that chooses one of some values.

    Attributes:
      label: What readers see.
      values: The values.
      begin: The place of the value that is chosen first.
      texts: How the values are shown; None is as they are.
    """

    label: str
    values: Sequence[Any]
    begin: int
    texts: Sequence[str] | None = None


Choices = Mapping[str, Choice]


def controls(choices: Choices) -> list[Widget]:
    """Returns the controls of choices."""
    return [
        {
            **{"name": name, "label": choice.label, "value": choice.begin},
            "texts": list(choice.texts or map(str, choice.values)),
        }
        for name, choice in choices.items()
    ]


def steps_control(most: int, value: int) -> Widget:
    """Returns the control of how many steps are shown."""
    return {"name": "step", "label": "Step", "max": most, "value": value, "step": True}


def results(
    choices: Choices, make: Callable[..., Any], by: Iterable[str] | None = None
) -> dict[str, Any]:
    """Returns what a function makes of each combination of values.

    Args:
      choices: The controls.
      make: The function, whose arguments have the names of the controls.
      by: The controls on which it depends; None is all of them.

    Returns:
      A dictionary by the places of the values, in the order of the controls.
    """
    names = [name for name in choices if by is None or name in by]
    places = itertools.product(*(range(len(choices[name].values)) for name in names))
    return {
        ",".join(map(str, place)): make(
            **{
                name: choices[name].values[i]
                for name, i in zip(names, place, strict=True)
            }
        )
        for place in places
    }


def rounded(values: Any, digits: int = 3) -> Any:
    """Returns nested lists of numbers with some significant digits.

    What is not finite is None.
    """
    if isinstance(values, float | int):
        return float(f"{values:.{digits}g}") if math.isfinite(values) else None
    return [rounded(value, digits) for value in np.asarray(values).tolist()]
