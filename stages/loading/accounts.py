"""The books of `load`: how many rows came in and went out, and the limits of what may be wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from stages.checkout.ledger import LEAVES_OUT, Action, Ledger
from stages.loading.checks import Note
from stages.params.schema import LoadSection


class Accounts:
    """Counts rows by purpose (`train` or `eval`) and by source, and enters in the ledger what is done to them.

    Args:
        section: The section `load` of params.yaml.
        ledger: Where rows are entered that something is done to.
    """

    def __init__(self, section: LoadSection, ledger: Ledger) -> None:
        self._section = section
        self._ledger = ledger
        self._num_dropped: Counter[str] = Counter()
        self.num_rows: Counter[str] = Counter()
        self.num_repeated = 0
        self.cards: list[dict[str, Any]] = []

    def open_source(self, card: Mapping[str, Any], purpose: str) -> None:
        """Begin to count the rows of a source."""
        self.cards.append({"purpose": purpose, **card, "dropped": Counter()})

    def enter(self, row_id: str, note: Note, source: int, purpose: str) -> None:
        """Enter a row in the ledger, and in the card of its source when it is left out."""
        self._ledger.enter(row_id, note.problem.reason, note.problem.detail, note.action)
        if note.action in LEAVES_OUT:
            self.cards[source]["dropped"][note.problem.reason] += 1
        self._num_dropped[purpose] += note.action is Action.DROP

    def close(self, num_out: Mapping[str, int]) -> dict[str, Any]:
        """Make sure that every row is accounted for and that enough are left.

        Args:
            num_out: Rows that were written, of `train` and of `eval`.

        Returns:
            The stage's figures.

        Raises:
            ValueError: More rows were dropped than `max_dropped_fraction` allows, or have something than
                `max_fractions` allows; a check with the action `fail` found something; or no row is left.
        """
        num_in = self.num_rows.total()
        accounted = sum(num_out.values()) - self.num_repeated + self._ledger.num_left_out
        assert num_in == accounted, f"of {num_in} rows {accounted} are written or in the ledger"
        self._check_failed()
        self._check_dropped()
        self._check_fractions()
        for name, count in num_out.items():
            if count == 0:
                raise ValueError(self._nothing_left(name))
        for card in self.cards:
            card["dropped"] = dict(sorted(card["dropped"].items()))
        return self._figures(num_out)

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
            raise ValueError(f"params.yaml, load.checks: {found}. Mend the data, or state warn or drop instead of fail")

    def _check_dropped(self) -> None:
        limit = self._section.max_dropped_fraction
        for purpose, count in self.num_rows.items():
            dropped = self._num_dropped[purpose]
            if dropped > limit * count:
                raise ValueError(
                    f"{dropped} of {count} {purpose} rows ({dropped / count:.1%}) had to be dropped, more than "
                    f"load.max_dropped_fraction {limit} allows: {self._ledger.summary()}. Mend the data, or raise it"
                )

    def _check_fractions(self) -> None:
        num_in = self.num_rows.total()
        for reason, limit in self._section.max_fractions.items():
            count = self._ledger.count(reason)
            if count > limit * num_in:
                found = self._ledger.summary(reason=reason)
                raise ValueError(
                    f"{count} of {num_in} rows ({count / num_in:.1%}) have {reason}, more than load.max_fractions "
                    f"{limit} allows: {found}. Mend the data, or raise it"
                )

    def _nothing_left(self, name: str) -> str:
        fraction = self._section.eval.fraction
        why = f"; load.eval.fraction {fraction} of {self.num_rows['train']} rows" if fraction is not None else ""
        dropped = f"; dropped were {self._ledger.summary()}" if self._ledger.num_left_out else ""
        return f"no row is left for {name}{why}{dropped}. Give more rows, or another split"
