"""What all widgets have: controls, and the results of every combination of them."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

Widget = dict[str, Any]


def control(name: str, label: str, values: Sequence[Any], value: int) -> Widget:
    """Returns a control that chooses one of some values, and where it begins."""
    texts = [str(each) for each in values]
    return {"name": name, "label": label, "texts": texts, "value": value}


def steps_control(most: int, value: int) -> Widget:
    """Returns the control of how many steps are shown."""
    return {"name": "step", "label": "Step", "max": most, "value": value, "step": True}


def combinations(*choices: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """Returns all combinations of values, by the places of the values."""
    places = itertools.product(*(range(len(each)) for each in choices))
    return {
        ",".join(map(str, place)): tuple(
            values[i] for values, i in zip(choices, place, strict=True)
        )
        for place in places
    }


def rounded(values: Any, digits: int = 3) -> Any:
    """Returns nested lists of numbers with some significant digits."""
    if isinstance(values, float | int):
        return float(f"{values:.{digits}g}")
    return [rounded(value, digits) for value in np.asarray(values).tolist()]
