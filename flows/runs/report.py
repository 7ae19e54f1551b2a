"""Prefect artifacts of a run: progress of its stages, and at the end a table and a page with the outcome."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.logging import get_run_logger

from flows.runs.dvc_stage import Outcome
from flows.runs.forms import flatten, read_mapping
from flows.runs.table import publish_table
from stages.checkout.foreign_text import as_code, as_code_block, for_markdown
from stages.checkout.redaction import redact
from stages.progress import Report, describe_figures

UPDATE_INTERVAL_S = 2.0
NUM_HEADLINES = 4


@dataclass(frozen=True)
class Row:
    """One stage's row in the final table."""

    stage: str
    outcome: Outcome
    seconds: float | None = None
    headline: str = ""


class ProgressBar:
    """Progress artifact of a stage, updated at most every two seconds."""

    def __init__(self, stage: str) -> None:
        self.text = ""
        self._stage = stage
        self._artifact: UUID | None = None
        self._updated, self._is_complete = 0.0, False

    def show(self, report: Report) -> None:
        """Show one report; the first and the last of a part and points of a curve are always shown."""
        finished = report.done >= report.total
        urgent = report.point or (finished and not self._is_complete)
        self._is_complete = finished
        if self._artifact is not None and not urgent and time.monotonic() - self._updated < UPDATE_INTERVAL_S:
            return
        percent = 100.0 * min(report.done, report.total) / max(report.total, 1)
        head = f"{self._stage}: {report.done} of {report.total} {report.part}".rstrip()
        text = ", ".join(part for part in (head, report.detail(), describe_figures(report.figures)) if part)
        self.text = report.text
        get_run_logger().info(text)
        self._updated = time.monotonic()
        if self._artifact is None:
            created = create_progress_artifact(percent, key=f"progress-{self._stage}", description=text)
            assert isinstance(created, UUID)
            self._artifact = created
        else:
            update_progress_artifact(self._artifact, percent, description=text)


def read_figures(root: Path, stages: list[str]) -> dict[str, float]:
    """Return the figures of stages by `<stage>.<metric>`, the names that they have in MLflow."""
    figures: dict[str, float] = {}
    for stage in stages:
        path = root / "reports" / "metrics" / f"{stage}.json"
        if path.exists():
            flat = flatten(json.loads(path.read_text(encoding="utf-8")), f"{stage}.")
            figures |= {name: float(value) for name, value in flat.items() if isinstance(value, (int, float))}
    return figures


def read_headline(root: Path, stage: str) -> str:
    """Return a stage's main figures: those named in its params (by a gate), or else the first of its metrics file."""
    path = root / "reports" / "metrics" / f"{stage}.json"
    if not path.exists():
        return ""
    figures = flatten(json.loads(path.read_text(encoding="utf-8")))
    numbers = {name: value for name, value in figures.items() if type(value) in (int, float)}
    params = json.dumps(read_mapping(root / "params.yaml").get(stage, {}))
    named = [name for name in numbers if "." in name and re.search(rf"\b{re.escape(name)}\b", params)]
    return ", ".join(f"{name} {_figure(numbers[name])}" for name in (named or list(numbers))[:NUM_HEADLINES])


def _figure(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


@dataclass
class RunReport:
    """The outcome of a run.

    Args:
        overrides: The values that override params.yaml, by dotted name.
        rows: One row per stage.
    """

    overrides: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def summary(self) -> str:
        """Count the outcomes, such as `2 completed, 6 unchanged`."""
        counts = {outcome: sum(row.outcome is outcome for row in self.rows) for outcome in Outcome}
        return ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items() if count)

    def text_table(self) -> str:
        """Return the table for a terminal."""
        cells = [("stage", "outcome", "seconds", "figures"), *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(3)]
        return "\n".join(
            f"{stage:<{widths[0]}}  {outcome:<{widths[1]}}  {seconds:>{widths[2]}}  {figures}".rstrip()
            for stage, outcome, seconds, figures in cells
        )

    def publish(self, problem: str | None) -> None:
        """Publish the outcome as a table artifact and a markdown artifact."""
        table = [dict(zip(("stage", "outcome", "seconds", "figures"), _cells(row), strict=True)) for row in self.rows]
        publish_table(table, "pipeline-stages", self.summary())
        create_markdown_artifact(self.markdown(problem), key="pipeline-report", description=self.summary())

    def markdown(self, problem: str | None) -> str:
        """Return the page with outcome, table, overrides and how to adopt the result."""
        lines = [f"## {self.summary()}", ""]
        if problem:
            lines += [as_code_block(problem), ""]
        lines += ["| stage | outcome | seconds | figures |", "|---|---|---:|---|"]
        lines += ["| " + " | ".join(map(for_markdown, _cells(row))) + " |" for row in self.rows]
        if self.overrides:
            lines += ["", "### Overrides", "", "| param | value |", "|---|---|"]
            lines += [
                f"| {as_code(name, in_table=True)} | {as_code(json.dumps(value), in_table=True)} |"
                for name, value in self.overrides.items()
            ]
            lines += ["", "To adopt this result, put these values into params.yaml and run the pipeline again:"]
            lines += ["everything, reports/report.html included, is then restored from the cache."]
        return redact("\n".join(lines) + "\n")


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.stage, str(row.outcome), "" if row.seconds is None else f"{row.seconds:.1f}", row.headline
