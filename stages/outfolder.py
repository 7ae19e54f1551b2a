"""A stage's output folder that is replaced as a whole, and the ledger of rows that did not make it."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

NUM_EXAMPLES = 3


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of `path` on success and vanishes on failure.

    What was at `path` before stays untouched until then, so that a failed run destroys no earlier result.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if path.is_dir():
        shutil.rmtree(path)
    partial.replace(path)


class JsonlWriter:
    """Writes one JSON object a line, as rows come; counts them."""

    def __init__(self, path: Path) -> None:
        self.num_rows = 0
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.num_rows += 1

    def write_lines(self, lines: Sequence[str]) -> None:
        """Append rows that are JSON already."""
        self._file.writelines(f"{line}\n" for line in lines)
        self.num_rows += len(lines)


class Ledger(JsonlWriter):
    """Every row that a stage leaves out, with the reason; counts by reason and remembers the first ids of each.

    Args:
        path: JSON lines file.
        stage: The stage that writes it.
    """

    def __init__(self, path: Path, stage: str) -> None:
        super().__init__(path)
        self._stage = stage
        self.counts: Counter[str] = Counter()
        self._examples: defaultdict[str, list[str]] = defaultdict(list)

    def drop(self, row_id: str, reason: str, detail: str) -> None:
        """Enter one row.

        Args:
            row_id: Where the row is, `file:line`.
            reason: Short code.
            detail: What was found.
        """
        self.write({"id": row_id, "stage": self._stage, "reason": reason, "detail": detail})
        self.counts[reason] += 1
        if len(self._examples[reason]) < NUM_EXAMPLES:
            self._examples[reason].append(f"{row_id} ({detail})")

    def summary(self) -> str:
        """Reasons, most frequent first, with the first ids of each."""
        return "; ".join(
            f"{reason} {count} times, first {', '.join(self._examples[reason])}"
            for reason, count in self.counts.most_common()
        )
