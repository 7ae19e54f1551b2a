"""The packed rows of a stream as a data set for the trainer, whose place is in every checkpoint.

A window of rows is read, packed and shuffled at a time. A checkpoint has the place where the window of its last row
begins, so that a resumed training prepares this one window again and goes on with the row after that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerCallback
from transformers import trainer as trainer_module

from stages.checkout.artifacts import read_json, write_json
from stages.checkout.paths import STREAM, Paths
from stages.streaming.books import Books, figures_of, join_ledgers, sync
from stages.streaming.recipe import Recipe
from stages.streaming.records import StreamedRecords
from stages.streaming.windows import WindowPacker


class Mark(NamedTuple):
    """Where a window begins.

    Args:
        first_row: Number of packed rows before it, those of all passes together.
        records: State of the records.
        books: State of the accounts.
    """

    first_row: int
    records: Mapping[str, Any]
    books: Mapping[str, Any]


class StreamedRows(torch.utils.data.IterableDataset):
    """Packed rows without end: after a pass over the sources, the next one begins.

    Args:
        recipe: How rows are read and prepared.
        paths: The checkout.
        folder: Folder of the ledgers while training goes on.
        seed: Seed of the order of rows; None = the order in which they are packed.
        with_weights: See `WindowPacker`.
        checkpoint: Checkpoint to go on from; None = at the beginning.
        num_trained: Number of packed rows that were trained until then.

    Attributes:
        column_names: Columns of the rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        paths: Paths,
        folder: Path,
        *,
        seed: int | None,
        with_weights: bool,
        checkpoint: Path | None = None,
        num_trained: int = 0,
    ) -> None:
        super().__init__()
        self._recipe, self._paths, self._folder = recipe, paths, folder
        self._seed, self._num_trained = seed, num_trained
        self._packer = WindowPacker(recipe, with_weights=with_weights)
        lengths = [] if recipe.pack.strategy == "none" else ["seq_lengths"]
        self.column_names = ["input_ids", "labels", *(["loss_weights"] if with_weights else []), *lengths]
        self._start = None if checkpoint is None else Mark(**read_json(checkpoint / STREAM))
        self._marks: deque[Mark] = deque()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield packed rows from the place of the checkpoint.

        Raises:
            ValueError: A limit on lost rows or tokens is exceeded, or no row of a whole pass is trained.
        """
        start = self._start
        books = Books(self._recipe, self._folder, None if start is None else start.books)
        first_row = 0 if start is None else start.first_row
        reading = StreamedRecords(self._recipe, self._paths, None if start is None else start.records)
        with closing(books), reading as records:
            self._marks = deque([Mark(first_row, records.state(), books.state())])
            first_of_pass = first_row if start is None else -1
            while True:
                num_pass, num_window = records.num_pass, records.num_window
                open_books = books if num_pass == 0 else None
                window = records.next_window(open_books)
                if window is None:
                    if first_row == first_of_pass:
                        raise ValueError(f"no row of the stream is trained; {self._folder} has the reasons")
                    first_of_pass = first_row
                    continue
                table = self._packer.pack(window, open_books) if window else None
                if open_books is not None:
                    open_books.check()
                num_rows = 0 if table is None else len(table)
                self._marks.append(Mark(first_row + num_rows, records.state(), books.state()))
                if table is not None:
                    order = self._order(num_rows, num_pass, num_window)
                    for number in order[max(0, self._num_trained - first_row) :]:
                        yield {name: table[name][number].as_py() for name in table.column_names}
                first_row += num_rows

    def _order(self, num_rows: int, num_pass: int, num_window: int) -> list[int]:
        if self._seed is None:
            return list(range(num_rows))
        return np.random.default_rng([self._seed, num_pass, num_window]).permutation(num_rows).tolist()

    def place_of(self, num_trained: int) -> Mark:
        """Return the beginning of the window that has the next row to train; forget the windows before it."""
        while len(self._marks) > 1 and self._marks[1].first_row <= num_trained:
            self._marks.popleft()
        return self._marks[0]

    def save_place(self, checkpoint: Path, num_trained: int) -> None:
        """Write the place into a checkpoint, after the ledgers up to it are on the disk."""
        sync(self._folder)
        write_json(checkpoint / STREAM, self.place_of(num_trained)._asdict())

    def write_accounts(self, folder: Path, num_trained: int) -> dict[str, Any]:
        """Write the ledger and the figures of all windows of which a row was trained.

        Args:
            folder: Where `ledger.jsonl` and `stream.json` are written.
            num_trained: Number of packed rows that were trained.

        Returns:
            The figures. Those of rows and tokens are of the first pass.
        """
        end = next(mark for mark in self._marks if mark.first_row >= num_trained)
        figures = {"rows_trained": num_trained, "passes_begun": int(end.records["pass"]) + 1, **figures_of(end.books)}
        folder.mkdir(parents=True, exist_ok=True)
        join_ledgers(self._folder, end.books, folder / "ledger.jsonl")
        write_json(folder / STREAM, figures)
        return figures


class KeepPlace(TrainerCallback):
    """Callback that writes the place of a stream into each checkpoint.

    Args:
        rows: The stream.
        rows_per_update: Number of packed rows of an update.
    """

    def __init__(self, rows: StreamedRows, rows_per_update: int) -> None:
        self._rows, self._rows_per_update = rows, rows_per_update

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the windows that all rows were trained of."""
        self._rows.place_of(state.global_step * self._rows_per_update)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the place."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._rows.save_place(checkpoint, state.global_step * self._rows_per_update)


@contextmanager
def beginning_at_place() -> Iterator[None]:
    """Have a resumed `transformers.Trainer` take the first batch of a stream that begins at the checkpoint's place.

    It would read and skip as many batches as were trained before.
    """
    own = trainer_module.skip_first_batches
    trainer_module.skip_first_batches = lambda loader, num_batches: loader
    try:
        yield
    finally:
        trainer_module.skip_first_batches = own
