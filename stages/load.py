"""Stage `load`: any source to validated records, held-out rows apart, and a ledger of all that was left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sft.records import RowError, normalize, record_digest, validate_record
from sft.sources import Row
from stages.artifacts import progress, write_json
from stages.intake import Source, open_source
from stages.model_sources import resolve_base_model
from stages.outfolder import JsonlWriter, Ledger, replacing_folder
from stages.params import LoadSection, Params, SourceSection
from stages.paths import Paths

ROWS_BETWEEN_PROGRESS = 10_000


def run(params: Params, paths: Paths) -> None:
    """Read all sources, check every row, and write outs/load.

    Raises:
        ValueError: A source is missing, damaged or empty, too many rows had to be dropped, no row is left, or the base
            model can't be found.
    """
    section = params.load
    train = [open_source(part, paths, f"load.sources[{i}].path") for i, part in enumerate(section.sources)]
    held_out = []
    if section.eval.path is not None:
        held_out = [open_source(SourceSection(path=section.eval.path), paths, "load.eval.path")]
    base_model = resolve_base_model(params.model, paths.root)
    with replacing_folder(paths.out("load")) as folder:
        with Intake(folder, section) as intake:
            intake.take(held_out, "eval")
            intake.take(train, "train")
            figures = intake.close_accounts()
        write_json(folder / "card.json", {"sources": intake.cards, **figures})
        write_json(folder / "base_model.json", base_model.record())
    write_json(paths.metrics("load"), figures)


class Intake(ExitStack):
    """Takes in rows one by one: normalizes, validates, drops duplicates, and writes each to where it belongs.

    Args:
        folder: Output folder.
        section: The section `load` of params.yaml.
    """

    def __init__(self, folder: Path, section: LoadSection) -> None:
        super().__init__()
        self._section = section
        self._ledger = self.enter_context(Ledger(folder / "ledger.jsonl", "load"))
        self._writers = {name: self.enter_context(JsonlWriter(folder / f"{name}.jsonl")) for name in ("train", "eval")}
        self._seen: dict[str, dict[bytes, str]] = {"train": {}, "eval": {}}
        self._num_rows: Counter[str] = Counter()
        self._num_dropped: Counter[str] = Counter()
        self.cards: list[dict[str, Any]] = []

    def take(self, sources: list[Source], purpose: str) -> None:
        """Take in all rows of sources that are meant for training, or for evaluation."""
        total = sum(source.num_rows for source in sources)
        for source in sources:
            before = Counter(self._ledger.counts)
            for row in source.rows():
                if self._num_rows[purpose] % ROWS_BETWEEN_PROGRESS == 0:
                    progress(self._num_rows[purpose], total, f"{purpose} rows")
                self._num_rows[purpose] += 1
                self._take_row(row, source, purpose)
            dropped = Counter(self._ledger.counts) - before
            self.cards.append({"purpose": purpose, **source.card(), "dropped": dict(sorted(dropped.items()))})
        if sources:
            progress(total, total, f"{purpose} rows")

    def _take_row(self, row: Row, source: Source, purpose: str) -> None:
        try:
            record = normalize(row.columns, source.layout, prune_nulls=row.from_arrow)
            problems = validate_record(record, require_alternation=self._section.require_alternation)
            if problems:
                raise RowError(problems[0].reason, "; ".join(problem.detail for problem in problems))
            target = self._place(record, row.id, purpose)
        except RowError as error:
            self._ledger.drop(row.id, error.reason, str(error))
            self._num_dropped[purpose] += 1
            return
        self._writers[target].write({"id": row.id, **record})

    def _place(self, record: dict[str, Any], row_id: str, purpose: str) -> str:
        """Where a record goes; each content goes there once."""
        digest = record_digest(record)
        fraction = self._section.eval.fraction
        held_out = fraction is not None and _position(digest, self._section.seed) < fraction
        target = "eval" if held_out else purpose
        key = bytes.fromhex(digest)
        for split, reason in ((target, "duplicate"), ("eval", "in_eval")):
            if key in self._seen[split]:
                raise RowError(reason, f"the same as {self._seen[split][key]}")
        self._seen[target][key] = row_id
        return target

    def close_accounts(self) -> dict[str, Any]:
        """Make sure that every row is accounted for and that enough are left; returns the stage's figures.

        Raises:
            ValueError: More rows were dropped than `max_dropped_fraction` allows, or no row is left.
        """
        num_in = sum(self._num_rows.values())
        num_out = {name: writer.num_rows for name, writer in self._writers.items()}
        assert num_in == sum(num_out.values()) + self._ledger.num_rows, "a row is neither written nor in the ledger"
        self._check_dropped()
        for name, count in num_out.items():
            if count == 0:
                raise ValueError(self._nothing_left(name))
        return {
            "num_rows_in": num_in,
            "num_train": num_out["train"],
            "num_eval": num_out["eval"],
            "num_dropped": self._ledger.num_rows,
            "dropped_fraction": round(self._ledger.num_rows / num_in, 6),
            "dropped": dict(sorted(self._ledger.counts.items())),
        }

    def _check_dropped(self) -> None:
        limit = self._section.max_dropped_fraction
        for purpose, count in self._num_rows.items():
            dropped = self._num_dropped[purpose]
            if dropped > limit * count:
                raise ValueError(
                    f"{dropped} of {count} {purpose} rows ({dropped / count:.1%}) had to be dropped, more than "
                    f"load.max_dropped_fraction {limit} allows: {self._ledger.summary()}. Mend the data, or raise it"
                )

    def _nothing_left(self, name: str) -> str:
        fraction = self._section.eval.fraction
        why = f"; load.eval.fraction {fraction} of {self._num_rows['train']} rows" if fraction is not None else ""
        dropped = f"; dropped were {self._ledger.summary()}" if self._ledger.num_rows else ""
        return f"no row is left for {name}{why}{dropped}. Give more rows, or another split"


def _position(digest: str, seed: int) -> float:
    """A number from 0 to 1 that depends on the content of a row alone: rows appended later move no other row."""
    return int(hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()[:16], 16) / 2**64
