"""`sweep`: a Prefect flow, and `python -m flows.sweep`, that runs the pipeline with other params and ranks the results.

Each trial works in a separate git worktree and shares DVC's cache, so that stages which depend on no param of the sweep
run once. Trials run one after the other, because they would share one device.
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
    flatten,
    overridden,
    parse_assignments,
    with_values,
)
from flows.runs.graph import RunRefused
from flows.runs.report import RunReport, read_figures
from flows.runs.run import flow_run_variables, prepare_run, prune_worktrees, run_plan, workplace
from flows.sweeps.leaderboard import Leaderboard, Trial
from flows.sweeps.plan import (
    DEFAULT_OBJECTIVE,
    NUM_TRIALS,
    DimensionText,
    Kind,
    ObjectiveText,
    PreparedSweep,
    SweepOptions,
    prepare_sweep,
)
from flows.sweeps.search import FORM
from stages.checkout.artifacts import write_text
from stages.params.assignments import apply_overrides
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
    """Run one trial: the stages up to the one that measures the objective, in a worktree.

    Args:
        number: Number of the trial, from 1.
        values: Values of the varied params.
        overrides: The same values, and the overrides of all trials.
        to_stage: The last stage.
        parent_run: Id of the sweep's run in MLflow.
    """
    started = time.monotonic()
    report = RunReport(flatten(overridden(overrides)))
    figures, run_id = {}, ""
    try:
        prepared = prepare_run(Path.cwd().resolve(), None, to_stage, overrides)
        with workplace(prepared) as (folder, variables):
            problem = run_plan(folder, prepared.plan, False, report, {**variables, PARENT_VARIABLE: parent_run})
            if problem is None:
                figures = read_figures(folder, prepared.plan.names)
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
    """Return the name of a flow run: the params that it varies."""
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
    """Run the pipeline with other values of params, rank the results, and optionally publish the best one.

    Args:
        params: The params to vary, one per line: `train.learning_rate=1e-3,2e-3` for values,
            `train.learning_rate=1e-4..1e-2:log` for a range that is sampled log-uniformly.
        search: `grid` tries every combination of values, `random` samples, `optuna` samples near good earlier trials.
        trials: Number of trials. Empty: all combinations of a grid, else ten.
        objective: The figure that ranks trials, `stage.metric` as in MLflow. Lower is better for losses and sizes,
            higher for everything else; a suffix `:min` or `:max` overrides this. Stages after its stage are not run.
        overrides: Values that replace those of params.yaml in every trial.
        seed: Seed of the sampling.
        promote: Publish the best trial's result. The alias `champion` moves only if the gate is open.
        write_to: File to write params.yaml with the best values to, which may be `params.yaml` itself. Empty: none.
    """
    options = SweepOptions(tuple(params), search, trials, objective, overrides, seed, write_to)
    try:
        prepared = prepare_sweep(Path.cwd().resolve(), options)
        board = run_trials(prepared, options)
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


def run_trials(prepared: PreparedSweep, options: SweepOptions) -> Leaderboard:
    """Run the trials one after the other; a failed trial is listed, and the sweep continues.

    Raises:
        RunRefused: A successful trial did not measure the objective.
        ValueError: The tracking store can't be used.
    """
    board = Leaderboard(options.figure, options.maximize)
    facts = {
        "search": options.search,
        "objective": options.objective,
        "seed": options.seed,
        "params": list(options.params),
    }
    with recorded_sweep(prepared.root, str(runtime.flow_run.name), facts) as record:
        while len(board.trials) < prepared.num_trials and (values := prepared.search.propose()) is not None:
            number = len(board.trials) + 1
            overrides = with_values(options.overrides, values)
            state: State[Any] = trial(
                number, values, overrides, prepared.to_stage, record.parent.run_id, return_state=True
            )
            done = state.result(raise_on_failure=False)
            # a trial that raised returns its exception instead of a Trial
            board.trials.append(done if isinstance(done, Trial) else Trial(number, values, problem=str(state.message)))
            check_measured(board.trials[-1], options.figure)
            prepared.search.tell(board.score(board.trials[-1]))
            get_run_logger().info(f"trial {number} of {prepared.num_trials}: {board.summary()}")
            board.publish()  # after every trial, for readers of the page and in case the sweep is cancelled
        record.log_leaderboard(board.rows(), board.best.values if board.best else {})
    return board


def check_measured(done: Trial, objective: str) -> None:
    """Check that a successful trial measured the objective.

    Raises:
        RunRefused: It did not.
    """
    if done.problem is None and objective not in done.figures:
        stage = objective.partition(".")[0]
        known = [name for name in done.figures if name.startswith(f"{stage}.")]
        raise RunRefused(f"objective {objective!r}: `{stage}` measures {', '.join(known) or 'nothing'}")


def write_best(root: Path, target: str, overrides: Overrides, best: Trial) -> None:
    """Write params.yaml with the best values, and its comments, to a file."""
    values = overridden(with_values(overrides, best.values))
    text = apply_overrides((root / "params.yaml").read_text(encoding="utf-8"), values)
    write_text(root / target, text)
    print(f"wrote the best values to {root / target}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run a sweep in this terminal.

    Returns:
        0 on success, 1 if no trial succeeded, 2 if the arguments are not valid, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=__doc__)
    parser.add_argument("--param", action="append", default=[], metavar="DIMENSION", help=f"a param to vary: {FORM}")
    parser.add_argument("--search", choices=get_args(Kind), default="grid")
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"number of trials (default: all combinations of a grid, else {NUM_TRIALS})",
    )
    parser.add_argument(
        "--objective", default=DEFAULT_OBJECTIVE, metavar="STAGE.FIGURE[:min|:max]", help="default: %(default)s"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a value in every trial"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument(
        "--promote", action="store_true", help="publish the best result; the gate decides whether it becomes champion"
    )
    parser.add_argument("--write", metavar="FILE", help="write params.yaml with the best values here")
    args = parser.parse_args(argv)
    if args.trials is not None and args.trials < 1:
        parser.error(f"--trials {args.trials}: at least one")
    try:
        overrides = parse_assignments(args.set)
        options = SweepOptions(
            tuple(args.param), args.search, args.trials, args.objective, overrides, args.seed, args.write
        )
        prepare_sweep(Path.cwd().resolve(), options)
    except (RunRefused, ParamsError) as refusal:
        return refuse(refusal)
    arguments = {**vars(options), "params": list(options.params), "promote": args.promote}
    return run_in_terminal(lambda: sweep(**arguments, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
