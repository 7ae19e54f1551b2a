"""Entries of the option `parameter_groups`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.suggest import did_you_mean


@dataclass(frozen=True)
class ParameterRule:
    """What is different about the parameters that a pattern matches.

    Args:
        pattern: Regular expression that is searched in the names of parameters.
        learning_rate: Their peak learning rate; None = as the others.
        weight_decay: Their weight decay; None = as the others.
        frozen: Whether they are not trained.
    """

    pattern: str
    learning_rate: float | None = None
    weight_decay: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"parameter_groups: pattern {self.pattern!r} is not a regular expression: {error}"
            ) from None
        given = [name for name in ("learning_rate", "weight_decay") if getattr(self, name) is not None]
        if self.frozen and given:
            raise ValueError(f"parameter_groups: {self.pattern!r} is frozen, so that {given[0]} would have no effect")
        if not self.frozen and not given:
            raise ValueError(
                f"parameter_groups: {self.pattern!r} changes nothing; give learning_rate, weight_decay or frozen: true"
            )
        for name in given:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(
                    f"parameter_groups: {self.pattern!r} has {name}={value!r}; give a number of at least 0"
                )


def parameter_rules(groups: Sequence[Mapping[str, Any]] | None) -> list[ParameterRule]:
    """Return the entries of the option `parameter_groups`.

    Raises:
        ValueError: An entry has unknown keys, no pattern, or would change nothing.
    """
    rules = []
    for group in groups or ():
        known = tuple(ParameterRule.__dataclass_fields__)
        for key in group:
            if key not in known:
                hint = did_you_mean(key, known, otherwise=f"its keys are {', '.join(known)}")
                raise ValueError(f"parameter_groups: unknown key {key!r}; {hint}")
        if "pattern" not in group:
            raise ValueError(f"parameter_groups: {dict(group)} has no pattern, which names of parameters must match")
        rules.append(ParameterRule(**group))
    return rules
