"""Check of option values by the type hints of a dataclass, before code that expects these types runs."""

from __future__ import annotations

import enum
import functools
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, SupportsInt

from sft.suggest import did_you_mean

WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a dict",
}
"""How a message names the types that are checked."""


def suggest_option_names(cls: type[Any]) -> type[Any]:
    """Class decorator of a dataclass: an unknown option raises a `TypeError` that names the most similar one."""
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if type(self) is cls and name not in cls.__dataclass_fields__:
                near = did_you_mean(name, cls.__dataclass_fields__, before=": ", shown=str)
                raise TypeError(f"{cls.__name__} has no option {name!r}{near or ', see help(' + cls.__name__ + ')'}")
        construct(self, *args, **options)

    cls.__init__ = __init__
    return cls


def check_option_types(options: Any, names: Iterable[str] | None = None) -> None:
    """Check the values of a dataclass by its type hints, and convert what has one meaning.

    0 and 1 become booleans, 8.0 becomes 8 for a whole number, and text becomes a number: YAML reads `1e-4` as text.
    None is always accepted, as are objects of other types than text, numbers, lists and dicts.

    Args:
        options: Instance of a dataclass.
        names: Fields to check; None checks all.

    Raises:
        ValueError: A value has another type.
    """
    cls: Any = type(options)
    hints = simple_types(cls)
    for name in hints if names is None else names:
        if hints.get(name) and (value := getattr(options, name)) is not None:
            converted = convert_value(name, value, hints[name])
            if converted is not value:
                setattr(options, name, converted)


@functools.cache
def simple_types(cls: Any) -> dict[str, tuple[type[Any], ...]]:
    """Return the types that each field of a dataclass may have; fields with types outside `WORDS` are left out."""
    allowed = {name: _alternatives(hint) for name, hint in typing.get_type_hints(cls).items()}
    return {
        name: kinds
        for name, kinds in allowed.items()
        if name in cls.__dataclass_fields__ and all(kind in WORDS for kind in kinds)
    }


def _alternatives(hint: Any) -> tuple[type[Any], ...]:
    """Return the types of a type hint; an enum counts as text, which its class checks."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return tuple(dict.fromkeys(kind for part in typing.get_args(hint) for kind in _alternatives(part)))
    if origin is typing.Literal:
        return tuple(dict.fromkeys(type(value) for value in typing.get_args(hint)))
    kind = origin or hint
    if kind is type(None):
        return ()
    return (str if isinstance(kind, type) and issubclass(kind, enum.Enum) else kind,)


def convert_value(name: str, value: Any, kinds: tuple[type[Any], ...]) -> Any:
    """Return a value as one of the types that its option takes, see `check_option_types`.

    Args:
        name: Name of the option, for the message.
        value: Its value, not None.
        kinds: Types out of `WORDS`.

    Raises:
        ValueError: It has another type.
    """
    if isinstance(value, str | bytes):
        number = None if str in kinds else _number(value, kinds)
        fits = str in kinds or number is not None
        value = value if number is None else number
    elif isinstance(value, bool):  # Python counts it among the whole numbers
        fits = bool in kinds
    elif isinstance(value, SupportsInt) and isinstance(value, numbers.Real):
        whole = math.isfinite(value) and value == int(value)
        fits = float in kinds or (int in kinds and whole) or (bool in kinds and value in (0, 1))
        if fits and not isinstance(value, kinds) and float not in kinds:
            value = int(value) if int in kinds else bool(value)
    elif isinstance(value, list | tuple | set):
        fits = list in kinds
    elif isinstance(value, Mapping):
        fits = dict in kinds
    else:  # enums and objects of libraries
        fits = True
    if not fits:
        expected = " or ".join(WORDS[kind] for kind in kinds if kind is not int or float not in kinds)
        raise ValueError(f"{name}={reprlib.repr(value)}: give {expected}")
    return value


def _number(text: str | bytes, kinds: tuple[type[Any], ...]) -> int | float | None:
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return None
