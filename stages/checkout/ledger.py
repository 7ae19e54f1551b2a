"""The ledger of a stage: each row that the stage drops, changes or warns of, with the reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import JsonlWriter

NUM_EXAMPLES = 3


class Action(StrEnum):
    """What was done to a row of the ledger."""

    DROP = "drop"
    OMIT = "omit"
    """Not taken because params.yaml asks for fewer rows; nothing is wrong with the row."""
    REPEAT = "repeat"
    REPAIR = "repair"
    WARN = "warn"
    FAIL = "fail"
    CUT = "cut"
    SPLIT = "split"


REMOVING = (Action.DROP, Action.OMIT)
"""Actions after which a row is not in the output."""


class Ledger(JsonlWriter):
    """Writer of a ledger, which counts entries and keeps the first ids of each reason for messages.

    Args:
        path: JSON lines file.
        stage: Name of the stage that writes it.
        state: Where to go on, as `state` returned it; None = from the beginning.
    """

    def __init__(self, path: Path, stage: str, state: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, 0 if state is None else state["num_bytes"])
        self._stage = stage
        self.counts: defaultdict[Action, Counter[str]] = defaultdict(Counter)
        self._examples: defaultdict[tuple[Action, str], list[str]] = defaultdict(list)
        for action, reason, count, examples in () if state is None else state["counts"]:
            self.counts[Action(action)][reason] = count
            self._examples[Action(action), reason] = list(examples)

    def state(self) -> dict[str, Any]:
        """Return how far the ledger is, as plain values."""
        self.flush()
        counts = [
            [action.value, reason, count, list(self._examples[action, reason])]
            for action, reasons in self.counts.items()
            for reason, count in reasons.items()
        ]
        return {"num_bytes": self.num_bytes, "counts": counts}

    def enter(self, row_id: str, reason: str, detail: str | None, action: Action = Action.DROP, **columns: int) -> None:
        """Write an entry for one row. A row may have several entries, at most one of them with `drop` or `omit`.

        Args:
            row_id: Where the row is, `file:line`.
            reason: Short code.
            detail: What was found; None if the entry has no column `detail`.
            action: What was done.
            columns: More columns of the entry, written last.
        """
        entry = {"id": row_id, "stage": self._stage, "reason": reason, "action": action.value}
        self.write({**entry, **({} if detail is None else {"detail": detail}), **columns})
        self.counts[action][reason] += 1
        if len(self._examples[action, reason]) < NUM_EXAMPLES:
            self._examples[action, reason].append(row_id if detail is None else f"{row_id} ({detail})")

    @property
    def num_removed(self) -> int:
        """Number of rows that were dropped or omitted."""
        return sum(self.counts[action].total() for action in REMOVING)

    def count(self, reason: str) -> int:
        """Return the number of entries with a reason, whatever their action."""
        return sum(counts[reason] for counts in self.counts.values())

    def summary(self, *actions: Action, reason: str | None = None) -> str:
        """Describe the entries: reasons, most frequent first, with the first ids of each.

        Args:
            actions: Describe entries with these actions only; none given = those of dropped and omitted rows, or all if
                `reason` is given.
            reason: Describe entries with this reason only.
        """
        chosen = [
            (count, name, action)
            for action in actions or (REMOVING if reason is None else Action)
            for name, count in self.counts[action].items()
            if reason in (None, name)
        ]
        return "; ".join(
            f"{name} {count} times, first {', '.join(self._examples[action, name])}"
            for count, name, action in sorted(chosen, key=lambda item: -item[0])
        )
