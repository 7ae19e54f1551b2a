"""Leaderboard of a sweep: its trials, the best first, for the Prefect page and for a terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from flows.runs.dvc_stage import Outcome
from flows.runs.table import publish_table

KEY = "sweep-leaderboard"


@dataclass(frozen=True)
class Trial:
    """The result of one trial.

    Args:
        number: Its number, from 1.
        values: Values of the varied params, by name.
        figures: Figures of its stages, by `<stage>.<metric>`.
        outcomes: Outcomes of its stages.
        seconds: Its duration.
        problem: Why it failed; None if it did not.
        run_id: Id of its run in MLflow.
    """

    number: int
    values: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    seconds: float = 0.0
    problem: str | None = None
    run_id: str = ""


@dataclass
class Leaderboard:
    """The trials of a sweep and their ranking.

    Args:
        objective: The figure that ranks them.
        maximize: Whether higher is better.
        trials: The trials in the order in which they ran.
    """

    objective: str
    maximize: bool
    trials: list[Trial] = field(default_factory=list)

    def score(self, trial: Trial) -> float | None:
        """Return the objective of a trial; None if it failed."""
        return None if trial.problem is not None else trial.figures.get(self.objective)

    @property
    def ranked(self) -> list[Trial]:
        """The trials, the best first and failed ones last; of equal trials, the earlier one first."""
        sign = -1.0 if self.maximize else 1.0
        scored = [(score, trial) for trial in self.trials if (score := self.score(trial)) is not None]
        ordered = [trial for _, trial in sorted(scored, key=lambda pair: (sign * pair[0], pair[1].number))]
        return ordered + [trial for trial in self.trials if self.score(trial) is None]

    @property
    def best(self) -> Trial | None:
        """The best trial; None if all failed."""
        first = next(iter(self.ranked), None)
        return first if first is not None and self.score(first) is not None else None

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per trial, the best first."""
        return [
            {
                "trial": trial.number,
                **trial.values,
                "objective": self.score(trial),
                "stages": _counted(trial.outcomes),
                "seconds": round(trial.seconds, 1),
                "run": trial.run_id[:12],
                "problem": trial.problem or "",
            }
            for trial in self.ranked
        ]

    def summary(self) -> str:
        """Summarize the sweep in one line."""
        if self.best is None:
            return f"{len(self.trials)} trials, none of which measured {self.objective}"
        failed = sum(trial.problem is not None for trial in self.trials)
        values = ", ".join(f"{name}={json.dumps(value)}" for name, value in self.best.values.items())
        return (
            f"best of {len(self.trials)} trials{f' ({failed} failed)' if failed else ''}: trial {self.best.number} "
            f"with {self.objective} {self.best.figures[self.objective]:.6g}: {values}"
        )

    def text(self) -> str:
        """Return the table for a terminal, and the command that runs the best trial again."""
        rows = [{name: _cell(value) for name, value in row.items()} for row in self.rows()]
        rows = [{**row, "problem": row["problem"].partition("\n")[0]} for row in rows]
        names = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
        lines = ["  ".join(f"{name:<{widths[name]}}" for name in names).rstrip()]
        lines += ["  ".join(f"{row[name]:<{widths[name]}}" for name in names).rstrip() for row in rows]
        lines += ["", self.summary()]
        if self.best is not None:
            settings = " ".join(f"--set '{name}={json.dumps(value)}'" for name, value in self.best.values.items())
            lines.append(f"to restore it from the cache: python -m flows.pipeline {settings}")
        return "\n".join(lines)

    def publish(self) -> None:
        """Publish the table as a Prefect artifact of the flow run."""
        rows = [{name: _cell(value) for name, value in row.items()} for row in self.rows()]
        publish_table(rows, KEY, self.summary())


def _counted(outcomes: tuple[Outcome, ...]) -> str:
    counts = {outcome: outcomes.count(outcome) for outcome in Outcome if outcome in outcomes}
    return ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
