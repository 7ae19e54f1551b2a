"""Regular expressions from elsewhere: searched in a child process, since Python's own may backtrack without end."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sft.untrusted.child import Child, ChildError, RaisedError, problem

SECONDS = 5.0
"""Time limit for all searches of a call; some million times what a usual one needs."""

MAX_PATTERN = 10_000
"""Longest expression in characters."""

MAX_BYTES = 1 << 30
"""Memory in bytes that a search may need."""

_child = Child(MAX_BYTES)


class PatternError(ValueError):
    """An expression that can't be used; the message says why."""


def check_pattern(pattern: str) -> None:
    """Check that an expression can be compiled.

    Raises:
        PatternError: It can't, or is longer than `MAX_PATTERN`.
    """
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"an expression of {len(pattern)} characters, more than {MAX_PATTERN}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise PatternError(str(error) or "it is nested too deeply") from None


def last_match(pattern: str, text: str) -> tuple[str, list[str | None]] | None:
    """Return what an expression matches last in a text, and its groups; None if there is no match.

    Raises:
        PatternError: The search takes too long.
    """
    found = _called(_last_match, pattern, text)
    return None if found is None else (found[0], found[1])


def fullmatches(pattern: str, texts: Iterable[str]) -> list[bool]:
    """Return which texts an expression matches as a whole.

    Raises:
        PatternError: The search takes too long, or the expression can't be compiled.
    """
    check_pattern(pattern)
    return _called(_fullmatches, pattern, list(texts))


def schema_problem(schema: Any, value: Any) -> str | None:
    """Return what a JSON schema finds wrong with a value; None if it is valid.

    Raises:
        PatternError: Checking takes too long, as for expressions that backtrack, or references that repeat each other.
    """
    return _called(_schema_problem, schema, value)


def _called(function: Any, *arguments: Any) -> Any:
    try:
        return _child.call(function, *arguments, seconds=SECONDS)
    except RaisedError as error:
        raise PatternError(str(error)) from None
    except ChildError as error:
        raise PatternError(problem(error, "matching it")) from None


def _last_match(pattern: str, text: str) -> Any:
    last = None
    for last in re.finditer(pattern, text):  # noqa: B007
        pass
    return None if last is None else (last[0], last.groups())


def _fullmatches(pattern: str, texts: list[str]) -> list[bool]:
    return [re.fullmatch(pattern, text) is not None for text in texts]


def _schema_problem(schema: Any, value: Any) -> str | None:
    return validation_problem(schema_validator(schema), value)


def schema_validator(schema: Any) -> Any:
    """Return a validator of a JSON schema.

    Its registry is empty, so that a reference in the schema never makes this machine fetch a URL.
    """
    from jsonschema import Draft202012Validator
    from referencing import Registry

    return Draft202012Validator(schema, registry=Registry())


def validation_problem(validator: Any, value: Any) -> str | None:
    """Return what a validator of arguments finds wrong with a value; None if it is valid."""
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        error = best_match(validator.iter_errors(value))
    except Unresolvable as problem:
        return f"its schema refers to what is not in it ({problem})"
    except RecursionError:
        return "its schema refers to itself without end"
    except re.error as problem:
        return f"a pattern of its schema is not a regular expression ({problem})"
    return None if error is None else f"arguments{''.join(f'.{part}' for part in error.absolute_path)}: {error.message}"
