"""Suggestions for misspelled names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def did_you_mean(
    name: str,
    known: Iterable[str],
    *,
    otherwise: str = "",
    before: str = "",
    after: str = "",
    shown: Callable[[str], str] = repr,
    at_most: int = 1,
    cutoff: float = 0.6,
) -> str:
    """Return the question `did you mean 'x'?` with the known name that is most similar to a misspelled one.

    Args:
        name: The misspelled name.
        known: The names that exist.
        otherwise: Returned if no known name is similar enough.
        before: Text put before the question, such as `"; "`.
        after: Text put after the question, such as a space.
        shown: How a known name is written in the question.
        at_most: Number of names to suggest, joined by "or".
        cutoff: Similarity from 0 to 1 that a name must reach, see `difflib.get_close_matches`.
    """
    near = difflib.get_close_matches(name, list(known), n=at_most, cutoff=cutoff)
    return f"{before}did you mean {' or '.join(map(shown, near))}?{after}" if near else otherwise
