"""Makes command-line flags of the fields of a dataclass."""

import argparse
import contextlib
import dataclasses
import json
import typing
from collections.abc import Collection, Mapping
from typing import Any


def flag(default: Any, help: str) -> Any:
    """Returns a field with a default and the help of its flag."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def add(
    parser: argparse.ArgumentParser,
    default: Any,
    choices: Mapping[str, Collection[str]],
) -> None:
    """Adds one flag per field; those that are not given are not in the result.

    Args:
      parser: What the flags are added to.
      default: A dataclass whose fields were made by `flag`; the help has its values.
      choices: The values that a field may have, for some of them.
    """
    hints = typing.get_type_hints(type(default))
    for field in dataclasses.fields(default):
        name, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        help, value = field.metadata["help"], getattr(default, field.name)
        if value not in (None, False, "", (), {}):
            help += f" ({value})"
        options: dict[str, Any] = {"help": help.replace("%", "%%")}
        options["default"] = argparse.SUPPRESS
        if field.name in choices:
            options["choices"] = choices[field.name]
        if kind is bool:
            options["action"] = "store_true"
        elif kind == tuple[str, ...]:
            options |= {"nargs": "*", "metavar": "FOLDER"}
        elif kind == dict[str, Any]:
            options |= {"type": _json_object, "metavar": "JSON"}
        elif kind is not str:
            # A flag of type `float | None` is parsed as a float.
            options["type"] = kind if isinstance(kind, type) else _some(kind)
        parser.add_argument(name, **options)


def _some(kind: Any) -> Any:
    return next(k for k in typing.get_args(kind) if k is not type(None))


def _json_object(text: str) -> dict[str, Any]:
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise argparse.ArgumentTypeError(
        f"expected a JSON object such as '{{\"weight_decay\": 0.1}}', got {text!r}"
    )
