"""Read the recipe of a candidate into the parameters of its training: known keys, values of the right type.

What a value may be beyond its type (a range, another parameter) is checked by the parameters themselves.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from alambic.errors import TrainError, nearest

Params = TypeVar("Params")

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def read_recipe(kind: type[Params], recipe: Mapping[str, Any], known: Mapping[str, Any], *, of: str) -> Params:
    """Return the parameters that `recipe` asks for.

    Args:
        kind: dataclass of the parameters; its annotations say what each may be.
        recipe: what the user wrote, or what an earlier fit found.
        known: values of the task (seed, metric, long, threads); the recipe goes before them.
        of: what is trained, for messages.

    Raises:
        TrainError: an unknown key with the nearest known one, or a value of another type than its parameter.
    """
    hints = typing.get_type_hints(kind)
    for key, value in recipe.items():
        if key not in hints:
            raise TrainError(f"recipe of {of}: unknown key {key!r}", hint=nearest(key, hints))
        choices = _choices(hints[key])
        if not any(_is(value, choice) for choice in choices):
            default = kind.__dataclass_fields__[key].default  # type: ignore[attr-defined]  # every kind is a dataclass
            raise TrainError(f"recipe of {of}: {key} = {value!r}; {_wanted(choices, default)}")
    return kind(**{**known, **recipe})


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return what a value may be: the types of a union; a literal and a plain type stand for themselves."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is(value: object, choice: Any) -> bool:
    if typing.get_origin(choice) is Literal:
        return value in typing.get_args(choice)
    if isinstance(value, bool):  # a bool is an int to Python
        return choice is bool
    if choice is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, choice)


def _wanted(choices: tuple[Any, ...], default: object) -> str:
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            return f"allowed: {', '.join(map(str, typing.get_args(choice)))}"
    if default is not None:
        return f"it is like {default!r} by default"
    return "it is " + " or ".join(_WORDS[choice] for choice in choices if choice in _WORDS)
