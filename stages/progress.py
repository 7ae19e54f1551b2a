"""Progress of a stage: one live line in a terminal, plain lines in a pipe or file, JSON lines for a flow.

The stage reports `progress(done, total, part)`; what that looks like is decided here. SFT_PROGRESS replaces the choice.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TextIO

VARIABLE = "SFT_PROGRESS"
"""Environment variable that chooses a form of `FORMS`; flows set it to `events`."""

EVENT = "PROGRESS "
"""Start of a line with one `Report` as JSON."""

PAGE = "PAGE "
"""Start of a line with the name and the Markdown of a page as JSON."""

EVENT_INTERVAL_S = 0.5

LINE_INTERVAL_S, MAX_LINE_INTERVAL_S, LINE_INTERVAL_GROWTH = 5.0, 60.0, 0.05
"""Seconds between two plain lines: at least 5, then 5 % of the time since the part began, but at most 60."""

FIGURES_SHOWN: Mapping[str, tuple[str, str]] = {
    "loss": ("loss", ".4f"),
    "eval_loss": ("eval loss", ".4f"),
    "learning_rate": ("lr", ".2e"),
    "grad_norm": ("grad norm", ".3g"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "memory_gb": ("GB", ".1f"),
    "epoch": ("epoch", ".2f"),
}
"""Figures in the order in which they are shown: name -> text and format."""

BYTES_PER_MB = 1_000_000

UNIT_AFTER = ("tokens_per_second", "memory_gb")


@dataclass(frozen=True)
class Report:
    """State of a stage.

    Args:
        stage: Name of the stage.
        done: What is done of the part: rows, steps, blocks.
        total: How many there are.
        part: What is counted, such as `train rows`.
        text: What happens now, or the result.
        each_s: Seconds per row or step; None if unknown.
        left_s: Seconds until `total`; None if unknown.
        figures: Figures such as the loss, by name.
        point: Whether the figures are a point of the curve at step `done`.
    """

    stage: str
    done: int
    total: int
    part: str
    text: str = ""
    each_s: float | None = None
    left_s: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    point: bool = False

    def detail(self) -> str:
        """Return the rate, the time left and the text, with commas between them."""
        return ", ".join(part for part in (self.pace(), self.text) if part)

    def pace(self) -> str:
        """Return the rate and the time left; empty if they are unknown or nothing is left."""
        shown = []
        if self.done < self.total:
            if self.each_s is not None:
                shown.append(
                    f"{self.each_s:.1f} s each" if self.each_s >= 1 else f"{1 / max(self.each_s, 1e-6):,.4g}/s"
                )
            if self.left_s is not None:
                shown.append(f"{describe_seconds(self.left_s)} left")
        return ", ".join(shown)


def describe_figures(figures: Mapping[str, float]) -> str:
    """Return the figures of a training in one line, such as `loss 0.5432, lr 2.00e-04, 1,234 tokens/s`."""
    shown = []
    for name, (text, form) in FIGURES_SHOWN.items():
        if name in figures:
            value = format(figures[name], form)
            shown.append(f"{value} {text}" if name in UNIT_AFTER else f"{text} {value}")
    return ", ".join(shown)


def describe_seconds(seconds: float) -> str:
    """Return a duration: `42 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Display(Protocol):
    """What shows the reports of a stage."""

    def show(self, report: Report, important: bool) -> None:
        """Show a report.

        Args:
            report: The state.
            important: Whether it must be shown however soon it follows another one.
        """

    def close(self) -> None:
        """End the output."""


class Events:
    """Display that prints each report as a line of JSON, for a flow to read.

    Args:
        stream: Where the lines are written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._shown = stream, -math.inf

    def show(self, report: Report, important: bool) -> None:
        """Print the report, unless the last one was half a second ago."""
        if important or time.monotonic() - self._shown >= EVENT_INTERVAL_S:
            self._shown = time.monotonic()
            print(f"{EVENT}{json.dumps(asdict(report), ensure_ascii=False)}", file=self._stream, flush=True)

    def close(self) -> None:
        """Do nothing: each line is complete."""


class Lines:
    """Display that prints plain lines, more rarely the longer the part takes.

    Args:
        stream: Where the lines are written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._shown = stream, -math.inf
        self._part, self._began = "", 0.0

    def show(self, report: Report, important: bool) -> None:
        """Print the report if enough time has passed since the last line."""
        now = time.monotonic()
        if report.part != self._part:
            self._part, self._began = report.part, now
        wait = min(MAX_LINE_INTERVAL_S, max(LINE_INTERVAL_S, LINE_INTERVAL_GROWTH * (now - self._began)))
        if not important and now - self._shown < wait:
            return
        self._shown = now
        percent = f" ({100 * report.done // report.total} %)" if report.total else ""
        head = f"{report.stage}: {report.done} of {report.total} {report.part}".rstrip() + percent
        parts = (head, report.detail(), describe_figures(report.figures))
        print(", ".join(part for part in parts if part), file=self._stream, flush=True)

    def close(self) -> None:
        """Do nothing: each line is complete."""


class LiveLine:
    """Display that redraws one line of a terminal, with the figures below it; other output scrolls above it.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        # only where a terminal is, as the import takes a tenth of a second
        from rich.console import Console, Group, RenderableType
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
        from rich.table import Column
        from rich.text import Text

        class VisibleCursor(Console):
            """Console that leaves the cursor visible: a process that is killed could not bring it back."""

            def show_cursor(self, show: bool = True) -> bool:
                return False

        class WithFigures(Progress):
            """A bar with a line of figures below it."""

            def get_renderables(self) -> Iterator[RenderableType]:
                yield from super().get_renderables()
                for task in self.tasks:
                    if task.fields["figures"]:
                        yield Text(f"    {task.fields['figures']}", no_wrap=True, overflow="ellipsis")

        count = Column(no_wrap=True)
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._console = VisibleCursor(file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._progress = WithFigures(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.fields[stage]}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=max(6, self._console.width // 8)),
            TextColumn("{task.completed}/{task.total} {task.description}", markup=False, table_column=count),
            TextColumn("{task.fields[detail]}", markup=False, table_column=rest),
            console=self._console,
            refresh_per_second=4,
            # where a block has redirected `sys.stdout` to a file, it stays so
            redirect_stdout=sys.stdout is stream,
            redirect_stderr=sys.stdout is stream,
            expand=True,
        )
        self._join = Group
        self._task: TaskID | None = None
        self._part: tuple[str, int] | None = None
        self._progress.start()

    def show(self, report: Report, important: bool) -> None:
        """Redraw the line. The finished line of a part stays above what is printed after it."""
        part = (report.part, report.total)
        if part != self._part and self._task is not None:  # of a part that was not finished
            self._progress.remove_task(self._task)
            self._task = None
        if self._task is None:
            self._task = self._progress.add_task(
                report.part, total=report.total, stage=report.stage, detail="", figures=""
            )
        self._part = part
        figures = describe_figures(report.figures)
        self._progress.update(self._task, completed=report.done, detail=report.detail(), figures=figures)
        if important and report.done >= report.total:
            self._keep()

    def close(self) -> None:
        """Leave the last state in the terminal."""
        self._progress.stop()

    def _keep(self) -> None:
        """Print the line of the present part above the live one."""
        assert self._task is not None
        self._console.print(self._join(*self._progress.get_renderables()))
        self._progress.remove_task(self._task)
        self._task = None


FORMS: Mapping[str, type[Events] | type[Lines] | type[LiveLine]] = {"events": Events, "lines": Lines, "live": LiveLine}


def choose_form(stream: TextIO, environment: Mapping[str, str]) -> str:
    """Return the form for a stream: `live` in a terminal that can redraw a line, otherwise `lines`.

    Raises:
        ValueError: SFT_PROGRESS names another form.
    """
    chosen = environment.get(VARIABLE, "")
    if chosen and chosen not in FORMS:
        raise ValueError(f"{VARIABLE}={chosen!r}: it must be one of {', '.join(FORMS)}")
    if chosen:
        return chosen
    return "live" if stream.isatty() and environment.get("TERM", "dumb") != "dumb" else "lines"


class StageProgress:
    """Progress of one stage.

    Args:
        stage: Name of the stage.
        stream: Where it is shown.
        form: One of `FORMS`.
    """

    def __init__(self, stage: str, stream: TextIO, form: str) -> None:
        self._stage, self._stream, self._form = stage, stream, form
        self._display: Display | None = None
        self._part: tuple[str, int] | None = None
        self._began, self._first, self._is_complete = 0.0, 0, False

    def report(
        self,
        done: int,
        total: int,
        part: str,
        text: str = "",
        figures: Mapping[str, float] | None = None,
        *,
        point: bool = False,
        left_s: float | None = None,
    ) -> None:
        """Show how far the stage is. The first and the last report of a part and points of the curve are always shown.

        Args:
            done: What is done of the part.
            total: How many there are.
            part: What is counted, such as `train rows`.
            text: What happens now.
            figures: Figures to show, by name.
            point: Whether the figures are a point of the curve.
            left_s: Seconds that are left, NaN if unknown; None = as many per row or step as since the part began.
        """
        now = time.monotonic()
        is_new = (part, total) != self._part
        if is_new:
            self._part, self._began, self._first, self._is_complete = (part, total), now, done, False
        advanced = done - self._first
        each_s = (now - self._began) / advanced if advanced > 0 and left_s is None else None
        if each_s is not None:
            left_s = each_s * (total - done)
        elif left_s is not None and math.isnan(left_s):
            left_s = None
        report = Report(self._stage, done, total, part, text, each_s, left_s, figures or {}, point)
        self._display = self._display or FORMS[self._form](self._stream)
        is_last = done >= total and not self._is_complete
        self._is_complete = done >= total
        self._display.show(report, (is_new and done == 0) or is_last or point)

    def page(self, name: str, text: str) -> None:
        """Show a page of Markdown, or replace the one with this name; only flows have a place for it."""
        if self._form == "events":
            print(f"{PAGE}{json.dumps([name, text], ensure_ascii=False)}", file=self._stream, flush=True)

    def close(self) -> None:
        """End the output of the display."""
        if self._display is not None:
            self._display.close()
            self._display = None


_open: list[StageProgress] = []
"""The stage of this process, as the last entry."""


@contextmanager
def stage_progress(stage: str) -> Iterator[StageProgress]:
    """Show the progress of a stage within the block, also where the block redirects `sys.stdout`.

    Args:
        stage: Name of the stage.
    """
    opened = StageProgress(stage, sys.stdout, choose_form(sys.stdout, os.environ))
    _open.append(opened)
    try:
        yield opened
    finally:
        _open.remove(opened)
        opened.close()


def show_page(name: str, text: str) -> None:
    """Show a page of the stage that is open, see `StageProgress.page`; outside of a stage nothing is shown."""
    if _open:
        _open[-1].page(name, text)


def download_progress(done: int, total: int, what: str) -> None:
    """Report a download in megabytes; one of less than a megabyte is not shown.

    Args:
        done: Bytes that have arrived.
        total: Bytes of all of it.
        what: What is downloaded.
    """
    if total >= BYTES_PER_MB:
        total_mb = math.ceil(total / BYTES_PER_MB)
        progress(total_mb if done >= total else done // BYTES_PER_MB, total_mb, f"MB of {what}")


def progress(done: int, total: int, part: str, text: str = "", **details: Any) -> None:
    """Report to the stage that is open, see `StageProgress.report`; outside of a stage nothing is shown."""
    if _open:
        _open[-1].report(done, total, part, text, **details)
