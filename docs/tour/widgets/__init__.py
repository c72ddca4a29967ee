"""Computes the numbers of the tour's widgets, by Optax and this library.

Each widget is a file in docs/tour/data, which `make widgets` writes. Controls are lists
of values, and the file has the result of every combination, so that no optimizer is
written a second time in JavaScript.
"""

from collections.abc import Callable

from . import bars, curves, geometry, line, matrices, paths, race
from .common import Widget

WIDGETS: dict[str, Callable[[], Widget]] = {
    make.__name__: make
    for make in [
        paths.bowl,
        line.fit,
        paths.valley,
        curves.accumulators,
        paths.adam,
        curves.signal,
        bars.scenarios,
        bars.decay,
        paths.signs,
        paths.lion,
        bars.steps,
        geometry.slopes,
        geometry.hessian,
        paths.newton,
        curves.condition,
        matrices.memory,
        curves.spectrum,
        matrices.maps,
        geometry.circle,
        curves.squeeze,
        race.race,
    ]
}
