"""Counts of the rows that `load` reads, writes and drops, and the limits on how many may be dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from stages.checkout.ledger import REMOVING, Action, Ledger
from stages.loading.checks import Note
from stages.params.schema import LoadSection


class Accounts:
    """Counts of rows by purpose (`train` or `eval`) and by source. Writes the ledger entries of rows.

    Args:
        section: The section `load` of params.yaml.
        ledger: Gets an entry for each row that is dropped, omitted, repaired or warned of.
    """

    def __init__(self, section: LoadSection, ledger: Ledger) -> None:
        self._section = section
        self._ledger = ledger
        self._num_dropped: Counter[str] = Counter()
        self.num_rows: Counter[str] = Counter()
        self.num_repeated = 0
        self.cards: list[dict[str, Any]] = []

    def open_source(self, card: Mapping[str, Any], purpose: str) -> None:
        """Begin to count the rows of a source.

        Args:
            card: What the data card states of the source.
            purpose: train or eval.
        """
        self.cards.append({"purpose": purpose, **card, "dropped": Counter()})

    def enter(self, row_id: str, note: Note, source: int, purpose: str) -> None:
        """Write a ledger entry for a row, and count it in the card of its source if it is dropped or omitted.

        Args:
            row_id: Where the row is, `file:line`.
            note: What was found and what is done about it.
            source: Number of the source, in the order of `open_source`.
            purpose: train or eval.
        """
        self._ledger.enter(row_id, note.problem.reason, note.problem.detail, note.action)
        if note.action in REMOVING:
            self.cards[source]["dropped"][note.problem.reason] += 1
        self._num_dropped[purpose] += note.action is Action.DROP

    def close(self, num_out: Mapping[str, int]) -> dict[str, Any]:
        """Check that every row was written or is in the ledger, and that enough rows are left.

        Args:
            num_out: Numbers of rows that were written to `train` and to `eval`.

        Returns:
            The stage's figures.

        Raises:
            ValueError: More rows were dropped than `max_dropped_fraction` allows, or more have a problem than
                `max_fractions` allows; a check with the action `fail` found something; or no row is left.
        """
        num_in = self.num_rows.total()
        accounted = sum(num_out.values()) - self.num_repeated + self._ledger.num_removed
        assert num_in == accounted, f"of {num_in} rows {accounted} are written or in the ledger"
        self.check()
        for name, count in num_out.items():
            if count == 0:
                raise ValueError(self._nothing_left(name))
        for card in self.cards:
            card["dropped"] = dict(sorted(card["dropped"].items()))
        return self._figures(num_out)

    def check(self) -> None:
        """Check the numbers of rows so far against the limits.

        Raises:
            ValueError: As in `close`, except that rows may be missing.
        """
        self._check_failed()
        self._check_dropped()
        self._check_fractions()

    def state(self) -> dict[str, Any]:
        """Return the counts as plain values, for `restore`."""
        return {"num_dropped": dict(self._num_dropped), "num_rows": dict(self.num_rows), "repeated": self.num_repeated}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from counts that `state` returned."""
        self._num_dropped, self.num_rows = Counter(state["num_dropped"]), Counter(state["num_rows"])
        self.num_repeated = state["repeated"]

    def _figures(self, num_out: Mapping[str, int]) -> dict[str, Any]:
        num_in = self.num_rows.total()
        counts = {action: dict(sorted(self._ledger.counts[action].items())) for action in Action}
        num_dropped = sum(counts[Action.DROP].values())
        return {
            "num_rows_in": num_in,
            "num_train": num_out["train"],
            "num_eval": num_out["eval"],
            "num_repeated": self.num_repeated,
            "num_omitted": sum(counts[Action.OMIT].values()),
            "num_dropped": num_dropped,
            "dropped_fraction": round(num_dropped / num_in, 6),
            "dropped": counts[Action.DROP],
            "repaired": counts[Action.REPAIR],
            "warned": counts[Action.WARN],
        }

    def _check_failed(self) -> None:
        if self._ledger.counts[Action.FAIL]:
            found = self._ledger.summary(Action.FAIL)
            raise ValueError(f"params.yaml, load.checks: {found}. Fix the data, or state warn or drop instead of fail")

    def _check_dropped(self) -> None:
        limit = self._section.max_dropped_fraction
        for purpose, count in self.num_rows.items():
            dropped = self._num_dropped[purpose]
            if dropped > limit * count:
                raise ValueError(
                    f"{dropped} of {count} {purpose} rows ({dropped / count:.1%}) had to be dropped, more than "
                    f"load.max_dropped_fraction {limit} allows: {self._ledger.summary()}. Fix the data, or raise it"
                )

    def _check_fractions(self) -> None:
        num_in = self.num_rows.total()
        for reason, limit in self._section.max_fractions.items():
            count = self._ledger.count(reason)
            if count > limit * num_in:
                found = self._ledger.summary(reason=reason)
                raise ValueError(
                    f"{count} of {num_in} rows ({count / num_in:.1%}) have {reason}, more than load.max_fractions "
                    f"{limit} allows: {found}. Fix the data, or raise it"
                )

    def _nothing_left(self, name: str) -> str:
        fraction = self._section.eval.fraction
        why = f"; load.eval.fraction {fraction} of {self.num_rows['train']} rows" if fraction is not None else ""
        dropped = f"; dropped were {self._ledger.summary()}" if self._ledger.num_removed else ""
        return f"no row is left for {name}{why}{dropped}. Give more rows, or another split"
