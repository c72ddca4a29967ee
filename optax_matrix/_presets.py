"""Functions that are another function with other defaults."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from optax_matrix import _check

P = ParamSpec("P")
T = TypeVar("T")


def preset(
    factory: Callable[P, T], **defaults: Any
) -> Callable[[Callable[[], None]], Callable[P, T]]:
    """Makes a function like `factory`, with other defaults and its own docstring.

    Settings objects among the defaults may be replaced by others of their class only,
    because their class says what is computed.
    """

    def decorate(definition: Callable[[], None]) -> Callable[P, T]:
        def made(*args: Any, **arguments: Any) -> Any:
            arguments = defaults | arguments
            for name, default in defaults.items():
                if dataclasses.is_dataclass(default):
                    _check.instance(name, arguments[name], type(default))
            return factory(*args, **arguments)

        signature = inspect.signature(factory)
        parameters = [
            parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in signature.parameters.items()
        ]
        made = functools.wraps(definition)(made)
        vars(made)["__signature__"] = signature.replace(parameters=parameters)
        return made

    return decorate
