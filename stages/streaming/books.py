"""Accounts of a stream's first pass: the ledgers of `load`, `format` and `pack`, and the counts of rows and tokens."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.checkout.ledger import Action, Ledger
from stages.loading.accounts import Accounts
from stages.loading.checks import Note
from stages.streaming.recipe import Recipe

STAGES = ("load", "format", "pack")


class Books:
    """Ledgers and counts, which can go on from a state.

    Args:
        recipe: Has the limits on how many rows and tokens may be lost.
        folder: Folder of the ledgers, one file per stage.
        state: Where to go on, as `state` returned it; None = from the beginning.

    Attributes:
        counts: Numbers of rows and tokens by name.
    """

    def __init__(self, recipe: Recipe, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._recipe = recipe
        self.ledgers = {
            stage: Ledger(folder / f"{stage}.jsonl", stage, None if state is None else state["ledgers"][stage])
            for stage in STAGES
        }
        self.accounts = Accounts(recipe.load, self.ledgers["load"])
        for source in recipe.sources:
            self.accounts.open_source({"path": source["section"]["path"]}, "train")
        self.counts: Counter[str] = Counter()
        if state is not None:
            self.accounts.restore(state["accounts"])
            self.counts.update(state["counts"])

    def state(self) -> dict[str, Any]:
        """Return all counts, and the sizes of the ledgers, as plain values."""
        ledgers = {stage: ledger.state() for stage, ledger in self.ledgers.items()}
        return {"ledgers": ledgers, "accounts": self.accounts.state(), "counts": dict(self.counts)}

    def close(self) -> None:
        """Close the ledgers' files."""
        for ledger in self.ledgers.values():
            ledger.close()

    def enter(self, row_id: str, note: Note, source: int) -> None:
        """Write a ledger entry of `load`."""
        self.accounts.enter(row_id, note, source, "train")

    def check(self) -> None:
        """Check the counts so far against the limits of the sections `load`, `format` and `pack`.

        Raises:
            ValueError: A limit is exceeded, or a check with the action `fail` found something.
        """
        self.accounts.check()
        rendered, packed = self.ledgers["format"], self.ledgers["pack"]
        if rendered.counts[Action.FAIL]:
            found = rendered.summary(Action.FAIL)
            raise ValueError(
                f"params.yaml, format.special_text: {found}. Fix the data, or state neutralise, warn or drop"
            )
        records, limit = self.counts["records"], self._recipe.format.max_dropped_fraction
        if rendered.num_removed > limit * records:
            raise ValueError(
                f"{rendered.num_removed} of the first {records} rows had to be dropped, more than "
                f"format.max_dropped_fraction {limit} allows: {rendered.summary()}. Fix the data, or raise it"
            )
        trained, limit = self.counts["trained_tokens_in"], self._recipe.pack.max_lost_fraction
        lost = self.counts["trained_tokens_lost"] + self.counts["trained_tokens_cut"]
        if lost > limit * trained:
            raise ValueError(
                f"{lost} of the first {trained} trained tokens are lost or cut from their prompts at pack.max_length "
                f"{self._recipe.pack.max_length}, more than pack.max_lost_fraction {limit} allows: "
                f"{packed.summary(Action.CUT, Action.SPLIT, Action.DROP)}. Raise one of the two"
            )


def figures_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of a state, with the ledgers' reasons by action, for outs/train."""
    figures: dict[str, Any] = {"rows_read": sum(state["accounts"]["num_rows"].values()), **state["counts"]}
    for stage, ledger in state["ledgers"].items():
        actions: dict[str, dict[str, int]] = {}
        for action, reason, count, _ in sorted(ledger["counts"]):
            actions.setdefault(action, {})[reason] = count
        figures[stage] = actions
    return figures


def join_ledgers(folder: Path, state: Mapping[str, Any], target: Path) -> None:
    """Write the ledgers of all stages, as far as a state goes, into one file."""
    with target.open("wb") as joined:
        for stage in STAGES:
            left = state["ledgers"][stage]["num_bytes"]
            with (folder / f"{stage}.jsonl").open("rb") as ledger:
                while left and (block := ledger.read(min(left, 1 << 20))):
                    joined.write(block)
                    left -= len(block)


def sync(folder: Path) -> None:
    """Have the disk write the ledgers, so that a checkpoint can rely on them."""
    for stage in STAGES:
        with (folder / f"{stage}.jsonl").open("rb") as file:
            os.fsync(file.fileno())
