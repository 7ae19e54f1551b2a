"""Collator that trains only what follows a response template in tokenized rows.

Templates are searched in the characters of the tokens, see `TokenText`: next to other text, a template is often
tokenized differently than alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sft.batches.collator import Array, DataCollatorForSFT, Row, document_lengths, read_row
from sft.batches.token_text import SYMBOLS, TokenText
from sft.labels import IGNORE_INDEX

OUTSIDE, TEMPLATE, ANSWER = range(3)
"""What a character of a document belongs to."""


@dataclass(frozen=True)
class Match:
    """Characters of a document from `start` up to `end` (exclusive)."""

    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """One document: its token ids, its text, and the characters of each token, see `TokenText.characters`."""

    ids: Array
    text: str
    starts: Array
    ends: Array


class TemplateFinder:
    """Search for one template in documents, by its characters and by its token ids.

    1. Search for the template's characters. Special tokens match special tokens only, whatever text spells them.
    2. At the beginning of a document, the white space that the template begins with may be missing.
    3. Add the places where the token ids are those of the template, if they overlap none of these.

    Args:
        name: Name of the option that gave the template, for messages.
        template: Text or token ids.
        tokenizer: Tokenizer of the documents.
        token_text: Characters of its tokens.

    Raises:
        ValueError: The template is empty, or neither a text nor token ids.
    """

    def __init__(self, name: str, template: str | Sequence[int], tokenizer: Any, token_text: TokenText) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._token_text = token_text
        if isinstance(template, str):
            self.ids = list(tokenizer.encode(template, add_special_tokens=False))
        else:
            try:
                self.ids = [int(token) for token in template]
            except (TypeError, ValueError):
                raise ValueError(f"{name}={template!r} must be a text or a list of token ids") from None
        self.spellings = token_text.spellings(template if isinstance(template, str) else self.ids)
        if not self.ids or not self.spellings:
            raise ValueError(
                f"{name}={template!r} is empty, so it can't be found in a row; give the text that precedes an answer"
            )
        self.text = template if isinstance(template, str) else token_text.readable(self.spellings[0])
        self._pattern = re.compile("(?=(" + "|".join(map(re.escape, self.spellings)) + "))")

    def find(self, document: Document) -> list[Match]:
        """Return all occurrences in order. Occurrences may overlap each other."""
        matches = {match.start(): match.end(1) for match in self._pattern.finditer(document.text)}
        begin = self._at_beginning(document.text)
        for found in [*([] if begin is None else [begin]), *self._find_ids(document)]:
            if not any(found.start < end and start < found.end for start, end in matches.items()):
                matches[found.start] = found.end
        return [Match(start, end) for start, end in sorted(matches.items())]

    def _at_beginning(self, text: str) -> Match | None:
        place = len(text) - len(SYMBOLS.sub(" ", text).lstrip())
        for spelling in self.spellings:
            bare = spelling.lstrip()
            if text.startswith(bare, place):
                return Match(place, place + len(bare))
        return None

    def _find_ids(self, document: Document) -> list[Match]:
        size = len(self.ids)
        if len(document.ids) < size:
            return []
        windows = np.lib.stride_tricks.sliding_window_view(document.ids, size)
        places = np.flatnonzero((windows == self.ids).all(axis=1))
        return [Match(int(document.starts[place]), int(document.ends[place + size - 1])) for place in places]

    def near_miss(self, document: Document) -> str | None:
        """Return how the document has the template with other white space around it; None if it does not.

        The message shows how the template and the text are tokenized, and the ids to pass.
        """
        for spelling in self.spellings:
            bare = spelling.strip()
            place = document.text.find(bare)
            if place < 0:
                continue
            found = document.ids[(document.ends > place) & (document.starts < place + len(bare))].tolist()
            return (
                f"{self.name} {self.text!r} is not in the text, but {self._token_text.readable(bare)!r} is. The "
                f"template is tokenized as {self.spelled()}, the text as {self._spelled(found)}. Pass the text exactly "
                f"as it is in the rows, or these ids: {self.name}={found}"
            )
        return None

    def spelled(self) -> str:
        """Return the template's tokens and their ids, for messages."""
        return self._spelled(self.ids)

    def _spelled(self, ids: list[int]) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(ids)} {ids}"


def _with_kernel_keys(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = batch["seq_lengths"]
    boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)[None]
    longest = lengths.max()[None]
    kernel_keys = {"cu_seq_lens": boundaries, "max_length": longest}
    return {**batch, **{f"{name}_{end}": value for name, value in kernel_keys.items() for end in ("q", "k")}}


class DataCollatorForCompletionOnlyLM:
    """Collate tokenized rows so that only answers are trained: what follows the response template.

    With a response template only, the tokens after its last occurrence are trained. With an instruction template too,
    the tokens from each response template to the next template (or the end) are trained. If a row lacks a template,
    none of its tokens are trained, and a warning counts such rows. Packed rows are searched document by document.

    A token that has characters of a template and of an answer is trained if visible ones are the answer's. A token that
    has characters of anything else is not trained.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        tokenizer: Any = None,
        *,
        mlm: bool = False,
        ignore_index: int = IGNORE_INDEX,
        padding_free: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
    ) -> None:
        """Prepare the templates.

        Args:
            response_template: Text or token ids that precede an answer.
            instruction_template: Text or token ids that begin a user's turn, for rows with several turns.
            tokenizer: The one that the data set was tokenized with. Its `padding_side` is where rows are padded, with
                its padding token, or the end-of-sequence token if it has none: padding is masked by its place.
            mlm: Masked language modelling; must be False.
            ignore_index: Label of tokens that are not trained.
            padding_free: See `DataCollatorForSFT`.
            pad_to_multiple_of: See `DataCollatorForSFT`.
            return_tensors: `pt`.

        Raises:
            ValueError: `mlm` is set, the tokenizer is missing, or a template is empty or given twice.
        """
        if mlm:
            raise ValueError("mlm=True is not supported: completions are predicted from left to right; leave it False")
        if tokenizer is None:
            raise ValueError("tokenizer is missing; pass tokenizer=, the one that the data set is tokenized with")
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
        self.mlm = mlm
        self.ignore_index = ignore_index
        self.return_tensors = return_tensors
        self.response_template, self.instruction_template = response_template, instruction_template
        self._token_text = TokenText(self.tokenizer)
        self.response = self._finder("response_template", response_template)
        self.instruction = (
            None if instruction_template is None else self._finder("instruction_template", instruction_template)
        )
        if self.instruction is not None and set(self.instruction.spellings) & set(self.response.spellings):
            raise ValueError(
                f"response_template and instruction_template are both {self.response.text!r}, so that an answer can't "
                "be told from a question; give the text that begins each"
            )
        self.padding_free, self.pad_to_multiple_of = padding_free, pad_to_multiple_of
        self.return_position_ids = False
        self.for_trainer = False  # `SFTTrainer` sets it: its batches state their documents by `seq_lengths` alone
        self.num_rows = 0
        self.num_rows_without_template = 0
        self._num_warned_of = 0
        self._near_miss: str | None = None
        self._has_warned_of_repetition = False

    @property
    def response_token_ids(self) -> list[int]:
        """Token ids of the response template, tokenized alone."""
        return self.response.ids

    @property
    def instruction_token_ids(self) -> list[int] | None:
        """Token ids of the instruction template, tokenized alone."""
        return None if self.instruction is None else self.instruction.ids

    def __call__(self, features: Sequence[Row], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        """Collate rows, see `torch_call`."""
        wanted = return_tensors or self.return_tensors
        if wanted != "pt":
            raise ValueError(f"return_tensors={wanted!r} is not supported; batches are PyTorch tensors ('pt')")
        return self.torch_call(features)

    def torch_call(self, examples: Sequence[Row | Sequence[int]]) -> dict[str, torch.Tensor]:
        """Collate rows with `input_ids`, or lists of ids; labels of a row that are already ignored stay ignored.

        Outside `SFTTrainer`, a flat batch also has `cu_seq_lens_q` and `cu_seq_lens_k` `(1, num_documents + 1)`, and
        `max_length_q` and `max_length_k` `(1,)`, as trl 0.16 gave them to the kernels of Flash Attention.
        """
        rows = [row if isinstance(row, Mapping) else {"input_ids": row} for row in examples]
        batching = DataCollatorForSFT(
            self._padding(),
            self.padding_free,
            self.pad_to_multiple_of,
            self.return_position_ids,
            padding_side=self.tokenizer.padding_side,
        )
        batch = batching([self._with_labels(row, place) for place, row in enumerate(rows)])
        self._report_rows_without_template(len(rows))
        if self.ignore_index != IGNORE_INDEX:
            batch["labels"].masked_fill_(batch["labels"] == IGNORE_INDEX, self.ignore_index)
        return batch if self.for_trainer or "seq_lengths" not in batch else _with_kernel_keys(batch)

    def trained_tokens(self, input_ids: Any) -> Array:
        """Return which tokens of one document `(length,)` are trained, as booleans; none if it lacks a template."""
        document = self._document(input_ids)
        return self._trained(document, self.answers(document))

    def answers(self, document: Document) -> list[Match]:
        """Return the characters of one document that are answers; none if it lacks a template."""
        responses = self.response.find(document)
        instructions = [] if self.instruction is None else self.instruction.find(document)
        within = [match for match in responses if not any(_is_inside(match, other) for other in instructions)]
        instructions = [match for match in instructions if not any(_is_inside(match, other) for other in within)]
        if not within or (self.instruction is not None and not instructions):
            finder = self.instruction if within and self.instruction is not None else self.response
            self._near_miss = self._near_miss or finder.near_miss(document)
            return []
        length = len(document.text)
        if self.instruction is None:
            self._warn_of_repetition(within)
            return [Match(within[-1].end, length)]
        turns = [match.start for match in instructions]
        chosen = self._one_per_turn(document.text, within, turns)
        starts = sorted([*turns, *(match.start for match in chosen)])
        ends = [next((start for start in starts if start > match.start), length) for match in chosen]
        return [Match(min(match.end, end), end) for match, end in zip(chosen, ends, strict=True)]

    def finds_answer(self, input_ids: Any) -> bool:
        """Return whether any token of a document `(length,)` is trained."""
        return bool(self.trained_tokens(input_ids).any())

    def near_miss(self) -> str | None:
        """Return how the first row without a template has it with other white space; None if no row does."""
        return self._near_miss

    def templates(self) -> str:
        """Return the templates and how they are tokenized, for messages."""
        finders = [finder for finder in (self.response, self.instruction) if finder is not None]
        return " and ".join(f"{finder.name} {finder.text!r} = {finder.spelled()}" for finder in finders)

    def _finder(self, name: str, template: str | Sequence[int]) -> TemplateFinder:
        return TemplateFinder(name, template, self.tokenizer, self._token_text)

    def _padding(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _document(self, input_ids: Any) -> Document:
        ids = np.asarray(input_ids, dtype=np.int64)
        return Document(ids, *self._token_text.characters(ids.tolist()))

    def _one_per_turn(self, text: str, responses: list[Match], turns: list[int]) -> list[Match]:
        """Choose among several response templates in one turn those that begin a line, if some do and others do not.

        A message that mentions the template has it inside a line. All of them are kept if this does not tell.
        """
        of_turn: dict[int, list[Match]] = {}
        for match in responses:
            of_turn.setdefault(sum(start <= match.start for start in turns), []).append(match)
        for turn, matches in of_turn.items():
            at_line_start = [match for match in matches if _begins_line(text, match)]
            of_turn[turn] = at_line_start or matches
            self._warn_of_repetition(of_turn[turn])
        return [match for matches in of_turn.values() for match in matches]

    def _trained(self, document: Document, answers: list[Match]) -> Array:
        """Return which tokens are trained, by what their characters belong to."""
        trained: Array = np.zeros(len(document.ids), dtype=bool)
        if not answers:
            return trained
        kinds = np.full(len(document.text) + 1, OUTSIDE, dtype=np.int8)
        for finder in (self.response, self.instruction):
            for match in [] if finder is None else finder.find(document):
                kinds[match.start : match.end] = TEMPLATE
        for match in answers:
            kinds[match.start : match.end] = ANSWER
        visible = np.fromiter((not character.isspace() for character in document.text + " "), dtype=bool)
        answer, template, outside = (_count(kinds == kind, document) for kind in (ANSWER, TEMPLATE, OUTSIDE))
        seen = _count((kinds == ANSWER) & visible, document)
        return (answer > 0) & (outside == 0) & ((template == 0) | (seen > 0))

    def _with_labels(self, row: Row, place: int) -> Row:
        tokens = read_row(row, place)
        trained = np.zeros(len(tokens.input_ids), dtype=bool)
        start, complete = 0, True
        for length in document_lengths(row, len(tokens.input_ids), place):
            document = self._document(tokens.input_ids[start : start + length])
            answers = self.answers(document)
            complete = complete and bool(answers)
            trained[start : start + length] = self._trained(document, answers)
            start += length
        self.num_rows += 1
        self.num_rows_without_template += not complete
        kept = {name: value for name, value in row.items() if name == "seq_lengths"}
        if tokens.weights is not None:
            kept["loss_weights"] = tokens.weights
        return {**kept, "input_ids": tokens.input_ids, "labels": np.where(trained, tokens.labels, IGNORE_INDEX)}

    def _report_rows_without_template(self, num_in_batch: int) -> None:
        """Warn of rows in which nothing is trained.

        Raises:
            ValueError: No row so far has the templates, and one differs from a template by white space only.
        """
        without = self.num_rows_without_template - self._num_warned_of
        if not without:
            return
        if self._near_miss is not None and self.num_rows_without_template == self.num_rows:
            raise ValueError(self._near_miss)
        self._num_warned_of = self.num_rows_without_template
        names = [repr(finder.text) for finder in (self.response, self.instruction) if finder is not None]
        warnings.warn(
            f"{without} of {num_in_batch} rows of this batch ({self.num_rows_without_template} of {self.num_rows} "
            f"so far) lack {' or '.join(names)}, without which nothing is trained; max_length may have cut it off",
            stacklevel=4,
        )

    def _warn_of_repetition(self, matches: list[Match]) -> None:
        """Warn once that a turn has the response template several times, so that its answer is not certain."""
        if len(matches) < 2 or self._has_warned_of_repetition:
            return
        self._has_warned_of_repetition = True
        text = self.response.text
        what = (
            "only what follows its last occurrence is trained. If rows have several answers, give instruction_template"
            if self.instruction is None
            else "what follows each of them is trained. If messages mention it, use a template that no message contains"
        )
        warnings.warn(f"a turn has the response_template {text!r} {len(matches)} times: {what}", stacklevel=6)


def _is_inside(match: Match, other: Match) -> bool:
    return other.start <= match.start and match.end <= other.end and match != other


def _begins_line(text: str, match: Match) -> bool:
    found = text[match.start : match.end]
    before = text[: match.start + len(found) - len(found.lstrip())].rstrip(" \t")
    return before.endswith("\n") or bool(SYMBOLS.fullmatch(before[-1:]))


def _count(chosen: Array, document: Document) -> Array:
    """Return how many characters of each token are chosen."""
    total = np.concatenate([[0], np.cumsum(chosen)])
    counts: Array = total[document.ends] - total[document.starts]
    return counts
