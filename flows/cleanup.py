"""`cleanup`: a Prefect flow, and `python -m flows.cleanup`, that frees disk space.

Without `--remove` it only lists what could be removed. It keeps every result to which the checkout, a git commit or a
run in MLflow refers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Annotated, Any

from flows.processes.environment import prepare_prefect

prepare_prefect()

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from flows.cleaning.cache import clean_cache
from flows.cleaning.leftovers import end_unfinished_runs, find_leftovers, find_unfinished_runs, remove_leftovers
from flows.processes.terminal import run_in_terminal
from flows.runs.graph import RunRefused
from flows.runs.table import publish_table

KEEP_DAYS = 14


@flow(name="cleanup", persist_result=False)
def cleanup(
    remove: bool = False, keep_days: Annotated[float, Field(ge=0)] = KEEP_DAYS, cache: bool = True
) -> State[Any]:
    """Find files that are no longer needed, and optionally remove them.

    Args:
        remove: Remove them, and end the runs in MLflow whose training can't be resumed without them. Off: only list
            them.
        keep_days: Days for which checkpoints of unfinished trainings and logs are kept.
        cache: Also remove files of DVC's cache to which no checkout, git commit or recorded run in MLflow refers.
    """
    root = Path.cwd().resolve()
    leftovers = find_leftovers(root, keep_days)
    rows = [(str(one.path.relative_to(root)), one.why, one.num_bytes) for one in leftovers]
    try:
        tracking, runs = find_unfinished_runs(root, leftovers)
        rows += [(f"run {run.name} in MLflow", "ends as KILLED with its checkpoints", 0) for run in runs]
        if cache:
            unreferenced = clean_cache(root, dry=not remove)
            if unreferenced.num_objects:
                why = f"{unreferenced.num_objects} files that no commit and no recorded run refers to"
                rows.append(("DVC's cache", why, unreferenced.num_bytes))
    except (RunRefused, ValueError) as refusal:
        return Failed(message=str(refusal))
    if remove:
        if tracking is not None:
            end_unfinished_runs(tracking, runs)
        remove_leftovers(root, leftovers)
    summary = summarize(rows, remove)
    shown = [{"what": what, "why": why, "MB": f"{num_bytes / 1e6:.1f}"} for what, why, num_bytes in rows]
    publish_table(shown, "cleanup", summary)
    print("\n".join([*(f"{row['MB']:>10} MB  {row['what']}: {row['why']}" for row in shown), summary]), flush=True)
    return Completed(message=summary)


def summarize(rows: list[tuple[str, str, int]], removed: bool) -> str:
    """Summarize in one line what was found."""
    if not rows:
        return "nothing to clean up"
    megabytes = sum(num_bytes for _, _, num_bytes in rows) / 1e6
    hint = "" if removed else "; nothing was removed, use `--remove`"
    return f"{megabytes:.1f} MB {'removed' if removed else 'can be removed'}{hint}"


def main(argv: list[str] | None = None) -> int:
    """Run the cleanup in this terminal.

    Returns:
        0 on success, 1 if it failed, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.cleanup", description=__doc__)
    parser.add_argument("--remove", action="store_true", help="remove files; without this, only list them")
    parser.add_argument(
        "--keep-days",
        type=float,
        default=KEEP_DAYS,
        metavar="DAYS",
        help="days for which unfinished trainings and logs are kept (default: %(default)s)",
    )
    parser.add_argument("--no-cache", action="store_true", help="don't look at DVC's cache")
    args = parser.parse_args(argv)
    if args.keep_days < 0:
        parser.error(f"--keep-days {args.keep_days}: at least 0")
    return run_in_terminal(
        lambda: cleanup(remove=args.remove, keep_days=args.keep_days, cache=not args.no_cache, return_state=True)
    )


if __name__ == "__main__":
    sys.exit(main())
