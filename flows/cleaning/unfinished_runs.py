"""Runs in MLflow whose training can't be resumed once its checkpoints are gone: they end together with these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flows.cleaning.leftovers import FINISHED, Leftover
from stages.checkout.artifacts import read_json
from stages.params.schema import load_params
from stages.tracking.lineage import main_checkout
from stages.tracking.live_run import KEY_FILE, KEY_TAG
from stages.tracking.store import PROGRESS_TAG, Tracking, open_tracking


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that is still going by its status, and whose training nobody can go on with.

    Args:
        run_id: Its id.
        name: What it is called.
        why: Why its checkpoints go.
    """

    run_id: str
    name: str
    why: str


def find_unfinished_runs(root: Path, leftovers: Iterable[Leftover]) -> tuple[Tracking | None, list[UnfinishedRun]]:
    """The runs that were begun by trainings whose checkpoints are among what can go.

    Args:
        root: The checkout.
        leftovers: What can go.

    Returns:
        The store and the runs; None and none when no such training has begun a run.

    Raises:
        ValueError: The tracking store can't be used, or a key is damaged.
    """
    begun = [one for one in leftovers if (one.path / KEY_FILE).exists() and not (one.path / FINISHED).exists()]
    if not begun:
        return None, []
    tracking = open_tracking(load_params(root / "params.yaml").publish, main_checkout(root))
    found = []
    for one in begun:
        for run_id in tracking.find_unfinished(KEY_TAG, str(read_json(one.path / KEY_FILE)["key"])):
            run = tracking.client.get_run(run_id)
            if run.info.status == "RUNNING":
                found.append(UnfinishedRun(run_id, run.info.run_name, one.why))
    return tracking, found


def end_unfinished_runs(tracking: Tracking, runs: Iterable[UnfinishedRun]) -> None:
    """Mark them as killed, with the reason in the tag that says how far a run came."""
    for run in runs:
        tracking.client.set_tag(run.run_id, PROGRESS_TAG, f"given up, its checkpoints were removed: {run.why}")
        tracking.client.set_terminated(run.run_id, "KILLED")
