"""Checks of `load`: of single rows (`RowChecks`), and of the training rows as a set (`SetChecks`).

The set is searched for rows that nearly equal another row, and for rows unlike all others in length or language.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sft.data.messages import Problem, RowError
from sft.data.quality import FINDERS, REPAIRS, tool_call, tool_schema
from sft.data.similarity import (
    NearDuplicateIndex,
    Pair,
    Triples,
    compared_text,
    language,
    length_limits,
    rare_languages,
    similarity,
    triples,
)
from stages.checkout.artifacts import JsonlWriter
from stages.checkout.ledger import Action
from stages.params.schema import ChecksSection

ROW_CHECKS = {**FINDERS, "tool_schema": tool_schema, "tool_call": tool_call}

NUM_CACHED = 4096
"""Rows whose word triples are kept in memory while pairs of rows are compared."""


class Note(NamedTuple):
    """A problem that was found in a row, and what is done about it."""

    action: Action
    problem: Problem


class RowChecks:
    """Checks of single rows.

    Args:
        section: The section `load.checks` of params.yaml.
    """

    def __init__(self, section: ChecksSection) -> None:
        actions = {name: getattr(section, name) for name in ROW_CHECKS}
        self._actions = {name: Action(action) for name, action in actions.items() if action != "off"}

    def inspect(self, record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Note]]:
        """Check a row.

        Args:
            record: The row as a record.

        Returns:
            The record, repaired where the section states `repair`, and what was found in it.

        Raises:
            RowError: A problem was found for which rows are dropped, or which could not be repaired.
        """
        record, notes = dict(record), []
        for name, action in self._actions.items():
            problem = ROW_CHECKS[name](record)
            if problem is None:
                continue
            if action is Action.REPAIR:
                record = REPAIRS[name](record)
                if ROW_CHECKS[name](record) is not None:
                    raise RowError(name, f"can't be repaired: {problem.detail}")
            if action is Action.DROP:
                raise RowError(name, problem.detail)
            notes.append(Note(action, problem))
        return record, notes


@dataclass(frozen=True)
class RowTable:
    """Per-row values of a split, in the order of writing, in arrays because there may be millions of rows.

    Args:
        offsets: Byte at which each row begins in its file.
        lines: Line of the row's first copy, from 0.
        copies: Number of times that the row was written.
        sources: Index of the row's source.
        lengths: Number of characters that are compared with other rows.
    """

    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] = field(default_factory=lambda: array("Q"))
    copies: array[int] = field(default_factory=lambda: array("L"))
    sources: array[int] = field(default_factory=lambda: array("L"))
    lengths: array[int] = field(default_factory=lambda: array("Q"))


class SetChecks:
    """Checks of the training rows as a set. Rows are added as they are written; problems are found at the end.

    Args:
        section: The section `load.checks` of params.yaml.
        writers: Files of the splits `train` and `eval`, from which rows that may be similar are read again.
    """

    def __init__(self, section: ChecksSection, writers: Mapping[str, JsonlWriter]) -> None:
        self._section = section
        self._writers = writers
        self.rows = {split: RowTable() for split in writers}
        self._languages: list[str | None] = []
        self._near = section.near_duplicate != "off" or section.near_eval != "off"
        self._index = NearDuplicateIndex(section.similarity) if self._near else None
        self._splits = bytearray()
        self._places = array("Q")
        self._cached_triples = functools.lru_cache(NUM_CACHED)(self._triples)

    def add(self, record: Mapping[str, Any], split: str, copies: int, source: int) -> None:
        """Add a row that is about to be written.

        Args:
            record: The row as a record.
            split: train or eval.
            copies: Number of times that it will be written.
            source: Index of its source.
        """
        rows, writer, text = self.rows[split], self._writers[split], compared_text(record)
        if self._index is not None and (split == "train" or self._section.near_eval != "off"):
            self._index.add(text)
            self._splits.append(split == "train")
            self._places.append(len(rows.offsets))
        rows.offsets.append(writer.num_bytes)
        rows.lines.append(writer.num_rows)
        rows.copies.append(copies)
        rows.sources.append(source)
        rows.lengths.append(len(text))
        if split == "train" and self._section.rare_language != "off":
            self._languages.append(language(text))

    def findings(self) -> Iterator[tuple[int, Note]]:
        """Yield the findings as pairs of row index and note, for training rows.

        After a note that drops a row, no more notes of that row follow.
        """
        dropped: set[int] = set()
        for row, note in itertools.chain(
            self._near_duplicates(dropped), self._length_outliers(), self._rare_languages()
        ):
            if row in dropped:
                continue
            if note.action is Action.DROP:
                dropped.add(row)
            yield row, note

    def row_id(self, row: int, split: str = "train") -> str:
        """Return the id of a row, `file:line`."""
        return str(self._read(row, split)["id"])

    def _read(self, row: int, split: str) -> dict[str, Any]:
        return self._writers[split].read(self.rows[split].offsets[row])

    def _triples(self, row: int, split: str) -> Triples:
        return triples(compared_text(self._read(row, split)))

    def _near_duplicates(self, dropped: set[int]) -> Iterator[tuple[int, Note]]:
        if self._index is None or len(self._index) == 0:
            return
        # Held-out rows come first, so that training rows are compared with them, and never the other way round.
        order = np.argsort(np.frombuffer(bytes(self._splits), dtype=np.uint8), kind="stable")
        for later, pairs in itertools.groupby(self._index.pairs(order), key=lambda pair: pair.later):
            if self._splits[later]:
                yield from self._compare(self._places[later], pairs, dropped)

    def _compare(self, row: int, pairs: Iterator[Pair], dropped: set[int]) -> Iterator[tuple[int, Note]]:
        """Compare a training row with the earlier rows that are candidates for near duplicates."""
        own, images = self._triples(row, "train"), self._read(row, "train").get("images")
        nearest: dict[str, tuple[float, int]] = {}
        for pair in pairs:
            split = "train" if self._splits[pair.earlier] else "eval"
            other = self._places[pair.earlier]
            if split == "train" and other in dropped:
                continue
            if images and self._read(other, split).get("images") != images:  # the same question about another image
                continue
            likeness = similarity(own, self._cached_triples(other, split))
            if likeness >= self._section.similarity and likeness > nearest.get(split, (0.0, 0))[0]:
                nearest[split] = (likeness, other)
        for split, name in (("eval", "near_eval"), ("train", "near_duplicate")):
            action = getattr(self._section, name)
            if split in nearest and action != "off":
                likeness, other = nearest[split]
                detail = f"{likeness:.0%} the same as {self.row_id(other, split)}"
                yield row, Note(Action(action), Problem(name, detail))

    def _length_outliers(self) -> Iterator[tuple[int, Note]]:
        if self._section.length_outlier == "off":
            return
        lengths = self.rows["train"].lengths
        shortest, longest = length_limits(lengths)
        for row in np.flatnonzero((np.asarray(lengths) < shortest) | (np.asarray(lengths) > longest)).tolist():
            detail = f"{lengths[row]} characters, nearly all training rows have {shortest:.0f} to {longest:.0f}"
            yield row, Note(Action(self._section.length_outlier), Problem("length_outlier", detail))

    def _rare_languages(self) -> Iterator[tuple[int, Note]]:
        rare = rare_languages(self._languages)
        for row, label in enumerate(self._languages):
            if label is not None and label in rare:
                detail = f"in language {label!r}, as {rare[label]} of {len(self._languages)} training rows"
                yield row, Note(Action(self._section.rare_language), Problem("rare_language", detail))
