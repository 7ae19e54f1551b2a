"""A sweep in MLflow: one parent run, with one child run for the result of each trial."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import read_json, write_json
from stages.checkout.paths import Paths, main_checkout
from stages.params.schema import load_params
from stages.tracking import lineage
from stages.tracking.lineage import machine_tags
from stages.tracking.result import Result, record_result
from stages.tracking.store import KIND_TAG, PROGRESS_TAG, SWEEP, TRAINING_TAG, RunWriter, Tracking, open_tracking

LEADERBOARD = "leaderboard.json"


@contextmanager
def recorded_sweep(root: Path, name: str, facts: Mapping[str, Any]) -> Iterator[SweepRecord]:
    """Create the parent run of a sweep; it is finished when the block ends, and failed if the block raises.

    Args:
        root: The checkout; its params.yaml states where runs are recorded.
        name: Name of the parent run.
        facts: Settings of the sweep, logged as params of the run.

    Yields:
        The record of the sweep.

    Raises:
        ValueError: The tracking store can't be used.
    """
    tracking = open_store(root)
    with tracking.locked():
        tracking.end_interrupted()
    with tracking.whole_run(name, {KIND_TAG: SWEEP}) as parent:
        parent.log_params(facts)
        yield SweepRecord(parent)


@dataclass(frozen=True)
class SweepRecord:
    """The parent run of a sweep.

    Args:
        parent: Writes into the run.
    """

    parent: RunWriter

    def log_leaderboard(self, rows: list[dict[str, Any]], best: Mapping[str, Any]) -> None:
        """Log the table of trials, and the params and objective of the best one.

        Args:
            rows: The trials, the best one first.
            best: Param -> value of the best one; empty if all trials failed.
        """
        if best:
            self.parent.log_params({f"best.{name}": value for name, value in best.items()})
            self.parent.log_metrics({"best.objective": float(rows[0]["objective"])})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / LEADERBOARD
            write_json(file, rows)
            self.parent.log_file(file, folder="")


def log_trial(root: Path, parent_run: str, name: str, figures: Mapping[str, float], origin: Mapping[str, str]) -> str:
    """Record the result of one trial as a child run of its sweep.

    A complete result gives the run that `publish` would write; `publish` finds it when the trial is promoted. If the
    same result was recorded before, its run is returned and no second one is created. A trial that ends before
    `evaluate` gives a run with params and metrics only.

    Args:
        root: The checkout that the trial ran in.
        parent_run: Id of the run of the sweep.
        name: Name of the run of a trial that ends before `evaluate`.
        figures: `<stage>.<metric>` -> value for the stages that ran.
        origin: Tags that name the flow run.

    Returns:
        Id of the run.
    """
    params, paths, tracking = load_params(root / "params.yaml"), Paths(root), open_store(root)
    tags = {lineage.PARENT_TAG: parent_run, **origin}
    trained = paths.out("train", "curve.csv").exists()
    if "evaluate.gate_passed" not in figures:
        begun = tracking.find_unfinished(TRAINING_TAG, lineage.training_digest(params, paths)) if trained else []
        loaded = paths.out("load", "card.json").exists()
        circumstances = {**lineage.circumstances(paths), **machine_tags()} if loaded else {}
        tags = {**circumstances, **tags, PROGRESS_TAG: "ended before the evaluation"}
        with tracking.locked(), tracking.whole_run(name, tags, begun[0] if begun else None) as run:
            run.log_params(lineage.result_params(params))
            run.log_metrics(figures)
            run.log_data(lineage.data_digests(paths) if loaded else {})
        return run.run_id
    passed = read_json(paths.out("evaluate", "results.json"))["passed"]
    return record_result(tracking, Result(params, paths, passed, tags))


def open_store(root: Path) -> Tracking:
    """Open the tracking store that the params.yaml of a checkout names."""
    return open_tracking(load_params(root / "params.yaml").publish, main_checkout(root))
