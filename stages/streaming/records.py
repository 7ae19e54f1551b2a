"""The valid records of a stream, window by window, in as many passes as needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sft.data.messages import Problem, RowError
from sft.data.records import record_digest
from sft.data.source_row import Row
from stages.checkout.ledger import Action
from stages.checkout.paths import Paths
from stages.loading.checks import Note
from stages.loading.images import ImageStore
from stages.loading.selection import Selection
from stages.loading.sources import RecordReader
from stages.loading.streams import ColumnWatch, Interleaved, open_stream
from stages.streaming.books import Books
from stages.streaming.recipe import Recipe

REMEMBERED_WINDOWS = 20
"""Windows whose rows are remembered, to find duplicates of them."""


class StreamedRecords(ExitStack):
    """Records of the sources, read in turn.

    Args:
        recipe: How they are read.
        paths: The checkout.
        state: Where to go on, as `state` returned it; None = at the beginning.

    Attributes:
        num_pass: Number of the pass that is being read, from 0.
        num_window: Number of windows of this pass that have been read.
    """

    def __init__(self, recipe: Recipe, paths: Paths, state: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._section = recipe.load
        self._held_out = recipe.held_out
        self._selection = Selection(recipe.load.seed)
        with_damaged = recipe.load.checks.unreadable == "drop"
        self._sources = [
            open_stream(described, number, paths, with_damaged=with_damaged)
            for number, described in enumerate(recipe.sources)
        ]
        self._watches = [
            ColumnWatch(source, described["columns"])
            for source, described in zip(self._sources, recipe.sources, strict=True)
        ]
        base = recipe.work.image_model or Path()
        scratch = Path(self.enter_context(TemporaryDirectory(prefix="sft-stream-")))
        self._reader = RecordReader(recipe.load, ImageStore(scratch / "images", recipe.load, base), paths.data)
        start = {"pass": 0, "window": 0, "num_read": None, "seen": {}} if state is None else state
        self.num_pass, self.num_window = start["pass"], start["window"]
        self._seen = {bytes.fromhex(key): row_id for key, row_id in start["seen"].items()}
        self._reading = Interleaved(self._sources, start["num_read"])
        self._rows = iter(self._reading)

    def state(self) -> dict[str, Any]:
        """Return the place of the next window, as plain values."""
        seen = {key.hex(): row_id for key, row_id in self._seen.items()}
        place = {"pass": self.num_pass, "window": self.num_window}
        return {**place, "num_read": list(self._reading.num_read), "seen": seen}

    def next_window(self, books: Books | None) -> list[dict[str, Any]] | None:
        """Return the records of the next window; None at the end of a pass, after which the next one begins.

        Args:
            books: Gets the counts and ledger entries; None = they are not wanted.
        """
        records: list[dict[str, Any]] = []
        num_rows = 0
        for number, row in itertools.islice(self._rows, self._section.streaming_window):
            num_rows += 1
            self._watches[number].check(row)
            records += self._records(row, number, books)
        if num_rows == 0:
            self.num_pass, self.num_window, self._seen = self.num_pass + 1, 0, {}
            self._reading = Interleaved(self._sources)
            self._rows = iter(self._reading)
            return None
        self.num_window += 1
        return records

    def _records(self, row: Row, number: int, books: Books | None) -> Iterator[dict[str, Any]]:
        """Yield the record of a row, as many times as its source's weight says."""
        notes: list[Note] = []
        try:
            record, notes = self._reader.read(row, self._sources[number])
            key = bytes.fromhex(record_digest(record))
            if self._section.eval.fraction is not None and self._selection.position(key) < self._section.eval.fraction:
                if books is not None:
                    books.counts["held_out"] += 1
                return
            notes = [*notes, *self._duplicate_notes(key, row.id)]
            copies = self._selection.copies(key, self._sources[number].section.weight)
            if copies == 0:
                weight = self._sources[number].section.weight
                problem = Problem("weight", f"not among the rows that weight {weight} takes")
                notes = [Note(Action.OMIT, problem)]
        except RowError as error:
            copies = 0
            detail = f"{error}{self._reader.hint(error, row, self._sources[number])}"
            notes = [Note(Action.DROP, Problem(error.reason, detail))]
        if books is not None:
            books.accounts.num_rows["train"] += 1
            books.accounts.num_repeated += max(0, copies - 1)
            for note in notes:
                books.enter(row.id, note, number)
        for copy in range(copies):
            yield {"id": f"{row.id}+{copy}" if copy else row.id, **record}

    def _duplicate_notes(self, key: bytes, row_id: str) -> list[Note]:
        """Remember a row; return notes if it is held out, or was read before and is remembered."""
        checks, notes = self._section.checks, []
        for reason, wanted, known in (
            ("duplicate", checks.duplicate, self._seen),
            ("in_eval", checks.in_eval, self._held_out),
        ):
            if wanted == "off" or key not in known:
                continue
            problem = Problem(reason, f"the same as {known[key]}")
            if wanted == "drop":
                raise RowError(*problem)
            notes.append(Note(Action(wanted), problem))
        if checks.duplicate != "off" and key not in self._seen:
            self._seen[key] = row_id
            if len(self._seen) > REMEMBERED_WINDOWS * self._section.streaming_window:
                del self._seen[next(iter(self._seen))]
        return notes
