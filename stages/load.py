"""Stage `load`: any source to validated records, held-out rows apart, and a ledger of all that was left out."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sft.records import RowError, normalize, record_digest, validate_record
from sft.sources import Row
from stages.artifacts import progress, write_json
from stages.intake import Source, open_source
from stages.model_sources import resolve_base_model
from stages.outfolder import JsonlWriter, Ledger, replacing_folder
from stages.params import LoadSection, Params
from stages.paths import Paths

ROWS_BETWEEN_PROGRESS = 10_000
OMITTED = ("max_rows", "weight")
"""Reasons of rows that nothing is wrong with: params.yaml wants fewer."""


def run(params: Params, paths: Paths) -> None:
    """Read all sources, check every row, and write outs/load.

    Raises:
        ValueError: A source is missing, damaged or empty, too many rows had to be dropped, no row is left, or the base
            model can't be found.
    """
    section = params.load
    train = [open_source(part, paths, f"load.sources[{i}].path") for i, part in enumerate(section.sources)]
    held_out_file = section.eval.source()
    held_out = [open_source(held_out_file, paths, "load.eval.path")] if held_out_file else []
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
        self._num_repeated = 0
        self._held_out: frozenset[bytes] = frozenset()
        self.cards: list[dict[str, Any]] = []

    def take(self, sources: list[Source], purpose: str) -> None:
        """Take in all rows of sources that are meant for training, or for evaluation."""
        total = sum(source.num_rows for source in sources)
        chosen = [self._choose(source) for source in sources]
        if purpose == "train" and self._section.eval.count is not None:
            self._held_out = self._hold_out(sources, chosen, self._section.eval.count)
        for source, keys in zip(sources, chosen, strict=True):
            before = Counter(self._ledger.counts)
            for row in source.rows():
                if self._num_rows[purpose] % ROWS_BETWEEN_PROGRESS == 0:
                    progress(self._num_rows[purpose], total, f"{purpose} rows")
                self._num_rows[purpose] += 1
                self._take_row(row, source, keys, purpose)
            left_out = dict(sorted((Counter(self._ledger.counts) - before).items()))
            self.cards.append({"purpose": purpose, **source.card(), "dropped": left_out})
        if sources:
            progress(total, total, f"{purpose} rows")

    def _take_row(self, row: Row, source: Source, chosen: frozenset[bytes] | None, purpose: str) -> None:
        try:
            record = self._record(row, source)
            target, copies = self._place(record, row.id, source, chosen, purpose)
        except RowError as error:
            self._ledger.drop(row.id, error.reason, str(error))
            self._num_dropped[purpose] += error.reason not in OMITTED
            return
        for copy in range(copies):
            self._writers[target].write({"id": f"{row.id}+{copy}" if copy else row.id, **record})
        self._num_repeated += copies - 1

    def _record(self, row: Row, source: Source) -> dict[str, Any]:
        """The row as a record that is fit for training."""
        record = normalize(source.mapping.apply(row.columns), source.layout, prune_nulls=row.from_arrow)
        problems = validate_record(record, require_alternation=self._section.require_alternation)
        if problems:
            raise RowError(problems[0].reason, "; ".join(problem.detail for problem in problems))
        return record

    def _place(
        self, record: dict[str, Any], row_id: str, source: Source, chosen: frozenset[bytes] | None, purpose: str
    ) -> tuple[str, int]:
        """Where a record goes, and how many times; each content of a source goes there but once."""
        key = bytes.fromhex(record_digest(record))
        fraction = self._section.eval.fraction
        held_out = key in self._held_out or (fraction is not None and self._position(key) < fraction)
        target = "eval" if held_out else purpose
        for split, reason in ((target, "duplicate"), ("eval", "in_eval")):
            if key in self._seen[split]:
                raise RowError(reason, f"the same as {self._seen[split][key]}")
        self._seen[target][key] = row_id
        if chosen is not None and key not in chosen:
            raise RowError("max_rows", f"not among the {source.section.max_rows} rows that max_rows takes")
        weight = source.section.weight if target == "train" else 1.0
        copies = int(weight) + (self._position(key, "weight") < weight % 1)
        if copies == 0:
            raise RowError("weight", f"not among the rows that weight {weight} takes")
        return target, copies

    def _position(self, key: bytes, purpose: str = "") -> float:
        """A number from 0 to 1 that depends on a row's content alone: rows appended later move no other row."""
        text = f"{self._section.seed}:{purpose}{key.hex()}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64

    def _keys(self, source: Source) -> Iterator[bytes]:
        """What a source's good rows are known by; rows that are not good come to the ledger when they are taken."""
        for row in source.rows():
            try:
                yield bytes.fromhex(record_digest(self._record(row, source)))
            except RowError:
                continue

    def _choose(self, source: Source) -> frozenset[bytes] | None:
        """The rows that `max_rows` takes; None where it takes all."""
        if source.section.max_rows is None:
            return None
        keys = set(self._keys(source)) - self._seen["eval"].keys()
        return frozenset(
            heapq.nsmallest(source.section.max_rows, keys, key=partial(self._position, purpose="max_rows"))
        )

    def _hold_out(self, sources: list[Source], chosen: list[frozenset[bytes] | None], count: int) -> frozenset[bytes]:
        """The `count` rows that are held out, from every source its share (largest remainders)."""
        strata: list[set[bytes]] = []
        for source, keys in zip(sources, chosen, strict=True):
            mine = set(self._keys(source)) if keys is None else set(keys)
            strata.append(mine.difference(*strata))
        total = sum(map(len, strata))
        if count >= total:
            raise ValueError(
                f"load.eval.count {count} holds out every row: there are {total} good ones. State a smaller number"
            )
        exact = [count * len(keys) / total for keys in strata]
        shares = [int(share) for share in exact]
        by_remainder = sorted(range(len(strata)), key=lambda i: shares[i] - exact[i])
        for index in by_remainder[: count - sum(shares)]:
            shares[index] += 1
        picked = [heapq.nsmallest(share, keys, key=self._position) for share, keys in zip(shares, strata, strict=True)]
        return frozenset(key for keys in picked for key in keys)

    def close_accounts(self) -> dict[str, Any]:
        """Make sure that every row is accounted for and that enough are left; returns the stage's figures.

        Raises:
            ValueError: More rows were dropped than `max_dropped_fraction` allows, or no row is left.
        """
        num_in = sum(self._num_rows.values())
        num_out = {name: writer.num_rows for name, writer in self._writers.items()}
        accounted = sum(num_out.values()) - self._num_repeated + self._ledger.num_rows
        assert num_in == accounted, "a row is neither written nor in the ledger"
        self._check_dropped()
        for name, count in num_out.items():
            if count == 0:
                raise ValueError(self._nothing_left(name))
        counts = self._ledger.counts
        num_omitted = sum(counts[reason] for reason in OMITTED)
        num_dropped = self._ledger.num_rows - num_omitted
        return {
            "num_rows_in": num_in,
            "num_train": num_out["train"],
            "num_eval": num_out["eval"],
            "num_repeated": self._num_repeated,
            "num_omitted": num_omitted,
            "num_dropped": num_dropped,
            "dropped_fraction": round(num_dropped / num_in, 6),
            "dropped": {reason: count for reason, count in sorted(counts.items()) if reason not in OMITTED},
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
