"""`pipeline`: a Prefect flow, and `python -m flows.pipeline`, that runs the stages of dvc.yaml.

The flow adds to `dvc repro` retries, cancellation, schedules, forms, progress and a record of runs. DVC decides which
stages must run and which results come from its cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flows.processes.environment import prepare_prefect

prepare_prefect()

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.processes.terminal import refuse, run_in_terminal
from flows.runs.basics import Basics, read_forms
from flows.runs.forms import Chosen, StageName, flatten, overridden, parse_assignments
from flows.runs.graph import RunRefused
from flows.runs.report import RunReport
from flows.runs.run import execute_run, prepare_run, prune_worktrees
from stages.params.schema import ParamsError


def describe_run() -> str:
    """Return the name of a flow run: its stages, its overrides, and whether it is forced."""
    parameters = runtime.flow_run.parameters
    stages = [parameters.get("from_stage"), parameters.get("to_stage")]
    span = f"{stages[0] or 'start'} to {stages[1] or 'end'}" if any(stages) else "all stages"
    try:
        values = overridden(read_forms(parameters.get("overrides"), parameters.get("basics")))
    except RunRefused:  # the run itself will say so
        values = {}
    changes = ", ".join(f"{name}={json.dumps(value)}" for name, value in flatten(values).items())
    return " ".join(part for part in (span, changes, "forced" if parameters.get("force") else "") if part)[:200]


@flow(
    name="pipeline",
    flow_run_name=describe_run,
    persist_result=False,
    on_crashed=[prune_worktrees],
    on_cancellation=[prune_worktrees],
)
def pipeline(
    basics: Basics = Basics(),  # noqa: B008  (frozen)
    overrides: Chosen = None,
    from_stage: StageName = None,
    to_stage: StageName = None,
    force: bool = False,
) -> State[Any]:
    """Bring the pipeline of dvc.yaml up to date, stage by stage.

    Args:
        basics: The values that are changed most often, as params.yaml had them when the form was made. What is not
            changed here stays as it is in params.yaml.
        overrides: Advanced, any value of params.yaml for this run only; choose `Overrides`, then a section. The
            checkout does not change: the run works on a copy of the last commit and shares the cache.
        from_stage: Run this stage and those that depend on it; earlier results are used as they are. Empty: from the
            first stage.
        to_stage: Run this stage and those that it depends on. Empty: to the last stage.
        force: Run every stage, even if its result is in the cache.
    """
    report = RunReport({})
    try:
        overrides = read_forms(overrides, basics)
        report = RunReport(flatten(overridden(overrides)))
        prepared = prepare_run(Path.cwd().resolve(), from_stage, to_stage, overrides)
        problem = execute_run(prepared, force, report)
    except (RunRefused, ParamsError) as refusal:
        return Failed(message=str(refusal))
    report.publish(problem)
    print(report.text_table(), flush=True)
    return Failed(message=problem) if problem else Completed(message=report.summary())


def main(argv: list[str] | None = None) -> int:
    """Run the flow in this terminal, with the Prefect server of `make ui` or else a temporary one.

    Returns:
        0 on success, 1 if a stage failed, 2 if the arguments are not valid, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=pipeline.description)
    parser.add_argument("--from-stage", metavar="STAGE", help="start here; earlier results are used as they are")
    parser.add_argument("--to-stage", metavar="STAGE", help="stop after this stage")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a value of params.yaml"
    )
    parser.add_argument("--force", action="store_true", help="run every stage, even if its result is in the cache")
    args = parser.parse_args(argv)
    try:
        overrides = parse_assignments(args.set)
        prepare_run(Path.cwd().resolve(), args.from_stage, args.to_stage, overrides)
    except (RunRefused, ParamsError) as refusal:
        return refuse(refusal)
    return run_in_terminal(
        lambda: pipeline(
            overrides=overrides,
            from_stage=args.from_stage,
            to_stage=args.to_stage,
            force=args.force,
            return_state=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
