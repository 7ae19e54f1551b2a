"""The options of a sweep, checked before its first trial."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from ruamel.yaml import YAML

from flows.runs.forms import Overrides, flatten, overridden, with_values
from flows.runs.graph import RunRefused
from flows.runs.run import prepare_run
from flows.sweeps.search import PATTERN, Search, open_search, parse_dimension
from sft.suggest import did_you_mean
from stages.params.assignments import apply_overrides
from stages.params.figures import lower_is_better, metric_names
from stages.params.schema import check_params

DEFAULT_OBJECTIVE = "evaluate.tuned.loss"
NUM_TRIALS = 10

DimensionText = Annotated[str, Field(pattern=PATTERN)]
ObjectiveText = Annotated[str, Field(pattern=r"^[a-z_]+(\.[A-Za-z_0-9]+)+(:min|:max)?$")]
Kind = Literal["grid", "random", "optuna"]


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep; `flows.sweep.sweep` documents them."""

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
        """Whether higher is better."""
        goal = self.objective.partition(":")[2]
        return goal == "max" if goal else not lower_is_better(self.figure)


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep that can be started.

    Args:
        root: The checkout.
        search: The search that proposes values.
        num_trials: Largest number of trials.
        to_stage: The stage that measures the objective.
    """

    root: Path
    search: Search
    num_trials: int
    to_stage: str


def prepare_sweep(root: Path, options: SweepOptions) -> PreparedSweep:
    """Check the options of a sweep before its first trial is started.

    Raises:
        RunRefused: A param, a value or the objective is not valid, or the code of the worktrees is not committed.
        ParamsError: params.yaml with the values is not valid.
    """
    dimensions = [parse_dimension(text) for text in options.params]
    search = open_search(options.search, dimensions, options.seed, options.maximize)
    to_stage = check_objective(root, options.figure, options.overrides)
    for dimension in dimensions:
        if flatten(overridden(options.overrides)).keys() & {dimension.name}:
            raise RunRefused(f"{dimension.name} is both varied and overridden; remove one of the two")
        for value in dimension.examples():
            prepare_run(root, None, to_stage, with_values(options.overrides, {dimension.name: value}))
    if options.write_to is not None and not (root / options.write_to).parent.is_dir():
        raise RunRefused(f"the best values can't be written to {options.write_to}: the folder does not exist")
    combinations = math.prod(len(dimension.values) for dimension in dimensions)
    default = combinations if options.search == "grid" else NUM_TRIALS
    return PreparedSweep(root, search, options.trials or default, to_stage)


def check_objective(root: Path, objective: str, overrides: Overrides) -> str:
    """Return the stage that measures an objective.

    Raises:
        RunRefused: There is no such stage, or `evaluate` has no such figure.
    """
    stage, _, figure = objective.partition(".")
    names = prepare_run(root, None, None, Overrides()).plan.names
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
