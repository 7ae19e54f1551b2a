"""Long documents in parts that keep their prompts, and how many answers a length limit cuts from their prompts.

A prompt is a run of untrained tokens, an answer the run of trained tokens after it. A document that is longer than the
limit is divided as follows:

1. A part begins with the prompt of its first answer. A prompt of more than half the limit keeps its end.
2. The answer follows, and further prompts and answers, as long as a prompt and the beginning of its answer fit.
3. If an answer does not fit, the next part begins with the same prompt and continues the answer. The first token that
   continues it is not trained, because it does not follow the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sft.labels import IGNORE_INDEX, TOKEN_MASKS
from sft.tokens.columns import Column, Columns, Integers, Pieces

UNTRAINED: Mapping[str, int] = {"labels": IGNORE_INDEX, **dict.fromkeys(TOKEN_MASKS, 0), "loss_weights": 0}
"""Values of a token that is not trained."""

SHORTEST_LIMIT = 4
"""Limit below which documents can't be divided with their prompts."""

SHORTEST_PROMPT = 2
"""Tokens of a prompt; a single untrained token is that of the beginning of a text."""


@dataclass(frozen=True)
class Parts:
    """Documents that consist of a prompt and a stretch of tokens, both of the same source document.

    Attributes:
        document: `(num_parts,)` source document.
        prompt_start: `(num_parts,)` first token of the prompt that is repeated.
        prompt_length: `(num_parts,)` number of its tokens; 0 if the part is a stretch alone.
        start: `(num_parts,)` first token of the stretch.
        length: `(num_parts,)` number of tokens in the stretch.
        num_cut: `(num_parts,)` number of trained tokens of the part's first answer, if its prompt is shortened.
    """

    document: Integers
    prompt_start: Integers
    prompt_length: Integers
    start: Integers
    length: Integers
    num_cut: Integers

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, key: Any) -> Parts:
        return Parts(*(getattr(self, name)[key] for name in self.__dataclass_fields__))

    def columns(self, columns: Columns) -> Columns:
        """Return the token columns of the parts."""
        return {name: PartColumn(column, self, UNTRAINED.get(name)) for name, column in columns.items()}


class PartColumn:
    """A token column of parts, read from that of their source documents.

    Args:
        column: The column of the source documents.
        parts: The parts.
        untrained: Value of a token that continues an answer after a repeated prompt; None = as it is in the source.
    """

    def __init__(self, column: Column, parts: Parts, untrained: int | None) -> None:
        self.parts = parts
        self._column = column
        self._untrained = untrained

    def lengths(self) -> Integers:
        """Return the number of tokens in each part, `(num_parts,)`."""
        return self.parts.prompt_length + self.parts.length

    def gather(self, pieces: Pieces, dtype: Any) -> np.ndarray[Any, Any]:
        """Return the values of all pieces one after another, `(sum of lengths,)`."""
        parts = self.parts[pieces.document]
        from_prompt = np.clip(parts.prompt_length - pieces.start, 0, pieces.length)
        starts = parts.prompt_start + np.minimum(pieces.start, parts.prompt_length)
        rest = parts.start + np.maximum(pieces.start - parts.prompt_length, 0)
        both = Pieces(
            np.repeat(parts.document, 2),
            np.stack([starts, rest], axis=1).reshape(-1),
            np.stack([from_prompt, pieces.length - from_prompt], axis=1).reshape(-1),
        )
        values = self._column.gather(both, dtype)
        if self._untrained is not None:
            places = np.cumsum(pieces.length) - pieces.length + from_prompt
            continues = (
                (parts.prompt_length > 0) & (pieces.start <= parts.prompt_length) & (from_prompt < pieces.length)
            )
            values[places[continues]] = self._untrained
        return values


class _Part(NamedTuple):
    """One part of a document, see `Parts`."""

    prompt_start: int
    prompt_length: int
    start: int
    length: int
    num_cut: int


def divide_with_prompts(columns: Columns, max_length: int) -> Parts:
    """Divide documents of more than `max_length` tokens into parts that keep their prompts.

    Args:
        columns: `input_ids`, and `labels` unless all tokens are trained.
        max_length: Limit in tokens.

    Raises:
        ValueError: The limit is too small.
    """
    if max_length < SHORTEST_LIMIT:
        raise ValueError(
            f"max_length {max_length} has no room for a prompt and its answer; give at least {SHORTEST_LIMIT}"
        )
    lengths = columns["input_ids"].lengths()
    found: list[tuple[int, _Part]] = []
    for document, length in enumerate(lengths.tolist()):
        if length <= max_length:
            found.append((document, _Part(0, 0, 0, length, 0)))
            continue
        if "labels" in columns:
            trained = _labels_of(columns["labels"], document, length)
        else:
            trained = np.ones(length, dtype=bool)
        found += [(document, part) for part in _parts_of(trained, max_length)]
    numbers = np.array([[document, *part] for document, part in found], dtype=np.int64).reshape(-1, 6)
    return Parts(*numbers.T)


def _labels_of(labels: Column, document: int, length: int) -> np.ndarray[Any, Any]:
    one = Pieces(*(np.array([number], dtype=np.int64) for number in (document, 0, length)))
    return labels.gather(one, np.int32) != IGNORE_INDEX


def _answers(trained: np.ndarray[Any, Any]) -> list[tuple[int, int, int]]:
    """Return for each answer where its prompt begins, where it begins and where it ends."""
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0)).tolist()
    begins, ends = edges[::2], edges[1::2]
    return list(zip([0, *ends[:-1]], begins, ends, strict=True)) if begins else []


def _parts_of(trained: np.ndarray[Any, Any], max_length: int) -> Iterator[_Part]:
    answers = _answers(trained)
    if not answers:
        yield _Part(0, 0, 0, max_length, 0)  # nothing is trained, and so it is dropped
        return
    number, at = 0, answers[0][1]  # the answer that the next part begins with, and the first token that it trains
    while number < len(answers):
        prompt, begin, end = answers[number]
        kept, first = min(begin - prompt, max_length // 2), at
        is_continued = at > begin
        start = at if is_continued else begin - kept
        limit = start + max_length - (kept if is_continued else 0)
        while number < len(answers) and answers[number][2] <= limit:
            number += 1
        if number == len(answers):
            stop = min(len(trained), limit)  # with what the template prints after the last answer
        elif answers[number][1] + 1 < limit:
            # a single token that is left would not be trained, and it usually ends the answer
            stop = at = limit - (answers[number][2] - limit == 1)
        else:  # neither the next prompt nor two tokens after it fit
            stop, at = answers[number - 1][2], answers[number][1]
        num_cut = min(end, stop) - first - int(is_continued) if kept < begin - prompt else 0
        yield _Part(begin - kept, kept if is_continued else 0, start, stop - start, num_cut)


def cut_from_prompts(labels: Column, lengths: Integers, pieces: Pieces) -> tuple[int, int]:
    """Count the answers that are trained without their whole prompt, because a limit cut their document before it.

    Args:
        labels: Labels of the documents.
        lengths: `(num_documents,)` number of tokens in each document.
        pieces: Parts of documents that are kept, in the order of the documents.

    Returns:
        Number of answers, or of parts of answers, and of their trained tokens.
    """
    num_answers = num_tokens = 0
    later = pieces[pieces.start > 0]
    for own in np.split(np.arange(len(later)), np.flatnonzero(np.diff(later.document)) + 1):
        if not len(own):
            continue
        document = int(later.document[own[0]])
        answers = _answers(_labels_of(labels, document, int(lengths[document])))
        ends = np.array([end for _, _, end in answers])
        for start, length in zip(later.start[own].tolist(), later.length[own].tolist(), strict=True):
            number = int(np.searchsorted(ends, start, side="right"))  # the prompts of later answers are in the piece
            if number == len(answers):
                continue
            prompt, begin, end = answers[number]
            cut = min(end, start + length) - max(begin, start)
            if cut > 0 and start > prompt and begin - prompt >= SHORTEST_PROMPT:
                num_answers += 1
                num_tokens += cut
    return num_answers, num_tokens
