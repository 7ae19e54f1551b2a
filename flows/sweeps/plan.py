"""What a sweep is asked for, checked before its first trial."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from ruamel.yaml import YAML

from flows.runs.forms import Overrides, apply_overrides, flatten, overridden, with_values
from flows.runs.graph import RunRefused
from flows.runs.run import ask
from flows.sweeps.search import PATTERN, Search, open_search, parse_dimension
from sft.suggest import did_you_mean
from stages.params.figures import lower_is_better, metric_names
from stages.params.schema import check_params

DEFAULT_OBJECTIVE = "evaluate.tuned.loss"
NUM_TRIALS = 10

DimensionText = Annotated[str, Field(pattern=PATTERN)]
ObjectiveText = Annotated[str, Field(pattern=r"^[a-z_]+(\.[A-Za-z_0-9]+)+(:min|:max)?$")]
Kind = Literal["grid", "random", "optuna"]


@dataclass(frozen=True)
class SweepAsked:
    """What a sweep was asked for; the flow's own arguments, see there."""

    params: tuple[str, ...]
    search: Kind
    trials: int | None
    objective: str
    overrides: Overrides
    seed: int
    write_to: str | None

    @property
    def figure(self) -> str:
        """The figure that ranks trials."""
        return self.objective.partition(":")[0]

    @property
    def maximize(self) -> bool:
        """Whether more of it is better."""
        goal = self.objective.partition(":")[2]
        return goal == "max" if goal else not lower_is_better(self.figure)


@dataclass(frozen=True)
class Prepared:
    """A sweep that can be started.

    Args:
        root: The checkout.
        search: What proposes values.
        num_trials: How many at most.
        to_stage: The stage that measures the objective.
    """

    root: Path
    search: Search
    num_trials: int
    to_stage: str


def prepare(root: Path, asked: SweepAsked) -> Prepared:
    """Check what a sweep is asked for, before the first trial is started.

    Raises:
        RunRefused: A param, a value or the objective makes no sense, or code for the worktrees is not committed.
        ParamsError: Values don't go together.
    """
    dimensions = [parse_dimension(text) for text in asked.params]
    search = open_search(asked.search, dimensions, asked.seed, asked.maximize)
    to_stage = check_objective(root, asked.figure, asked.overrides)
    for dimension in dimensions:
        if flatten(overridden(asked.overrides)).keys() & {dimension.name}:
            raise RunRefused(f"{dimension.name} is varied and overridden: leave out one of the two")
        for value in dimension.examples():
            ask(root, None, to_stage, with_values(asked.overrides, {dimension.name: value}))
    if asked.write_to is not None and not (root / asked.write_to).parent.is_dir():
        raise RunRefused(f"the best values can't be written to {asked.write_to}: there is no such folder")
    combinations = math.prod(len(dimension.values) for dimension in dimensions)
    default = combinations if asked.search == "grid" else NUM_TRIALS
    return Prepared(root, search, asked.trials or default, to_stage)


def check_objective(root: Path, objective: str, overrides: Overrides) -> str:
    """The stage that measures an objective.

    Raises:
        RunRefused: No stage has that name, or `evaluate` has no such figure.
    """
    stage, _, figure = objective.partition(".")
    names = ask(root, None, None, Overrides()).plan.names
    if stage not in names or not figure:
        raise RunRefused(
            f"objective {objective!r}: write STAGE.FIGURE, such as {DEFAULT_OBJECTIVE}; stages are {names}"
        )
    if stage == "evaluate":
        text = apply_overrides((root / "params.yaml").read_text(encoding="utf-8"), overridden(overrides))
        chosen = check_params(YAML(typ="safe", pure=True).load(text))
        known = metric_names(chosen.evaluate, with_quantized=chosen.quantize.method != "none")
        if figure not in known:
            otherwise = f"there are {', '.join(sorted(known))}"
            hint = did_you_mean(figure, known, otherwise=otherwise, shown=lambda name: f"'evaluate.{name}'")
            raise RunRefused(f"objective {objective!r}: `evaluate` measures no {figure}; {hint}")
    return stage
