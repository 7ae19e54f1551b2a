"""Collator that trains only what follows a response template in tokenized rows.

The template is searched in the token ids, and in the decoded text if that contains more occurrences.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sft.batches.collator import Array, DataCollatorForSFT, Row, document_lengths, read_row
from sft.labels import IGNORE_INDEX


@dataclass(frozen=True)
class Match:
    """Tokens of a document from `start` up to `end` (exclusive)."""

    start: int
    end: int


class TemplateFinder:
    """Search for one template, given as text or as token ids, in tokenized documents.

    Next to other text, a template may be tokenized differently than alone. Therefore:

    1. Compare the token ids.
    2. If the template contains special tokens and was found, stop: these are always tokenized in the same way, and text
       of a user that only spells them must not match.
    3. Otherwise decode the document, search for the template in the text, and convert character positions to token
       positions. If this finds more occurrences than the ids, use them instead.

    Args:
        name: Name of the option that gave the template, for messages.
        template: Text or token ids.
        tokenizer: Tokenizer of the documents.

    Raises:
        ValueError: The template is empty.
    """

    def __init__(self, name: str, template: str | Sequence[int], tokenizer: Any) -> None:
        self.name = name
        self.tokenizer = tokenizer
        if isinstance(template, str):
            self.text = template
            self.ids = list(tokenizer.encode(template, add_special_tokens=False))
        else:
            self.ids = [int(token) for token in template]
            self.text = self._decode(self.ids)
        if not self.ids or not self.text.strip():
            raise ValueError(
                f"{name}={template!r} is empty, so it can't be found in a row; give the text that precedes an answer"
            )
        self._has_special_tokens = bool(set(self.ids) & set(tokenizer.all_special_ids))

    def find(self, document: Array) -> list[Match]:
        """Return all occurrences in order, in one document of token ids `(length,)`."""
        by_ids = self._find_ids(document)
        if by_ids and self._has_special_tokens:
            return by_ids
        by_text = self._find_text(document.tolist())
        return by_text if len(by_text) > len(by_ids) else by_ids

    def _find_ids(self, document: Array) -> list[Match]:
        size = len(self.ids)
        if len(document) < size:
            return []
        windows = np.lib.stride_tricks.sliding_window_view(document, size)
        return [Match(int(start), int(start) + size) for start in np.flatnonzero((windows == self.ids).all(axis=1))]

    def _find_text(self, document: list[int]) -> list[Match]:
        text = self._decode(document)
        matches, place = [], text.find(self.text)
        while place >= 0:
            end = place + len(self.text)
            matches.append(Match(self._tokens_within(document, place), self._tokens_covering(document, end)))
            place = text.find(self.text, end)
        return matches

    def _tokens_covering(self, document: list[int], num_characters: int) -> int:
        """Return the smallest number of first tokens whose text has at least `num_characters`.

        A token that contains the end of the template and the beginning of what follows is included.
        """
        return bisect_left(range(len(document)), num_characters, key=lambda count: len(self._decode(document[:count])))

    def _tokens_within(self, document: list[int], num_characters: int) -> int:
        """Return the largest number of first tokens whose text has at most `num_characters`."""
        return max(0, self._tokens_covering(document, num_characters + 1) - 1)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def refuse_near_miss(self, document: Array) -> None:
        """Check that the document does not contain the template with other white space around it.

        Raises:
            ValueError: It does; the message shows how the template and the text are tokenized, and the ids to pass.
        """
        ids = document.tolist()
        bare = self.text.strip()
        place = self._decode(ids).find(bare)
        if place < 0:
            return
        found = ids[self._tokens_within(ids, place) : self._tokens_covering(ids, place + len(bare))]
        raise ValueError(
            f"{self.name} {self.text!r} is not in the text, but {bare!r} is. The template is tokenized as "
            f"{self.spelled()}, the text as {self._spelled(found)}. Pass the text exactly as it is in the rows, "
            f"or these ids: {self.name}={found}"
        )

    def spelled(self) -> str:
        """Return the template's tokens and their ids, for messages."""
        return self._spelled(self.ids)

    def _spelled(self, ids: list[int]) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(ids)} {ids}"


class DataCollatorForCompletionOnlyLM:
    """Collate tokenized rows so that only answers are trained: what follows the response template.

    With a response template only, the tokens after its last occurrence are trained. With an instruction template too,
    the tokens from each response template to the next template (or the end) are trained. If a row lacks a template,
    none of its tokens are trained, and a warning counts such rows. Packed rows are searched document by document.
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
    ) -> None:
        """Prepare the templates.

        Args:
            response_template: Text or token ids that precede an answer.
            instruction_template: Text or token ids that begin a user's turn, for rows with several turns.
            tokenizer: The one that the data set was tokenized with.
            mlm: Masked language modelling; must be False.
            ignore_index: Label of tokens that are not trained.
            padding_free: See `DataCollatorForSFT`.
            pad_to_multiple_of: See `DataCollatorForSFT`.

        Raises:
            ValueError: `mlm` is set, the tokenizer or a padding token that is needed is missing, or a template is
                empty.
        """
        if mlm:
            raise ValueError("mlm=True is not supported: completions are predicted from left to right; leave it False")
        if tokenizer is None:
            raise ValueError("tokenizer is missing; pass tokenizer=, the one that the data set is tokenized with")
        if tokenizer.pad_token_id is None and (not padding_free or pad_to_multiple_of):
            raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token, or use padding_free=True")
        self.tokenizer = tokenizer
        self.ignore_index = ignore_index
        self.response = TemplateFinder("response_template", response_template, tokenizer)
        self.instruction = (
            None
            if instruction_template is None
            else TemplateFinder("instruction_template", instruction_template, tokenizer)
        )
        self.padding_free, self.pad_to_multiple_of = padding_free, pad_to_multiple_of
        self.batching = DataCollatorForSFT(tokenizer.pad_token_id, padding_free, pad_to_multiple_of)
        self.num_rows = 0
        self.num_rows_without_template = 0
        self._num_warned_of = 0

    def __call__(self, features: Sequence[Row], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Collate rows with `input_ids`; labels of a row that are already ignored stay ignored."""
        batch = self.batching([self._with_labels(row, place) for place, row in enumerate(features)], return_tensors)
        self._warn_of_rows_without_template(len(features))
        if self.ignore_index != IGNORE_INDEX:
            batch["labels"].masked_fill_(batch["labels"] == IGNORE_INDEX, self.ignore_index)
        return batch

    def answer_spans(self, document: Array) -> list[Match]:
        """Return the spans of one document `(length,)` that are trained; empty if it lacks a template.

        Raises:
            ValueError: A template differs from the text by white space only; see `TemplateFinder.refuse_near_miss`.
        """
        responses = self.response.find(document)
        if not responses:
            self.response.refuse_near_miss(document)
            return []
        if self.instruction is None:
            return [Match(responses[-1].end, len(document))]
        instructions = self.instruction.find(document)
        if not instructions:
            self.instruction.refuse_near_miss(document)
            return []
        turn_starts = sorted(match.start for match in (*responses, *instructions))
        ends = [next((start for start in turn_starts if start >= match.end), len(document)) for match in responses]
        return [Match(match.end, end) for match, end in zip(responses, ends, strict=True)]

    def finds_answer(self, input_ids: Any) -> bool:
        """Return whether any token of a document `(length,)` is trained; see `answer_spans` for the errors."""
        return any(span.start < span.end for span in self.answer_spans(np.asarray(input_ids, dtype=np.int64)))

    def templates(self) -> str:
        """Return the templates and how they are tokenized, for messages."""
        finders = [finder for finder in (self.response, self.instruction) if finder is not None]
        return " and ".join(f"{finder.name} {finder.text!r} = {finder.spelled()}" for finder in finders)

    def _with_labels(self, row: Row, place: int) -> Row:
        tokens = read_row(row, place)
        trained = np.zeros(len(tokens.input_ids), dtype=bool)
        start, complete = 0, True
        for length in document_lengths(row, len(tokens.input_ids), place):
            spans = self.answer_spans(tokens.input_ids[start : start + length])
            complete = complete and bool(spans)
            for span in spans:
                trained[start + span.start : start + span.end] = True
            start += length
        self.num_rows += 1
        self.num_rows_without_template += not complete
        kept = {name: value for name, value in row.items() if name == "seq_lengths"}
        if tokens.weights is not None:
            kept["loss_weights"] = tokens.weights
        return {**kept, "input_ids": tokens.input_ids, "labels": np.where(trained, tokens.labels, IGNORE_INDEX)}

    def _warn_of_rows_without_template(self, num_in_batch: int) -> None:
        without = self.num_rows_without_template - self._num_warned_of
        if not without:
            return
        self._num_warned_of = self.num_rows_without_template
        names = [repr(finder.text) for finder in (self.response, self.instruction) if finder is not None]
        warnings.warn(
            f"{without} of {num_in_batch} rows of this batch ({self.num_rows_without_template} of {self.num_rows} "
            f"so far) lack {' or '.join(names)}, without which nothing is trained; max_length may have cut it off",
            stacklevel=3,
        )
