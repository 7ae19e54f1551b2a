"""Stage `load`: sources to validated records, separate held-out rows, and a ledger of dropped and conspicuous rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sft.data.messages import Problem, RowError
from sft.data.records import record_digest
from sft.data.source_row import Row
from sft.folders import replacing_folder
from stages.checkout.artifacts import JsonlWriter, code_digest, write_json
from stages.checkout.ledger import Action, Ledger
from stages.checkout.paths import CURRICULUM, EVAL_SOURCES, STREAM, Paths
from stages.loading.accounts import Accounts
from stages.loading.checks import Note, SetChecks
from stages.loading.images import ImageStore
from stages.loading.rehearsal import card, read_asked, rehearse
from stages.loading.rehearsed import SOURCE, write_summary
from stages.loading.selection import Selection, interleaved
from stages.loading.sources import RecordReader, Source, open_source
from stages.loading.streams import Interleaved, describe_stream, pinned
from stages.models.resolve import resolve_base_model
from stages.params.schema import BY_LENGTH, LoadSection, Params
from stages.progress import progress, stage_progress

ROWS_BETWEEN_PROGRESS = 500


@stage_progress("load")
def run(params: Params, paths: Paths) -> None:
    """Read all sources, check every row, and write outs/load.

    Raises:
        ValueError: A source is missing, damaged or empty, too many rows were dropped, a check with the action `fail`
            found something, no row is left, or the base model can't be found.
    """
    section = params.load
    with_damaged = section.checks.unreadable == "drop"
    parts = [pinned(part) for part in section.sources] if section.streaming else section.sources
    keys = [f"load.sources[{i}].path" for i in range(len(parts))]
    train = [
        open_source(part, paths, key, with_damaged=with_damaged, begin_only=section.streaming and part.hub).with_number(
            section.curriculum, key
        )
        for part, key in zip(parts, keys, strict=True)
    ]
    file = section.eval.source()
    held_out = [open_source(file, paths, "load.eval.path", with_damaged=with_damaged)] if file else []
    base_model = resolve_base_model(params.model, paths.root)
    with replacing_folder(paths.out("load")) as folder:
        images = ImageStore(folder / paths.images.name, section, Path(base_model.path))
        with Intake(folder, section, images, paths.data) as intake:
            intake.take(held_out, "eval")
            if section.streaming:
                intake.take_first(train, section.streaming_window)
            else:
                intake.take(train, "train")
            intake.check_training_rows()
            if section.rehearsal is None:
                write_summary(folder / SOURCE, None)
            else:
                described = card(section.rehearsal, read_asked(section.rehearsal, paths))
                rows = rehearse(section.rehearsal, params.model, base_model, paths, folder / SOURCE)
                intake.take_rehearsal(rows, described)
            figures = intake.close_accounts()
        facts = {"streaming": section.streaming or None, "curriculum": section.curriculum}
        stated = {name: value for name, value in facts.items() if value is not None}
        write_json(folder / "card.json", {"sources": intake.accounts.cards, **figures, **stated})
        if (held_out_sources := intake.eval_sources()) is not None:
            write_json(folder / EVAL_SOURCES, held_out_sources)
        write_json(folder / "base_model.json", base_model.record())
        if section.streaming:
            code = code_digest("sft/data", "stages/loading")
            stream = {**describe_stream(section, train, intake.held_out()), "code": code}
            write_json(folder / STREAM, stream)
    write_json(paths.metrics("load"), figures)


class OmittedRow(RowError):
    """A valid row that is not taken, because params.yaml asks for fewer rows."""


class Intake(ExitStack):
    """Normalization, checks and writing of the rows of all sources, one by one, to the splits `train` and `eval`.

    Args:
        folder: Output folder.
        section: The section `load` of params.yaml.
        images: Folder of the rows' images.
        data: The folder that paths of images may not lead out of.
    """

    def __init__(self, folder: Path, section: LoadSection, images: ImageStore, data: Path) -> None:
        super().__init__()
        self._section = section
        self._images = images
        self._reader = RecordReader(section, images, data)
        self.accounts = Accounts(section, self.enter_context(Ledger(folder / "ledger.jsonl", "load")))
        self._writers = {name: self.enter_context(JsonlWriter(folder / f"{name}.jsonl")) for name in ("train", "eval")}
        self._selection = Selection(section.seed)
        self._set_checks = SetChecks(section.checks, self._writers)
        self._seen: dict[str, dict[bytes, str]] = {"train": {}, "eval": {}}
        self._held_out: frozenset[bytes] = frozenset()
        self._eval_sources: dict[str, int] = {}
        self._numbers: JsonlWriter | None = None
        if section.curriculum not in (None, BY_LENGTH):
            self._numbers = self.enter_context(JsonlWriter(folder / CURRICULUM))

    def take(self, sources: list[Source], purpose: str) -> None:
        """Check and write all rows of sources.

        Args:
            sources: The sources.
            purpose: `train` or `eval`. A part of the rows of `train` may be held out, and is written to `eval`.
        """
        total, num_rows = sum(source.num_rows or 0 for source in sources), self.accounts.num_rows
        chosen = [self._choose(source) for source in sources]
        if purpose == "train" and self._section.eval.count is not None:
            strata = self._strata(sources, chosen)
            self._held_out = self._selection.hold_out(strata, self._section.eval.count)
        for source, keys in zip(sources, chosen, strict=True):
            self.accounts.open_source(source.card(), purpose)
            for row in source.rows():
                if num_rows[purpose] % ROWS_BETWEEN_PROGRESS == 0:
                    progress(num_rows[purpose], total, f"{purpose} rows")
                num_rows[purpose] += 1
                self._take_row(row, source, len(self.accounts.cards) - 1, keys, purpose)
        if sources:
            progress(total, total, f"{purpose} rows")

    def take_first(self, sources: list[Source], num_rows: int) -> None:
        """Check and write the first rows of a stream, and every row that `load.eval.fraction` holds out.

        The other rows are not counted: `train` checks them when it reads them.

        Args:
            sources: The sources, which are read in turn.
            num_rows: Number of rows to take besides those that are held out.
        """
        first = len(self.accounts.cards)
        for source in sources:
            self.accounts.open_source(source.card(), "train")
        for number, row in Interleaved(sources):
            is_first = self.accounts.num_rows["train"] < num_rows
            if not is_first and self._section.eval.fraction is None:
                break
            if is_first or self._is_held_out(row, sources[number]):
                self.accounts.num_rows["train"] += 1
                self._take_row(row, sources[number], first + number, None, "train")
                progress(min(self.accounts.num_rows["train"], num_rows), num_rows, "first rows of the stream")

    def _is_held_out(self, row: Row, source: Source) -> bool:
        """Return whether `load.eval.fraction` holds out a row, which may be invalid."""
        try:
            key = bytes.fromhex(record_digest(self._reader.read(row, source)[0]))
        except RowError:
            return False
        return self._selection.position(key) < (self._section.eval.fraction or 0)

    def eval_sources(self) -> dict[str, Any] | None:
        """Return the names of the sources that held-out rows are from, and which one each row has; None if only one."""
        used = sorted(set(self._eval_sources.values()))
        if len(used) < 2:
            return None
        names: list[str] = []
        for number in used:
            name = re.sub(r"[^\w.-]+", "_", self.accounts.cards[number]["path"].rstrip("/").rpartition("/")[2])
            names.append(f"{name}_{number}" if name in names else name)
        return {"names": names, "rows": {row_id: used.index(each) for row_id, each in self._eval_sources.items()}}

    def held_out(self) -> dict[str, str]:
        """Return the digests of the held-out rows, each with the row's id."""
        return {key.hex(): row_id for key, row_id in self._seen["eval"].items()}

    def _take_row(self, row: Row, source: Source, number: int, chosen: frozenset[bytes] | None, purpose: str) -> None:
        try:
            record, notes = self._reader.read(row, source)
            number_of_row = 0.0
            if self._numbers is not None and purpose == "train":
                number_of_row = source.mapping.number(str(self._section.curriculum), row.columns)
            target, copies = self._place(record, notes, row.id, source, chosen, purpose)
        except RowError as error:
            action = Action.OMIT if isinstance(error, OmittedRow) else Action.DROP
            detail = f"{error}{self._reader.hint(error, row, source)}"
            self.accounts.enter(row.id, Note(action, Problem(error.reason, detail)), number, purpose)
            return
        for note in notes:
            self.accounts.enter(row.id, note, number, purpose)
        if target == "eval":
            self._eval_sources[row.id] = number
        self._set_checks.add(record, target, copies, number)
        for copy in range(copies):
            row_id = f"{row.id}+{copy}" if copy else row.id
            self._writers[target].write({"id": row_id, **record})
            if self._numbers is not None and target == "train":
                self._numbers.write({"id": row_id, "value": number_of_row})
        self.accounts.num_repeated += copies - 1

    def _place(
        self,
        record: dict[str, Any],
        notes: list[Note],
        row_id: str,
        source: Source,
        chosen: frozenset[bytes] | None,
        purpose: str,
    ) -> tuple[str, int]:
        """Return the split that a record is written to, and how many times; add notes of duplicates to `notes`."""
        key = bytes.fromhex(record_digest(record))
        fraction = self._section.eval.fraction
        held_out = key in self._held_out or (fraction is not None and self._selection.position(key) < fraction)
        target = "eval" if held_out else purpose
        is_repeated = key in self._seen[target]
        notes += self._duplicate_notes(key, target)
        self._seen[target].setdefault(key, row_id)
        if chosen is not None and (key not in chosen or is_repeated):
            raise OmittedRow("max_rows", f"not among the {source.section.max_rows} rows that max_rows takes")
        weight = source.section.weight if target == "train" else 1.0
        copies = self._selection.copies(key, weight)
        if copies == 0:
            raise OmittedRow("weight", f"not among the rows that weight {weight} takes")
        return target, copies

    def _duplicate_notes(self, key: bytes, target: str) -> list[Note]:
        """Return notes if a row was written before. A second held-out row is always dropped."""
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
        """Yield the digests of a source's valid rows. The others get their ledger entries in `take`."""
        for row in source.rows():
            try:
                yield bytes.fromhex(record_digest(self._reader.read(row, source)[0]))
            except RowError:
                continue

    def _choose(self, source: Source) -> frozenset[bytes] | None:
        """Return the rows that `max_rows` takes, or None if it takes all."""
        if source.section.max_rows is None:
            return None
        return self._selection.choose(set(self._keys(source)) - self._seen["eval"].keys(), source.section.max_rows)

    def _strata(self, sources: list[Source], chosen: list[frozenset[bytes] | None]) -> list[set[bytes]]:
        """Return the rows of every source, some of which are held out. A row of several belongs to the first."""
        strata: list[set[bytes]] = []
        for source, keys in zip(sources, chosen, strict=True):
            rows = set(self._keys(source)) if keys is None else set(keys)
            strata.append(rows.difference(*strata))
        return strata

    def check_training_rows(self) -> None:
        """Check the training rows as a set, after all of them were written, and remove those that are dropped."""
        rows, removed = self._set_checks.rows["train"], set[int]()
        for row, note in list(self._set_checks.findings()):
            self.accounts.enter(self._set_checks.row_id(row), note, rows.sources[row], "train")
            if note.action is Action.DROP:
                removed.update(range(rows.lines[row], rows.lines[row] + rows.copies[row]))
                self.accounts.num_repeated -= rows.copies[row] - 1
        if self._section.interleave.strategy != "concat":
            self._interleave(removed)
        elif removed:
            self._writers["train"].remove(removed)

    def _interleave(self, removed: Set[int]) -> None:
        """Mix the rows of all sources; rows that are not needed or repeated get an entry in the ledger.

        Args:
            removed: Lines of rows that are dropped.

        Raises:
            ValueError: No row of a source is left.
        """
        section, rows = self._section.interleave, self._set_checks.rows["train"]
        numbers = [number for number, card in enumerate(self.accounts.cards) if card["purpose"] == "train"]
        parts: dict[int, list[int]] = {number: [] for number in numbers}
        for line, source in zip(rows.lines, rows.sources, strict=True):
            if line not in removed:
                parts[source].append(line)
        paths = [source.path for source in self._section.sources]
        if empty := [path for path, part in zip(paths, parts.values(), strict=True) if not part]:
            raise ValueError(
                f"params.yaml, load.interleave: no row of {empty[0]} is left to be mixed with others; remove the source"
            )
        given = [source.share for source in self._section.sources]
        shares = [share for share in given if share is not None] or None
        order = interleaved(list(parts.values()), shares, section.strategy, section.seed)
        times = Counter(order)
        for row, (line, source) in enumerate(zip(rows.lines, rows.sources, strict=True)):
            if line in removed or times[line] == 1:
                continue
            if times[line]:
                note = Note(Action.REPEAT, Problem("interleave", f"{times[line]} times, until all sources are used up"))
            else:
                note = Note(Action.OMIT, Problem("interleave", "another source was used up first"))
            self.accounts.enter(self._set_checks.row_id(row), note, source, "train")
        self.accounts.num_repeated += len(order) - len(times)
        self._writers["train"].rearrange(order)

    def take_rehearsal(self, rows: list[dict[str, Any]], described: dict[str, Any]) -> None:
        """Write the rows that the base model answered to `train`, after all checks of the other rows.

        Args:
            rows: Rows of the rehearsal.
            described: What the data card states of their source.
        """
        self.accounts.open_source(described, SOURCE)
        number = len(self.accounts.cards) - 1
        for row in rows:
            self.accounts.num_rows[SOURCE] += 1
            answer = row["completion"][0]["content"]
            if row["unfinished"] is not None or not answer:
                action = Action.WARN if answer else Action.OMIT
                reason = "unfinished" if row["unfinished"] else "empty_answer"
                detail = f"{row['unfinished']}, {'ends after its last sentence' if answer else 'without a sentence'}"
                problem = Problem(reason, detail if row["unfinished"] else "the base model's answer is empty")
                self.accounts.enter(row["id"], Note(action, problem), number, SOURCE)
            if answer:
                self._writers["train"].write({name: row[name] for name in ("id", "prompt", "completion")})

    def close_accounts(self) -> dict[str, Any]:
        """Check that every row is accounted for and that enough are left; return the stage's figures.

        Raises:
            ValueError: As in `Accounts.close`.
        """
        figures = self.accounts.close({name: writer.num_rows for name, writer in self._writers.items()})
        for writer in self._writers.values():
            writer.close()
        self._images.close(writer.path for writer in self._writers.values())
        return figures
