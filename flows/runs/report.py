"""Prefect artifacts of a run: progress of its stages, and at the end a table and a page with the outcome."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.logging import get_run_logger

from flows.runs.dvc_stage import Outcome
from flows.runs.forms import flatten, read_mapping
from flows.runs.table import publish_table
from stages.checkout.foreign_text import as_code, as_code_block, for_markdown
from stages.checkout.redaction import redact
from stages.progress import FIGURES_SHOWN, Report, describe_figures

UPDATE_INTERVAL_S, CURVE_INTERVAL_S = 2.0, 10.0
BARS, NUM_BARS, NUM_POINTS = "▁▂▃▄▅▆▇█", 40, 12
NUM_HEADLINES = 4
COMPARISON = "compared-with-champion"
"""Key of the artifact that compares the result with the champion before it."""


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


class CurvePage:
    """Artifact with the curve of a training while it trains: a line of bars, and the last points as a table.

    It is created at the first point, and updated at most every ten seconds and after the last step.

    Args:
        stage: The stage, whose points are shown if it has any.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._points: dict[int, dict[str, float]] = {}
        self._artifact: UUID | None = None
        self._updated = 0.0

    def show(self, report: Report) -> None:
        """Add a report to the curve if it is a point."""
        if not report.point:
            return
        self._points[report.done] = dict(report.figures)
        is_last = report.done >= report.total
        if self._artifact is not None and not is_last and time.monotonic() - self._updated < CURVE_INTERVAL_S:
            return
        self._updated = time.monotonic()
        text, title = curve_markdown(self._points), f"{self._stage}: step {report.done} of {report.total}"
        self._artifact = put_page(self._artifact, f"curve-{self._stage}", text, title)


class Pages:
    """Artifacts with the pages that a stage shows while it runs, such as the answers of a training.

    Args:
        stage: The stage.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._artifacts: dict[str, UUID] = {}

    def show(self, name: str, text: str) -> None:
        """Show a page, or replace the one with this name."""
        title = f"{self._stage}: {name}"
        self._artifacts[name] = put_page(self._artifacts.get(name), f"{name}-{self._stage}", text, title)


def put_page(artifact: UUID | None, key: str, text: str, title: str) -> UUID:
    """Create an artifact of Markdown, or update one; return its id."""
    if artifact is not None:
        with get_client(sync_client=True) as client:
            client.update_artifact(artifact, ArtifactUpdate(data=text, description=title))
        return artifact
    created = create_markdown_artifact(text, key=key, description=title)
    assert isinstance(created, UUID)
    return created


def curve_markdown(points: Mapping[int, Mapping[str, float]]) -> str:
    """Return the losses as bars, and the last points as a table.

    Args:
        points: Step -> figures.
    """
    lines = []
    for name in ("loss", "eval_loss"):
        values = [figures[name] for figures in points.values() if name in figures]
        if values:
            lines += [f"{FIGURES_SHOWN[name][0]}: `{bars(values)}` {values[0]:.4f} to {values[-1]:.4f}", ""]
    names = [name for name in FIGURES_SHOWN if any(name in figures for figures in points.values())]
    lines += [f"| step | {' | '.join(FIGURES_SHOWN[name][0] for name in names)} |", "|---:" * (len(names) + 1) + "|"]
    for step, figures in list(points.items())[-NUM_POINTS:]:
        cells = [format(figures[name], FIGURES_SHOWN[name][1]) if name in figures else "" for name in names]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bars(values: Sequence[float]) -> str:
    """Return values as at most 40 bars, the lowest and the highest at the ends of the scale."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    step = max(1, math.ceil(len(finite) / NUM_BARS))
    chosen = [*finite[::step], *([finite[-1]] if (len(finite) - 1) % step else [])]
    low, high = min(chosen), max(chosen)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in chosen)


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
        comparison: The result beside the champion before it, as Markdown; None if it is compared with nothing.
    """

    overrides: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    comparison: str | None = None

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
        """Publish the outcome as a table artifact and a markdown artifact, and the comparison as another."""
        table = [dict(zip(("stage", "outcome", "seconds", "figures"), _cells(row), strict=True)) for row in self.rows]
        publish_table(table, "pipeline-stages", self.summary())
        create_markdown_artifact(self.markdown(problem), key="pipeline-report", description=self.summary())
        if self.comparison is not None:
            create_markdown_artifact(redact(self.comparison), key=COMPARISON, description="compared with the champion")

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
