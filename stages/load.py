"""Stage `load`: sources to validated records, separate held-out rows, and a ledger of dropped and conspicuous rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sft.data.messages import Problem, RowError, validate_record
from sft.data.records import normalize, numbers_as_text, record_digest
from sft.data.source_row import Row
from sft.folders import replacing_folder
from stages.checkout.artifacts import JsonlWriter, write_json
from stages.checkout.ledger import Action, Ledger
from stages.checkout.paths import Paths
from stages.loading.accounts import Accounts
from stages.loading.checks import Note, RowChecks, SetChecks
from stages.loading.images import IMAGE_REASONS, Home, ImageStore
from stages.loading.rehearsal import card, read_asked, rehearse
from stages.loading.rehearsed import SOURCE, write_summary
from stages.loading.selection import Selection
from stages.loading.sources import Source, open_source
from stages.loading.suggestions import option_line, suggest_options
from stages.models.resolve import resolve_base_model
from stages.params.schema import LoadSection, Params
from stages.progress import progress, stage_progress

ROWS_BETWEEN_PROGRESS = 500
NOT_TEXT = ("not_text", "content_not_text")
"""Reasons of rows that may contain a number where text is needed."""


@stage_progress("load")
def run(params: Params, paths: Paths) -> None:
    """Read all sources, check every row, and write outs/load.

    Raises:
        ValueError: A source is missing, damaged or empty, too many rows were dropped, a check with the action `fail`
            found something, no row is left, or the base model can't be found.
    """
    section = params.load
    with_damaged = section.checks.unreadable == "drop"
    sources = [(part, f"load.sources[{i}].path") for i, part in enumerate(section.sources)]
    train = [open_source(part, paths, key, with_damaged=with_damaged) for part, key in sources]
    file = section.eval.source()
    held_out = [open_source(file, paths, "load.eval.path", with_damaged=with_damaged)] if file else []
    base_model = resolve_base_model(params.model, paths.root)
    with replacing_folder(paths.out("load")) as folder:
        images = ImageStore(folder / paths.images.name, section.images, Path(base_model.path))
        with Intake(folder, section, images, paths.data) as intake:
            intake.take(held_out, "eval")
            intake.take(train, "train")
            intake.check_training_rows()
            if section.rehearsal is None:
                write_summary(folder / SOURCE, None)
            else:
                described = card(section.rehearsal, read_asked(section.rehearsal, paths))
                rows = rehearse(section.rehearsal, params.model, base_model, paths, folder / SOURCE)
                intake.take_rehearsal(rows, described)
            figures = intake.close_accounts()
        write_json(folder / "card.json", {"sources": intake.accounts.cards, **figures})
        write_json(folder / "base_model.json", base_model.record())
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
        self._data = data
        self.accounts = Accounts(section, self.enter_context(Ledger(folder / "ledger.jsonl", "load")))
        self._writers = {name: self.enter_context(JsonlWriter(folder / f"{name}.jsonl")) for name in ("train", "eval")}
        self._selection = Selection(section.seed)
        self._row_checks = RowChecks(section.checks)
        self._set_checks = SetChecks(section.checks, self._writers)
        self._seen: dict[str, dict[bytes, str]] = {"train": {}, "eval": {}}
        self._held_out: frozenset[bytes] = frozenset()
        self._hints: dict[tuple[str, str], str] = {}

    def take(self, sources: list[Source], purpose: str) -> None:
        """Check and write all rows of sources.

        Args:
            sources: The sources.
            purpose: `train` or `eval`. A part of the rows of `train` may be held out, and is written to `eval`.
        """
        total, num_rows = sum(source.num_rows for source in sources), self.accounts.num_rows
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
                self._take_row(row, source, keys, purpose)
        if sources:
            progress(total, total, f"{purpose} rows")

    def _take_row(self, row: Row, source: Source, chosen: frozenset[bytes] | None, purpose: str) -> None:
        number = len(self.accounts.cards) - 1
        try:
            record, notes = self._record(row, source)
            target, copies = self._place(record, notes, row.id, source, chosen, purpose)
        except RowError as error:
            action = Action.OMIT if isinstance(error, OmittedRow) else Action.DROP
            detail = f"{error}{self._hint(error, row, source)}"
            self.accounts.enter(row.id, Note(action, Problem(error.reason, detail)), number, purpose)
            return
        for note in notes:
            self.accounts.enter(row.id, note, number, purpose)
        self._set_checks.add(record, target, copies, number)
        for copy in range(copies):
            self._writers[target].write({"id": f"{row.id}+{copy}" if copy else row.id, **record})
        self.accounts.num_repeated += copies - 1

    def _hint(self, error: RowError, row: Row, source: Source) -> str:
        """Return the options of the source with which a row could be read; empty if there are none."""
        if not error.mapping:
            return ""
        found = (source.section.path, str(error.mapping))
        if found not in self._hints:
            options = suggest_options(source.section, [row])
            lines = ", ".join(option_line(name, names) for name, names in options.items())
            self._hints[found] = f"; an option of the source in params.yaml reads it: {lines}" if lines else ""
        return self._hints[found]

    def _record(self, row: Row, source: Source) -> tuple[dict[str, Any], list[Note]]:
        """Return the row as a record that is valid for training, and what was found in it."""
        record, of_numbers = self._normalized(row, source)
        record, notes = self._row_checks.inspect(record)
        return record, [*of_numbers, *notes, *self._validated(record)]

    def _validated(self, record: dict[str, Any]) -> list[Note]:
        """Check that a record is valid for training; return a note of empty answers if they are allowed."""
        problems = validate_record(record, require_alternation=self._section.require_alternation)
        wanted = self._section.checks.empty_answer
        invalid = [problem for problem in problems if problem.reason != "empty_answer" or wanted == "drop"]
        if invalid:
            raise RowError(invalid[0].reason, "; ".join(problem.detail for problem in invalid))
        return [Note(Action(wanted), problem) for problem in problems[:1] if wanted != "off"]

    def _normalized(self, row: Row, source: Source) -> tuple[dict[str, Any], list[Note]]:
        """Return the row as a record, and a note if numbers in it were changed to text."""
        if row.damage is not None:
            raise RowError("unreadable", str(row.damage))
        columns = source.mapping.apply(row.columns)
        try:
            record = normalize(columns, source.layout, prune_nulls=row.has_added_nulls)
            return self._with_images(record, columns, row, source), []
        except RowError as error:
            columns, found = numbers_as_text(columns, source.layout)
            if error.reason not in NOT_TEXT or not found:
                raise
        wanted, problem = self._section.checks.number, Problem("number", "; ".join(found)[:300])
        if wanted == "drop":
            raise RowError("number", f"{problem.detail}, where text is needed; load.checks.number: repair writes it so")
        record = normalize(columns, source.layout, prune_nulls=row.has_added_nulls)
        return self._with_images(record, columns, row, source), [Note(Action(wanted), problem)]

    def _with_images(self, record: dict[str, Any], columns: dict[str, Any], row: Row, source: Source) -> dict[str, Any]:
        """Return a record with the names of its images' files, see `ImageStore.placed`.

        Raises:
            RowError: An image can't be used.
            ValueError: The same, and `load.checks.image` is `fail`.
        """
        home = Home(source.folder_of(row, self._data), self._data)
        try:
            return self._images.placed(record, columns, source.layout.content, home)
        except RowError as error:
            if error.reason in IMAGE_REASONS and self._section.checks.image == "fail":
                raise ValueError(f"params.yaml, load.checks.image: {row.id}: {error}") from None
            raise

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
                yield bytes.fromhex(record_digest(self._record(row, source)[0]))
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
        if removed:
            self._writers["train"].remove(removed)

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
