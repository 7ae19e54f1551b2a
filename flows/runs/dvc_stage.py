"""One stage, run as `dvc repro --single-item STAGE` in a process tree that ends with the flow."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from flows.processes.environment import child_environment
from flows.processes.supervised import run_supervised
from flows.runs.recorded import discard_record, present_inputs, recorded_inputs
from stages.checkout.redaction import redact
from stages.cli.repro import read_metrics_files, remove_cut_lock, restore
from stages.launch.stopping import EXIT_SAVED
from stages.progress import EVENT, PAGE, VARIABLE, Report

EXTERNAL_SIGNALS = (1, 9, 15)
"""SIGHUP, SIGKILL (out of memory, pre-emption) and SIGTERM come from outside; others are errors of the stage."""

_EXITED = re.compile(r", exited with (-?\d+)$")
_NOISE = re.compile(
    r"^(\s*git add .*|To track the changes with git, run:|To enable auto staging, run:"
    r"|\s*dvc config core.autostage true|Use `dvc push` .*|(Updating|Generating) lock file .*"
    r"|Data and pipelines are up to date\.|\s*)$"
)


class Outcome(StrEnum):
    """Outcome of a stage in a run."""

    COMPLETED = "Completed"
    RESTORED = "Restored"
    UNCHANGED = "Unchanged"
    FAILED = "Failed"
    KILLED = "Killed"
    NOT_RUN = "Not run"


@dataclass(frozen=True)
class Listener:
    """Callbacks for the output of a running stage.

    Args:
        on_line: Called with each line, except progress lines.
        on_progress: Called with each progress line.
        on_page: Called with the name and the Markdown of each page.
    """

    on_line: Callable[[str], None]
    on_progress: Callable[[Report], None]
    on_page: Callable[[str, str], None] = lambda name, text: None


class StageFailed(RuntimeError):
    """A stage failed.

    Args:
        message: One line, or the stage's list of problems.
        killed: Whether a signal from outside ended it, so that a retry may succeed.
    """

    def __init__(self, message: str, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed


class StageOutput:
    """Parser of the lines that DVC and the stage print, which determine the outcome."""

    def __init__(self, listener: Listener) -> None:
        self.outcome = Outcome.COMPLETED
        self.exit_code: int | None = None
        self.error_lines: list[str] = []
        self.dvc_error_lines: list[str] = []
        self._last_line = ""
        self._listener = listener

    def feed(self, line: str) -> None:
        """Parse one line without its line break; secrets in it are replaced."""
        line = redact(line)
        if _NOISE.match(line):
            return
        if line.startswith(EVENT):
            self._listener.on_progress(Report(**json.loads(line.removeprefix(EVENT))))
            return
        if line.startswith(PAGE):
            self._listener.on_page(*json.loads(line.removeprefix(PAGE)))
            return
        self._listener.on_line(line)
        self._keep(line)

    def _keep(self, line: str) -> None:
        if line.startswith("Stage '") and line.endswith("didn't change, skipping"):
            self.outcome = Outcome.UNCHANGED
        elif line.startswith("Stage '") and " is cached - skipping run" in line:
            self.outcome = Outcome.RESTORED
        elif line.startswith("error: ") or (self.error_lines and line.startswith("  ")):
            self.error_lines.append(line.removeprefix("error: "))
        elif line.startswith("ERROR: ") or self.dvc_error_lines:
            self.dvc_error_lines.append(line.removeprefix("ERROR: "))
            exited = _EXITED.search(line)
            self.exit_code = int(exited[1]) if exited else self.exit_code
        else:
            self._last_line = line

    def failure(self, stage: str, dvc_code: int) -> StageFailed:
        """Return the error of a failed stage, by its own message, or else the signal that ended it, or else DVC."""
        code = self.exit_code if self.exit_code is not None else dvc_code
        number = _signal_number(code)
        killed = number in EXTERNAL_SIGNALS or code == EXIT_SAVED
        if self.error_lines:
            return StageFailed(f"{stage}: " + "\n".join(self.error_lines), killed)
        if code == EXIT_SAVED:
            return StageFailed(
                f"{stage}: SIGTERM stopped it after it saved a checkpoint; run it again to go on", killed
            )
        if number is not None:
            hint = "; out of memory?" if number == 9 else ""
            return StageFailed(f"{stage}: ended by signal {number}{hint}", killed)
        if self.exit_code is None and self.dvc_error_lines:
            return StageFailed(f"{stage}: " + " ".join(part.strip() for part in self.dvc_error_lines))
        return StageFailed(f"{stage}: exit code {code}: {self._last_line or 'it printed nothing'}")


def run_stage(root: Path, stage: str, listener: Listener, force: bool = False, **variables: str) -> Outcome:
    """Bring one stage up to date with DVC.

    An exception in this function (cancellation, timeout, Ctrl-C) first ends the stage's process tree. If params, code
    or data changed while the stage ran, DVC records the result under the changed inputs (dvc#11058); that record is
    deleted.

    Args:
        root: The checkout.
        stage: The stage's name in dvc.yaml.
        listener: Callbacks for lines and progress.
        force: Run the stage even if its result is in the cache.
        variables: Additional environment variables of the stage.

    Returns:
        `COMPLETED` if the stage ran, `RESTORED` if its result came from the cache, `UNCHANGED` if it was up to date.

    Raises:
        StageFailed: The stage or DVC failed, or inputs changed while it ran.
    """
    before = present_inputs(root, stage)
    figures = read_metrics_files(root)
    started = time.time()
    output = StageOutput(listener)
    remove_cut_lock(root)
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage, *(["--force"] if force else [])]
    code = run_supervised(command, root, child_environment(**{VARIABLE: "events"}, **variables), output.feed)
    if code != 0:
        restore(root, figures, stage, environment=child_environment())
        raise output.failure(stage, code)
    if output.outcome is Outcome.COMPLETED:
        recorded = recorded_inputs(root, stage)
        edited = sorted(key for key in before.keys() | recorded.keys() if before.get(key) != recorded.get(key))
        if edited:
            discard_record(root, stage, since=started)
            raise StageFailed(
                f"{stage}: {', '.join(edited)} changed while it ran, so nothing was recorded; run it again"
            )
    return output.outcome


def _signal_number(code: int) -> int | None:
    if code < 0:
        return -code
    return code - 128 if 128 < code < 128 + 65 else None
