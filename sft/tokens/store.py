"""Storage of tokenized documents in plain files, read back in pieces, so that memory does not grow with the tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from sft.labels import IGNORE_INDEX
from sft.tokens.columns import COLUMN_TYPES, Integers, Pieces
from sft.tokens.encoding import TokenBatch


class FileColumn:
    """One token column in a file, document after document.

    The file is not memory-mapped: pages of a map that have been read count as resident memory, and reading in the
    order of packed rows touches all of them.

    Args:
        file: The open file.
        dtype: Type of the values in the file.
        lengths: `(num_documents,)` number of tokens in each document.
    """

    def __init__(self, file: IO[bytes], dtype: Any, lengths: Integers) -> None:
        self._file = file
        self._dtype = np.dtype(dtype)
        self._lengths = lengths
        self._starts = np.cumsum(lengths) - lengths

    def lengths(self) -> Integers:
        """Return the number of tokens in each document, `(num_documents,)`."""
        return self._lengths

    def gather(self, pieces: Pieces, dtype: Any) -> np.ndarray[Any, Any]:
        """Return the values of all pieces one after another, `(sum of lengths,)`."""
        output = np.empty(int(pieces.length.sum()), dtype=self._dtype)
        view, place = output.view(np.uint8).data, 0
        for start, length in self._stretches(pieces):
            read = os.preadv(self._file.fileno(), [view[place : place + length]], start)
            if read != length:
                raise OSError(f"{self._file.name}: {read} bytes at {start} instead of {length}")
            place += length
        return output.astype(dtype, copy=False)

    def _stretches(self, pieces: Pieces) -> list[tuple[int, int]]:
        """Return start and length in bytes of the reads; adjacent pieces are combined into one read."""
        pieces = pieces[pieces.length > 0]
        starts = self._starts[pieces.document] + pieces.start
        begins = np.ones(len(pieces), dtype=bool)
        begins[1:] = starts[1:] != starts[:-1] + pieces.length[:-1]
        places = np.flatnonzero(begins)
        lengths = np.add.reduceat(pieces.length, places) if len(places) else pieces.length
        size = self._dtype.itemsize
        return list(zip((starts[places] * size).tolist(), (lengths * size).tolist(), strict=True))


class TokenStore:
    """Store documents batch by batch and give them back as columns.

    Args:
        folder: An empty folder for the files; the caller deletes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._lengths: list[Integers] = []
        self._trained: list[Integers] = []

    def append(self, batch: TokenBatch) -> None:
        """Append a batch."""
        columns = batch.columns()
        if "loss_weights" in columns and "loss_weights" not in self._files:
            self._weigh_former_documents()
        elif "loss_weights" in self._files and "loss_weights" not in columns:
            columns["loss_weights"] = _plain_weights(batch.labels)
        for name, values in columns.items():
            self._file(name).write(values.tobytes())
        self._lengths.append(batch.lengths)
        running = np.concatenate([[0], np.cumsum(batch.labels != IGNORE_INDEX)])
        ends = np.cumsum(batch.lengths)
        self._trained.append(running[ends] - running[ends - batch.lengths])

    def columns(self) -> dict[str, FileColumn]:
        """Return the columns of all documents so far, with `loss_weights` if any batch has them."""
        lengths = np.concatenate([np.zeros(0, dtype=np.int64), *self._lengths])
        columns = {}
        for name in ("input_ids", "labels", *(["loss_weights"] if "loss_weights" in self._files else [])):
            file = self._file(name)
            file.flush()
            columns[name] = FileColumn(file, COLUMN_TYPES.get(name, np.int32), lengths)
        return columns

    def trained(self) -> Integers:
        """Return the number of trained tokens in each document, `(num_documents,)`."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._trained])

    def close(self) -> None:
        """Close the files; columns can't be read afterwards."""
        for file in self._files.values():
            file.close()

    def _file(self, name: str) -> IO[bytes]:
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.bin").open("w+b")
        return self._files[name]

    def _weigh_former_documents(self) -> None:
        """Write weights for the documents before the first batch with weights."""
        weights, columns = self._file("loss_weights"), self.columns()
        lengths = columns["labels"].lengths()
        for document in range(len(lengths)):
            piece = Pieces(*(np.array([value], dtype=np.int64) for value in (document, 0, lengths[document])))
            weights.write(_plain_weights(columns["labels"].gather(piece, np.int32)).tobytes())


def _plain_weights(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (labels != IGNORE_INDEX).astype(np.float32)
