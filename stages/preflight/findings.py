"""Findings of `sft check`: errors and warnings, each with its key and its line in params.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.params.places import find_lines, line_of
from stages.params.schema import Params

_KEY = re.compile(rf"(?:params\.yaml[,:] )?((?:{'|'.join(Params.model_fields)})(?:\.\w+|\[\d+\])+)(?:: |,? )")


class Problem(NamedTuple):
    """A mistake, or something that a person should look at.

    Args:
        key: Place in params.yaml; empty if there is none.
        text: What is wrong, and what to do.
        is_error: Whether the pipeline would stop, or compute something else than is asked for.
    """

    key: str
    text: str
    is_error: bool = False


class Located(NamedTuple):
    """A problem with its line.

    Args:
        line: Line of the key in params.yaml, from 1; None if it has none.
        problem: The problem.
    """

    line: int | None
    problem: Problem

    def __str__(self) -> str:
        place = "params.yaml" if self.line is None else f"params.yaml:{self.line}"
        key, text = self.problem.key, self.problem.text
        # some messages begin with the key
        return f"{place}: {text}" if text.startswith(key) else f"{place}: {key}: {text}"

    def plain(self, file: Path) -> dict[str, Any]:
        """Return the values for JSON."""
        return {"key": self.problem.key or None, "file": str(file), "line": self.line, "message": self.problem.text}


def from_error(error: Exception, key: str = "") -> Problem:
    """Return the problem that an error states; its message begins with the key, or `key` is used."""
    text = str(error)
    match = _KEY.match(text)
    if match is None:
        return Problem(key, text, is_error=True)
    rest = text[match.end() :]
    # `load.eval.path names ...` reads on after the key
    return Problem(match[1], rest if match[0].endswith(": ") else text[match.start(1) :], is_error=True)


def locate(problems: Iterable[Problem], params_text: str) -> Iterator[Located]:
    """Yield problems with their lines in params.yaml."""
    lines: dict[str, int] | None = None
    for problem in problems:
        if lines is None:  # finding lines takes a tenth of a second
            lines = find_lines(params_text)
        yield Located(line_of(problem.key, lines), problem)
