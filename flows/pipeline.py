"""The pipeline as a Prefect flow, and `python -m flows.pipeline` for a plain shell.

A flow adds to `dvc repro` what DVC has not: retries, cancellation, schedules, forms, progress and a record of runs.
What must run, and what comes from the cache, is DVC's decision alone.
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
from flows.runs.forms import Overrides, StageName, flatten, overridden, parse_assignments
from flows.runs.graph import RunRefused
from flows.runs.report import RunReport
from flows.runs.run import ask, prune_worktrees, run_asked
from stages.params.schema import ParamsError


def describe_run() -> str:
    """Name of a flow run: what is special about it."""
    asked = runtime.flow_run.parameters
    stages = [asked.get("from_stage"), asked.get("to_stage")]
    span = f"{stages[0] or 'start'} to {stages[1] or 'end'}" if any(stages) else "all stages"
    overrides = asked.get("overrides") or {}
    values = overrides if isinstance(overrides, dict) else overridden(overrides)
    changes = ", ".join(f"{name}={json.dumps(value)}" for name, value in flatten(values).items())
    return " ".join(part for part in (span, changes, "forced" if asked.get("force") else "") if part)[:200]


@flow(
    name="pipeline",
    flow_run_name=describe_run,
    persist_result=False,
    on_crashed=[prune_worktrees],
    on_cancellation=[prune_worktrees],
)
def pipeline(
    from_stage: StageName = None,
    to_stage: StageName = None,
    overrides: Overrides = Overrides(),  # noqa: B008  (frozen)
    force: bool = False,
) -> State[Any]:
    """Bring the pipeline of dvc.yaml up to date, stage by stage.

    Args:
        from_stage: Start here and run what depends on it; what lies before is taken as it is. Empty: from the start.
        to_stage: Run this stage and what it needs, nothing behind it. Empty: to the end.
        overrides: Values that replace those of params.yaml for this run only. The checkout is not touched: the run
            works on a copy of the last commit and shares the cache.
        force: Run every stage, also when its result is known.
    """
    report = RunReport(flatten(overridden(overrides)))
    try:
        asked = ask(Path.cwd().resolve(), from_stage, to_stage, overrides)
        problem = run_asked(asked, force, report)
    except (RunRefused, ParamsError) as refusal:
        return Failed(message=str(refusal))
    report.publish(problem)
    print(report.text_table(), flush=True)
    return Failed(message=problem) if problem else Completed(message=report.summary())


def main(argv: list[str] | None = None) -> int:
    """Run the flow in this terminal, with the server of `make ui` when there is one, else with one of its own.

    Returns:
        0 on success, 1 when a stage failed, 2 when the run can't be started as asked, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=pipeline.description)
    parser.add_argument("--from-stage", metavar="STAGE", help="start here; what lies before is taken as it is")
    parser.add_argument("--to-stage", metavar="STAGE", help="stop behind this stage")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a value of params.yaml"
    )
    parser.add_argument("--force", action="store_true", help="run every stage, also when its result is known")
    args = parser.parse_args(argv)
    try:
        overrides = parse_assignments(args.set)
        ask(Path.cwd().resolve(), args.from_stage, args.to_stage, overrides)
    except (RunRefused, ParamsError) as refusal:
        return refuse(refusal)
    return run_in_terminal(lambda: pipeline(args.from_stage, args.to_stage, overrides, args.force, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
