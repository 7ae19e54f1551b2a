"""A case, and the rule by which its verdict is found.

A case is a function of a library. It returns what the library did and what would have been right. The verdict is

* right: what it did equals the right value;
* refused: it raised an error, before the first update, whose message names what is wrong with the input;
* warned: the value is not the right one, and a warning or log line names what is wrong;
* wrong: the value is not the right one, and nothing was said about it;
* crash: any other error, also an error that comes after training has begun, when the work is lost;
* not offered: the library has no such function.

"Names what is wrong" is a regular expression in the case, `says`. It lists the words without which a user could not
know what to change: an option, a key of a row, a token, a module. It is the same for all libraries, and is matched with
the error's message and those of its causes. `reviewed` lists messages that were read by a person and count as a refusal
of this input although they do not match. An error that Python raises by itself (`ACCIDENTS`: an attribute that is
missing, an index out of range) is never a refusal, whatever words its message has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VERDICTS = ("right", "refused", "warned", "wrong", "crash", "not offered")

REFUSAL = "a refusal"
"""The right value of an input for which nothing that is computed can be right."""

MAX_TEXT = 400
"""Longest text of a value or message that is stored in the results."""


ACCIDENTS = (AttributeError, LookupError, AssertionError, NameError, ArithmeticError, RecursionError, SyntaxError)
"""Errors that come from code that met something unforeseen; a library that refuses an input says so by another."""


class NotOffered(Exception):
    """The library has no function for this case; the message says which."""


class TrainingLost(Exception):
    """An error that came after training had begun."""


@dataclass(frozen=True)
class Outcome:
    """What a library did, and what would have been right.

    Args:
        value: What was observed: texts, token ids, numbers.
        right: The right value, derived without the library.
        also: Other values that are as right, where the case leaves a choice.
        tolerance: Largest relative difference of numbers.
    """

    value: Any
    right: Any
    also: tuple[Any, ...] = ()
    tolerance: float = 1e-3

    @property
    def is_right(self) -> bool:
        """Whether the value is the right one."""
        return any(_equal(self.value, right, self.tolerance) for right in (self.right, *self.also))


def _equal(value: Any, right: Any, tolerance: float) -> bool:
    if isinstance(right, float) and isinstance(value, (int, float)):
        return math.isclose(value, right, rel_tol=tolerance, abs_tol=tolerance * 1e-2)
    if isinstance(right, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(value) == len(right) and all(_equal(a, b, tolerance) for a, b in zip(value, right, strict=True))
    return value == right


@dataclass(frozen=True)
class Case:
    """One input that some library gets wrong without a word.

    Args:
        name: Name of its function.
        kind: Name of its module, which is a heading of the table.
        title: What goes wrong, in a few words.
        threads: Public reports, as `owner/repository#number`.
        says: Regular expression that a refusal or warning matches.
        reviewed: Further messages that count as a refusal.
        quick: Whether the project's own tests run it.
        run: The function.
    """

    name: str
    kind: str
    title: str
    threads: tuple[str, ...]
    says: str
    reviewed: tuple[str, ...]
    quick: bool
    run: Callable[[Any], Outcome]


CASES: dict[str, Case] = {}


def case(
    title: str, *, threads: tuple[str, ...] = (), says: str, reviewed: tuple[str, ...] = (), quick: bool = True
) -> Callable[[Callable[[Any], Outcome]], Callable[[Any], Outcome]]:
    """Register a function as a case; see `Case` for the arguments."""

    def register(run: Callable[[Any], Outcome]) -> Callable[[Any], Outcome]:
        name, kind = run.__name__, run.__module__.rsplit(".", 1)[-1]
        assert name not in CASES, name
        CASES[name] = Case(name, kind, title, threads, says, reviewed, quick, run)
        return run

    return register


@dataclass
class Result:
    """Verdict of one library on one case, with what was observed."""

    verdict: str
    value: str = ""
    right: str = ""
    message: str = ""


def judge(case: Case, library: Any, on_error: Callable[[], None] | None = None) -> Result:
    """Run a case on a library and return the verdict; call `on_error` while an error is handled."""
    says = re.compile(case.says, re.IGNORECASE)
    with library.listening() as said:
        try:
            outcome = case.run(library)
        except NotOffered as reason:
            return Result("not offered", message=_short(reason))
        except TrainingLost as error:
            if on_error is not None:
                on_error()
            return Result("crash", message=_short(f"after training began: {error.__cause__!r}"))
        except Exception as error:
            if on_error is not None:
                on_error()
            message = "; caused by ".join(f"{type(cause).__name__}: {cause}" for cause in _causes(error))
            named = says.search(message) or any(text in message for text in case.reviewed)
            named = named and not isinstance(error, ACCIDENTS)
            return Result("refused" if named else "crash", message=_short(message))
    if outcome.is_right:
        return Result("right", _short(outcome.value), _short(outcome.right))
    named = [line for line in said if says.search(line)]
    verdict = "warned" if named else "wrong"
    return Result(verdict, _short(outcome.value), _short(outcome.right), _short(named[0]) if named else "")


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that it was raised from."""
    return [] if error is None else [error, *_causes(error.__cause__)]


def _short(value: Any) -> str:
    text = re.sub(r"/\S*/(tmp\w+|silent\w+)", "TMP", " ".join(str(value).split()))
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
