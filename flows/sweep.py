"""Trials of the pipeline with other params, ranked: a Prefect flow, and `python -m flows.sweep` for a plain shell.

Each trial works in a git worktree of its own and shares DVC's cache, so that stages which no param of the sweep touches
run once. Trials take turns: they would share one device.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Annotated, Any, get_args

from flows.processes.environment import prepare_prefect

prepare_prefect()

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from pydantic import Field

from flows.pipeline import pipeline
from flows.processes.terminal import refuse, run_in_terminal
from flows.runs.forms import (
    Overrides,
    apply_overrides,
    flatten,
    overridden,
    parse_assignments,
    with_values,
)
from flows.runs.graph import RunRefused
from flows.runs.report import RunReport, read_figures
from flows.runs.run import ask, flow_run_variables, prune_worktrees, run_plan, workplace
from flows.sweeps.leaderboard import Leaderboard, Trial
from flows.sweeps.plan import (
    DEFAULT_OBJECTIVE,
    NUM_TRIALS,
    DimensionText,
    Kind,
    ObjectiveText,
    Prepared,
    SweepAsked,
    prepare,
)
from flows.sweeps.search import FORM
from stages.checkout.artifacts import write_text
from stages.params.schema import ParamsError
from stages.tracking.lineage import FLOW_RUN_VARIABLES, PARENT_VARIABLE
from stages.tracking.trials import log_trial, recorded_sweep


@flow(
    name="trial",
    flow_run_name="trial {number}",
    persist_result=False,
    on_crashed=[prune_worktrees],
    on_cancellation=[prune_worktrees],
)
def trial(number: int, values: dict[str, Any], overrides: Overrides, to_stage: str, parent_run: str) -> State[Any]:
    """One trial: the stages up to the one that measures the objective, in a worktree.

    Args:
        number: Its number, from 1.
        values: What it tries.
        overrides: The same, and what holds for all trials.
        to_stage: The last stage.
        parent_run: The sweep's run in MLflow.
    """
    started = time.monotonic()
    report = RunReport(flatten(overridden(overrides)))
    figures, run_id = {}, ""
    try:
        asked = ask(Path.cwd().resolve(), None, to_stage, overrides)
        with workplace(asked) as (folder, variables):
            problem = run_plan(folder, asked.plan, False, report, {**variables, PARENT_VARIABLE: parent_run})
            if problem is None:
                figures = read_figures(folder, asked.plan.names)
                origin = {FLOW_RUN_VARIABLES[name]: value for name, value in flow_run_variables().items()}
                run_id = log_trial(folder, parent_run, f"trial-{number}", figures, origin)
    except (RunRefused, ParamsError) as refusal:
        problem = str(refusal)
    else:
        report.publish(problem)
    outcomes = tuple(row.outcome for row in report.rows)
    result = Trial(number, values, figures, outcomes, time.monotonic() - started, problem, run_id)
    return Failed(message=problem, data=result) if problem else Completed(message=report.summary(), data=result)


def describe_sweep() -> str:
    """Name of a flow run: what it varies."""
    return f"sweep {'; '.join(runtime.flow_run.parameters['params'])}"[:200]


@flow(name="sweep", flow_run_name=describe_sweep, persist_result=False)
def sweep(
    params: Annotated[list[DimensionText], Field(min_length=1)],
    search: Kind = "grid",
    trials: Annotated[int | None, Field(ge=1)] = None,
    objective: ObjectiveText = DEFAULT_OBJECTIVE,
    overrides: Overrides = Overrides(),  # noqa: B008  (frozen)
    seed: Annotated[int, Field(ge=0)] = 0,
    promote: bool = False,
    write_to: str | None = None,
) -> State[Any]:
    """Try other values of params, rank the results, and take over the best one when asked.

    Args:
        params: What is varied, one param a line: `train.learning_rate=1e-3,2e-3` for values,
            `train.learning_rate=1e-4..1e-2:log` for a range, drawn by its logarithm.
        search: `grid` tries every combination of values; `random` draws; `optuna` draws where earlier trials were good.
        trials: How many. Empty: all combinations of a grid, else ten.
        objective: The figure that ranks trials, `stage.metric` as in MLflow. Less of losses and sizes is better, more
            of everything else, unless `:min` or `:max` stands behind it. Stages behind its stage are not run.
        overrides: Values that replace those of params.yaml in every trial.
        seed: Of the draws.
        promote: Publish the best trial's result. The champion alias moves only if the gate lets it.
        write_to: Write params.yaml with the best values here; `params.yaml` itself may be named. Empty: nowhere.
    """
    asked = SweepAsked(tuple(params), search, trials, objective, overrides, seed, write_to)
    try:
        prepared = prepare(Path.cwd().resolve(), asked)
        board = run_trials(prepared, asked)
    except (RunRefused, ValueError) as refusal:
        return Failed(message=str(refusal))
    print(board.text(), flush=True)
    if board.best is None:
        return Failed(message=board.summary())
    if write_to is not None:
        write_best(prepared.root, write_to, overrides, board.best)
    if promote:
        state: State[Any] = pipeline(overrides=with_values(overrides, board.best.values), return_state=True)
        if not state.is_completed():
            return Failed(message=f"{board.summary()}; it could not be promoted: {state.message}")
    return Completed(message=board.summary())


def run_trials(prepared: Prepared, asked: SweepAsked) -> Leaderboard:
    """Run the trials one after the other; one that fails is listed, and the sweep goes on.

    Raises:
        RunRefused: The first trial that ended well has no such figure as the objective.
        ValueError: The tracking store can't be used.
    """
    board = Leaderboard(asked.figure, asked.maximize)
    facts = {"search": asked.search, "objective": asked.objective, "seed": asked.seed, "params": list(asked.params)}
    with recorded_sweep(prepared.root, str(runtime.flow_run.name), facts) as record:
        while len(board.trials) < prepared.num_trials and (values := prepared.search.propose()) is not None:
            number = len(board.trials) + 1
            overrides = with_values(asked.overrides, values)
            state: State[Any] = trial(
                number, values, overrides, prepared.to_stage, record.parent.run_id, return_state=True
            )
            done = state.result(raise_on_failure=False)
            # a crash of the trial's own process hands back no trial but what was raised
            board.trials.append(done if isinstance(done, Trial) else Trial(number, values, problem=str(state.message)))
            check_measured(board.trials[-1], asked.figure)
            prepared.search.tell(board.score(board.trials[-1]))
            get_run_logger().info(f"trial {number} of {prepared.num_trials}: {board.summary()}")
            board.publish()  # whoever opens the page meanwhile, or cancels the rest, has those that ended
        record.log_leaderboard(board.rows(), board.best.values if board.best else {})
    return board


def check_measured(done: Trial, objective: str) -> None:
    """Refuse to go on when the stage that should measure the objective does not."""
    if done.problem is None and objective not in done.figures:
        stage = objective.partition(".")[0]
        known = [name for name in done.figures if name.startswith(f"{stage}.")]
        raise RunRefused(f"objective {objective!r}: `{stage}` measures {', '.join(known) or 'nothing'}")


def write_best(root: Path, target: str, overrides: Overrides, best: Trial) -> None:
    """Write params.yaml with the best values where the user wants it, comments kept."""
    values = overridden(with_values(overrides, best.values))
    text = apply_overrides((root / "params.yaml").read_text(encoding="utf-8"), values)
    write_text(root / target, text)
    print(f"wrote the best values to {root / target}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run a sweep in this terminal.

    Returns:
        0 on success, 1 when no trial ended well, 2 when the sweep can't be started as asked, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=__doc__)
    parser.add_argument("--param", action="append", default=[], metavar="DIMENSION", help=f"what is varied: {FORM}")
    parser.add_argument("--search", choices=get_args(Kind), default="grid")
    parser.add_argument("--trials", type=int, metavar="N", help=f"default: all of a grid, else {NUM_TRIALS}")
    parser.add_argument(
        "--objective", default=DEFAULT_OBJECTIVE, metavar="STAGE.FIGURE[:min|:max]", help="default: %(default)s"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every trial")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--promote", action="store_true", help="publish the best result; the gate decides on champion")
    parser.add_argument("--write", metavar="FILE", help="write params.yaml with the best values here")
    args = parser.parse_args(argv)
    if args.trials is not None and args.trials < 1:
        parser.error(f"--trials {args.trials}: at least one")
    try:
        overrides = parse_assignments(args.set)
        asked = SweepAsked(
            tuple(args.param), args.search, args.trials, args.objective, overrides, args.seed, args.write
        )
        prepare(Path.cwd().resolve(), asked)
    except (RunRefused, ParamsError) as refusal:
        return refuse(refusal)
    options = {**vars(asked), "params": list(asked.params), "promote": args.promote}
    return run_in_terminal(lambda: sweep(**options, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
