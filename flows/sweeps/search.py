"""Searches for a sweep: grid, random and Optuna, and the text form of the params that they vary."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from typing import Any, Protocol

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.runs.graph import RunRefused

PATTERN = r"^[a-z_]+(\.[a-z_0-9]+)+=.+$"
_RANGE = re.compile(r"^\s*([^,\s]+)\.\.([^,\s]+?)(:log)?\s*$")
_NUM_DRAWS = 100
FORM = "section.key=1e-3,2e-3 for values, section.key=1e-4..1e-2 or section.key=1e-4..1e-2:log for a range"


@dataclass(frozen=True)
class Dimension:
    """One param that a sweep varies: some values, or a range.

    Args:
        name: The param, such as `train.learning_rate`.
        values: The values; empty for a range.
        low: The range's lower end.
        high: The range's upper end, inclusive. Two integers make a range of integers.
        log: Sample log-uniformly instead of uniformly.
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def integer(self) -> bool:
        """Whether the range is one of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def examples(self) -> tuple[Any, ...]:
        """Return the values to check before the sweep starts: all values, or the ends of the range."""
        return self.values or (self.low, self.high)

    def draw(self, source: random.Random) -> Any:
        """Sample one value."""
        if self.values:
            return source.choice(self.values)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.integer:
            return round(math.exp(source.uniform(low, high))) if self.log else source.randint(int(low), int(high))
        value = math.exp(source.uniform(low, high)) if self.log else source.uniform(low, high)
        return min(max(float(f"{value:.4g}"), self.low), self.high)


def parse_dimension(text: str) -> Dimension:
    """Parse a dimension.

    Args:
        text: `section.key=1e-3,2e-3` for values (each parsed as YAML), `section.key=1e-4..1e-2` for a range, and
            `section.key=1e-4..1e-2:log` for a range that is sampled log-uniformly.

    Raises:
        RunRefused: The text is not valid.
    """
    name, separator, content = text.partition("=")
    name = name.strip()
    if not separator or "." not in name or not content.strip():
        raise RunRefused(f"{text!r} is not a dimension of a sweep; write {FORM}")
    span = _RANGE.match(content)
    try:
        if span is None:
            values = YAML(typ="safe").load(f"[{content}]")
            repeated = [value for place, value in enumerate(values) if value in values[:place]]
            if repeated:
                raise RunRefused(f"{text!r} names {repeated[0]!r} twice")
            return Dimension(name, tuple(values))
        low, high = (YAML(typ="safe").load(part) for part in span.group(1, 2))
    except YAMLError:
        raise RunRefused(f"{text!r}: {content!r} is not a list of YAML values; write {FORM}") from None
    return _range(text, name, low, high, log=span[3] is not None)


def _range(text: str, name: str, low: Any, high: Any, log: bool) -> Dimension:
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not low < high:
        raise RunRefused(f"{text!r}: a range goes from a number to a larger one")
    if log and low <= 0:
        raise RunRefused(f"{text!r}: {low} has no logarithm; start above 0, or remove `:log`")
    return Dimension(name, low=low, high=high, log=log)


class Search(Protocol):
    """Interface of a search."""

    def propose(self) -> dict[str, Any] | None:
        """Return the next values by the params' names; None if there are none left."""

    def tell(self, score: float | None) -> None:
        """Report the score of the last proposal; None if its trial failed."""


class Grid:
    """Every combination of the values; the last dimension changes fastest."""

    def __init__(self, dimensions: list[Dimension]) -> None:
        spans = [dimension.name for dimension in dimensions if not dimension.values]
        if spans:
            raise RunRefused(f"{', '.join(spans)}: a grid takes values, not a range; use `random` or `optuna`")
        names = [dimension.name for dimension in dimensions]
        self.combinations = [
            dict(zip(names, values, strict=True)) for values in itertools.product(*(d.values for d in dimensions))
        ]
        self._left = iter(self.combinations)

    def propose(self) -> dict[str, Any] | None:
        """Return the next combination; None after the last one."""
        return next(self._left, None)

    def tell(self, score: float | None) -> None:
        """No-op: a grid search does not use past results."""


class RandomSearch:
    """Random values without repetition."""

    def __init__(self, dimensions: list[Dimension], seed: int) -> None:
        self._dimensions = dimensions
        self._random = random.Random(seed)
        self._seen: set[str] = set()

    def propose(self) -> dict[str, Any] | None:
        """Return values that were not proposed before; None if `_NUM_DRAWS` samples were all repetitions."""
        for _ in range(_NUM_DRAWS):
            values = {dimension.name: dimension.draw(self._random) for dimension in self._dimensions}
            key = json.dumps(values, sort_keys=True)
            if key not in self._seen:
                self._seen.add(key)
                return values
        return None

    def tell(self, score: float | None) -> None:
        """No-op: a random search does not use past results."""


class OptunaSearch:
    """Values proposed by Optuna's TPE sampler (Bergstra et al., NeurIPS 2011)."""

    def __init__(self, dimensions: list[Dimension], seed: int, maximize: bool) -> None:
        try:
            import optuna  # an optional extra
        except ImportError:
            raise RunRefused("the search `optuna` needs a package: pip install 'optuna>=4'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._dimensions = dimensions
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(
            direction="maximize" if maximize else "minimize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        self._trial: Any = None

    def propose(self) -> dict[str, Any] | None:
        """Return the values that the sampler proposes after the scores so far."""
        self._trial = self._study.ask()
        return {dimension.name: self._suggest(dimension) for dimension in self._dimensions}

    def _suggest(self, dimension: Dimension) -> Any:
        if dimension.values:
            # by index: Optuna does not accept lists as values
            return dimension.values[self._trial.suggest_categorical(dimension.name, range(len(dimension.values)))]
        if dimension.integer:
            return self._trial.suggest_int(dimension.name, dimension.low, dimension.high, log=dimension.log)
        return self._trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.log)

    def tell(self, score: float | None) -> None:
        """Report the score of the last proposal to the sampler."""
        if score is None:
            self._study.tell(self._trial, state=self._failed)
        else:
            self._study.tell(self._trial, score)


def open_search(kind: str, dimensions: list[Dimension], seed: int, maximize: bool) -> Search:
    """Create a search.

    Args:
        kind: `grid`, `random` or `optuna`.
        dimensions: The params to vary.
        seed: Seed of the sampling.
        maximize: Whether higher scores are better.

    Raises:
        RunRefused: There is no dimension, a param is named twice, or the search does not support a dimension.
    """
    names = [dimension.name for dimension in dimensions]
    if not names:
        raise RunRefused(f"a sweep varies at least one param: {FORM}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RunRefused(f"{', '.join(twice)}: named twice; give all of its values at once")
    if kind == "grid":
        return Grid(dimensions)
    return RandomSearch(dimensions, seed) if kind == "random" else OptunaSearch(dimensions, seed, maximize)
