"""A stage's output folder that is replaced as a whole, and the ledger of rows that something was done to."""

from __future__ import annotations

from collections import Counter, defaultdict
from enum import StrEnum
from pathlib import Path

from stages.checkout.artifacts import JsonlWriter

NUM_EXAMPLES = 3


class Action(StrEnum):
    """What was done to a row that stands in the ledger."""

    DROP = "drop"
    OMIT = "omit"
    """Left out because params.yaml wants fewer rows: nothing is wrong with it."""
    REPAIR = "repair"
    WARN = "warn"
    FAIL = "fail"
    CUT = "cut"
    SPLIT = "split"


LEAVES_OUT = (Action.DROP, Action.OMIT)


class Ledger(JsonlWriter):
    """Every row that a stage leaves out, mends or warns of, with the reason; remembers the first ids of each reason.

    Args:
        path: JSON lines file.
        stage: The stage that writes it.
    """

    def __init__(self, path: Path, stage: str) -> None:
        super().__init__(path)
        self._stage = stage
        self.counts: defaultdict[Action, Counter[str]] = defaultdict(Counter)
        self._examples: defaultdict[tuple[Action, str], list[str]] = defaultdict(list)

    def enter(self, row_id: str, reason: str, detail: str | None, action: Action = Action.DROP, **columns: int) -> None:
        """Write an entry for one row. A row may have several entries, at most one of which leaves it out.

        Args:
            row_id: Where the row is, `file:line`.
            reason: Short code.
            detail: What was found; None if `reason` says it all, the entry then has no detail.
            action: What was done.
            columns: More columns of the entry, which come last.
        """
        entry = {"id": row_id, "stage": self._stage, "reason": reason, "action": action.value}
        self.write({**entry, **({} if detail is None else {"detail": detail}), **columns})
        self.counts[action][reason] += 1
        if len(self._examples[action, reason]) < NUM_EXAMPLES:
            self._examples[action, reason].append(row_id if detail is None else f"{row_id} ({detail})")

    @property
    def num_left_out(self) -> int:
        """How many rows it leaves out."""
        return sum(self.counts[action].total() for action in LEAVES_OUT)

    def count(self, reason: str) -> int:
        """How many rows have something, whatever was done about it."""
        return sum(counts[reason] for counts in self.counts.values())

    def summary(self, *actions: Action, reason: str | None = None) -> str:
        """Reasons, most frequent first, with the first ids of each; of rows left out, of some actions or one reason."""
        chosen = [
            (count, name, action)
            for action in actions or (LEAVES_OUT if reason is None else Action)
            for name, count in self.counts[action].items()
            if reason in (None, name)
        ]
        return "; ".join(
            f"{name} {count} times, first {', '.join(self._examples[action, name])}"
            for count, name, action in sorted(chosen, key=lambda item: -item[0])
        )
