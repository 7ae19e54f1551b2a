"""A sweep in MLflow: one parent run, and below it one run for the result of each trial."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import read_json, write_json
from stages.checkout.paths import Paths
from stages.params.schema import load_params
from stages.tracking import lineage
from stages.tracking.lineage import machine_tags
from stages.tracking.result import record_result, result_files
from stages.tracking.store import KIND_TAG, PROGRESS_TAG, SWEEP, TRAINING_TAG, RunWriter, Tracking, open_tracking

LEADERBOARD = "leaderboard.json"


@contextmanager
def recorded_sweep(root: Path, name: str, facts: Mapping[str, Any]) -> Iterator[SweepRecord]:
    """A parent run for the time of a sweep, finished when the block ends and failed when it raises.

    Args:
        root: The checkout; its params.yaml says where runs are recorded.
        name: Name of the parent run.
        facts: What the sweep was asked for; they become its params.

    Raises:
        ValueError: The tracking store can't be used.
    """
    with open_store(root).whole_run(name, {KIND_TAG: SWEEP}) as parent:
        parent.log_params(facts)
        yield SweepRecord(parent)


@dataclass(frozen=True)
class SweepRecord:
    """The parent run of a sweep."""

    parent: RunWriter

    def log_leaderboard(self, rows: list[dict[str, Any]], best: Mapping[str, Any]) -> None:
        """Keep the table with the run, and the best trial's values and score as its own.

        Args:
            rows: The trials, the best first.
            best: Param -> value of the best one; empty when every trial failed.
        """
        if best:
            self.parent.log_params({f"best.{name}": value for name, value in best.items()})
            self.parent.log_metrics({"best.objective": float(rows[0]["objective"])})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / LEADERBOARD
            write_json(file, rows)
            self.parent.log_file(file, folder="")


def log_trial(root: Path, parent_run: str, name: str, figures: Mapping[str, float], origin: Mapping[str, str]) -> str:
    """Record one trial's result as a child of its sweep.

    A whole result is the very run that `publish` would write, and is found by it when the trial is promoted. One result
    stays one run: if it was recorded before, that run is named and no second one is made.

    Args:
        root: The checkout that the trial ran in.
        parent_run: The sweep's run.
        name: For a trial that ends before `evaluate`, whose run has only params and figures.
        figures: `<stage>.<metric>` of the stages that ran.
        origin: Tags that say who ran them.

    Returns:
        The run's id.
    """
    params, paths, tracking = load_params(root / "params.yaml"), Paths(root), open_store(root)
    tags = {lineage.PARENT_TAG: parent_run, **origin}
    trained = paths.out("train", "curve.csv").exists()
    if "evaluate.gate_passed" not in figures:
        begun = tracking.find_unfinished(TRAINING_TAG, lineage.training_digest(params, paths)) if trained else []
        loaded = paths.out("load", "card.json").exists()
        circumstances = {**lineage.circumstances(paths), **machine_tags()} if loaded else {}
        tags = {**circumstances, **tags, PROGRESS_TAG: "ended before the evaluation"}
        with tracking.whole_run(name, tags, begun[0] if begun else None) as run:
            run.log_params(lineage.result_params(params))
            run.log_metrics(figures)
            run.log_data(lineage.data_digests(paths) if loaded else {})
        return run.run_id
    digest = lineage.result_digest(params, paths, result_files(paths))
    passed = read_json(paths.out("evaluate", "results.json"))["passed"]
    return record_result(tracking, params, paths, digest, passed, tags)


def open_store(root: Path) -> Tracking:
    """The store that the params.yaml of a checkout names."""
    return open_tracking(load_params(root / "params.yaml").publish, lineage.main_checkout(root))
