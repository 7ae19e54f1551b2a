"""Stage `load`: any source to validated records, held-out rows apart, a ledger of all that was left out or found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sft.records import RowError, normalize, record_digest, validate_record
from sft.sources import Row
from stages.artifacts import progress, write_json
from stages.intake import Source, open_source
from stages.model_sources import resolve_base_model
from stages.outfolder import Action, JsonlWriter, Ledger, replacing_folder
from stages.params import LoadSection, Params
from stages.paths import Paths
from stages.row_checks import Note, Problem, RowChecks
from stages.selection import Selection
from stages.set_checks import SetChecks

ROWS_BETWEEN_PROGRESS = 10_000


def run(params: Params, paths: Paths) -> None:
    """Read all sources, check every row, and write outs/load.

    Raises:
        ValueError: A source is missing, damaged or empty, too many rows had to be dropped, a check that is to stop the
            pipeline found something, no row is left, or the base model can't be found.
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
            intake.look_at_all()
            figures = intake.close_accounts()
        write_json(folder / "card.json", {"sources": intake.cards, **figures})
        write_json(folder / "base_model.json", base_model.record())
    write_json(paths.metrics("load"), figures)


class OmittedRow(RowError):
    """A row that nothing is wrong with: params.yaml wants fewer."""


class Intake(ExitStack):
    """Takes in rows one by one: normalizes, checks, drops duplicates, and writes each to where it belongs.

    Args:
        folder: Output folder.
        section: The section `load` of params.yaml.
    """

    def __init__(self, folder: Path, section: LoadSection) -> None:
        super().__init__()
        self._section = section
        self._ledger = self.enter_context(Ledger(folder / "ledger.jsonl", "load"))
        self._writers = {name: self.enter_context(JsonlWriter(folder / f"{name}.jsonl")) for name in ("train", "eval")}
        self._selection = Selection(section.seed)
        self._row_checks = RowChecks(section.checks)
        self._set_checks = SetChecks(section.checks, self._writers)
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
            strata = self._strata(sources, chosen)
            self._held_out = self._selection.hold_out(strata, self._section.eval.count)
        for source, keys in zip(sources, chosen, strict=True):
            card = {"purpose": purpose, **source.card(), "dropped": Counter()}
            self.cards.append(card)
            for row in source.rows():
                if self._num_rows[purpose] % ROWS_BETWEEN_PROGRESS == 0:
                    progress(self._num_rows[purpose], total, f"{purpose} rows")
                self._num_rows[purpose] += 1
                self._take_row(row, source, keys, purpose)
        if sources:
            progress(total, total, f"{purpose} rows")

    def _take_row(self, row: Row, source: Source, chosen: frozenset[bytes] | None, purpose: str) -> None:
        try:
            record, notes = self._record(row, source)
            target, copies = self._place(record, notes, row.id, source, chosen, purpose)
        except RowError as error:
            action = Action.OMIT if isinstance(error, OmittedRow) else Action.DROP
            self._enter(row.id, Note(action, Problem(error.reason, str(error))), len(self.cards) - 1, purpose)
            return
        for note in notes:
            self._enter(row.id, note, len(self.cards) - 1, purpose)
        self._set_checks.add(record, target, copies, len(self.cards) - 1)
        for copy in range(copies):
            self._writers[target].write({"id": f"{row.id}+{copy}" if copy else row.id, **record})
        self._num_repeated += copies - 1

    def _enter(self, row_id: str, note: Note, source: int, purpose: str) -> None:
        """Enter a row in the ledger, and in the accounts of its source when it is left out."""
        self._ledger.enter(row_id, note.problem.reason, note.problem.detail, note.action)
        if note.action in (Action.DROP, Action.OMIT):
            self.cards[source]["dropped"][note.problem.reason] += 1
        self._num_dropped[purpose] += note.action is Action.DROP

    def _record(self, row: Row, source: Source) -> tuple[dict[str, Any], list[Note]]:
        """The row as a record that is fit for training, and what was found in it."""
        record = normalize(source.mapping.apply(row.columns), source.layout, prune_nulls=row.from_arrow)
        record, notes = self._row_checks.inspect(record)
        problems = validate_record(record, require_alternation=self._section.require_alternation)
        if problems:
            raise RowError(problems[0].reason, "; ".join(problem.detail for problem in problems))
        return record, notes

    def _place(
        self,
        record: dict[str, Any],
        notes: list[Note],
        row_id: str,
        source: Source,
        chosen: frozenset[bytes] | None,
        purpose: str,
    ) -> tuple[str, int]:
        """Where a record goes, and how many times; notes that it is there already are added to the others."""
        key = bytes.fromhex(record_digest(record))
        fraction = self._section.eval.fraction
        held_out = key in self._held_out or (fraction is not None and self._selection.position(key) < fraction)
        target = "eval" if held_out else purpose
        is_repeated = key in self._seen[target]
        notes += self._notes_of_repetition(key, target)
        self._seen[target].setdefault(key, row_id)
        if chosen is not None and (key not in chosen or is_repeated):
            raise OmittedRow("max_rows", f"not among the {source.section.max_rows} rows that max_rows takes")
        weight = source.section.weight if target == "train" else 1.0
        copies = self._selection.copies(key, weight)
        if copies == 0:
            raise OmittedRow("weight", f"not among the rows that weight {weight} takes")
        return target, copies

    def _notes_of_repetition(self, key: bytes, target: str) -> list[Note]:
        """What is to be noted of a row that is there already; among held-out rows a second one is always dropped."""
        checks, notes = self._section.checks, []
        action = "drop" if target == "eval" else checks.duplicate
        for split, reason, wanted in ((target, "duplicate", action), ("eval", "in_eval", checks.in_eval)):
            if wanted == "off" or key not in self._seen[split]:
                continue
            problem = Problem(reason, f"the same as {self._seen[split][key]}")
            if wanted == "drop":
                raise RowError(*problem)
            notes.append(Note(Action(wanted), problem))
        return notes

    def _keys(self, source: Source) -> Iterator[bytes]:
        """What a source's good rows are known by; rows that are not good come to the ledger when they are taken."""
        for row in source.rows():
            try:
                yield bytes.fromhex(record_digest(self._record(row, source)[0]))
            except RowError:
                continue

    def _choose(self, source: Source) -> frozenset[bytes] | None:
        """The rows that `max_rows` takes; None where it takes all."""
        if source.section.max_rows is None:
            return None
        return self._selection.choose(set(self._keys(source)) - self._seen["eval"].keys(), source.section.max_rows)

    def _strata(self, sources: list[Source], chosen: list[frozenset[bytes] | None]) -> list[set[bytes]]:
        """The rows of every source of which some are held out; what several have belongs to the first."""
        strata: list[set[bytes]] = []
        for source, keys in zip(sources, chosen, strict=True):
            mine = set(self._keys(source)) if keys is None else set(keys)
            strata.append(mine.difference(*strata))
        return strata

    def look_at_all(self) -> None:
        """Look at the training rows as a whole, once all are there, and take out what is to be dropped."""
        rows, removed = self._set_checks.rows["train"], set[int]()
        for row, note in list(self._set_checks.findings()):
            self._enter(self._set_checks.row_id(row), note, rows.sources[row], "train")
            if note.action is Action.DROP:
                removed.update(range(rows.lines[row], rows.lines[row] + rows.copies[row]))
                self._num_repeated -= rows.copies[row] - 1
        if removed:
            self._writers["train"].remove(removed)

    def close_accounts(self) -> dict[str, Any]:
        """Make sure that every row is accounted for and that enough are left; returns the stage's figures.

        Raises:
            ValueError: More rows were dropped than `max_dropped_fraction` allows, a check with the action `fail` found
                something, or no row is left.
        """
        num_in = sum(self._num_rows.values())
        num_out = {name: writer.num_rows for name, writer in self._writers.items()}
        accounted = sum(num_out.values()) - self._num_repeated + self._ledger.num_left_out
        assert num_in == accounted, "a row is neither written nor in the ledger"
        self._check_dropped()
        for name, count in num_out.items():
            if count == 0:
                raise ValueError(self._nothing_left(name))
        for card in self.cards:
            card["dropped"] = dict(sorted(card["dropped"].items()))
        counts = {action: dict(sorted(self._ledger.counts[action].items())) for action in Action}
        num_dropped = sum(counts[Action.DROP].values())
        return {
            "num_rows_in": num_in,
            "num_train": num_out["train"],
            "num_eval": num_out["eval"],
            "num_repeated": self._num_repeated,
            "num_omitted": sum(counts[Action.OMIT].values()),
            "num_dropped": num_dropped,
            "dropped_fraction": round(num_dropped / num_in, 6),
            "dropped": counts[Action.DROP],
            "repaired": counts[Action.REPAIR],
            "warned": counts[Action.WARN],
        }

    def _check_dropped(self) -> None:
        if self._ledger.counts[Action.FAIL]:
            found = self._ledger.summary(Action.FAIL)
            raise ValueError(f"params.yaml, load.checks: {found}. Mend the data, or state warn or drop instead of fail")
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
        dropped = f"; dropped were {self._ledger.summary()}" if self._ledger.num_left_out else ""
        return f"no row is left for {name}{why}{dropped}. Give more rows, or another split"
