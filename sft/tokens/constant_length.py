"""Packing of texts (or token ids) on the fly into a stream of rows of exactly `seq_length` tokens."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import IterableDataset, get_worker_info

from sft.config import SFTConfig

logger = logging.getLogger(__name__)

Example = Mapping[str, Any]


class ConstantLengthDataset(IterableDataset):
    """Concatenate documents, each followed by a concatenation token, and cut the result into rows of equal length.

    Documents are read into a buffer of about `seq_length * num_of_sequences` tokens, shuffled, concatenated and cut;
    the rows are shuffled again. The remainder of a buffer is carried over to the next one, so that a pass loses at most
    `seq_length - 1` tokens. The parts of a document that is cut count as separate documents: `seq_lengths` of each row
    list the lengths of its documents, which do not attend to each other. Shuffling uses Python's `random`, which
    `transformers.set_seed` seeds.

    Items are dicts of int64 tensors: `input_ids` and `labels` `(seq_length,)`, `seq_lengths` `(num_documents,)`.

    Attributes:
        concat_token_id: Token after each document: the tokenizer's end-of-sequence token, or else `eos_token_id`.
        max_buffer_size: Size at which a buffer is full, in characters (in tokens for tokenized data sets).
        current_size: Number of rows yielded so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Iterable[Example],
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
    ) -> None:
        """Set up the stream; nothing is read yet.

        Args:
            tokenizer: Tokenizer of the texts.
            dataset: Examples with a text column, with the columns that `formatting_func` reads, or with `input_ids`.
            dataset_text_field: The text column; `text` if neither this nor `formatting_func` is given.
            formatting_func: Function that converts an example to a text or a list of texts.
            infinite: Restart at the end of the data set instead of stopping.
            seq_length: Number of tokens in a row.
            num_of_sequences: Number of rows that a buffer should fill.
            chars_per_token: Assumed number of characters per token when a buffer is filled.
            eos_token_id: Concatenation token if the tokenizer has no end-of-sequence token.
            shuffle: Shuffle the documents of each buffer and its rows.
            append_concat_token: Append the concatenation token to each document.
            add_special_tokens: Passed to the tokenizer.

        Raises:
            ValueError: Both `dataset_text_field` and `formatting_func` are given, or a size is not positive.
        """
        if dataset_text_field is not None and formatting_func is not None:
            raise ValueError(
                f"dataset_text_field={dataset_text_field!r} and formatting_func are both given; choose one"
            )
        if min(seq_length, num_of_sequences) < 1 or chars_per_token <= 0:
            raise ValueError(
                f"seq_length ({seq_length}), num_of_sequences ({num_of_sequences}) and chars_per_token "
                f"({chars_per_token}) must be positive"
            )
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.formatting_func = formatting_func
        self.text_field = dataset_text_field or "text"
        self.pretokenized = "input_ids" in (getattr(dataset, "column_names", None) or [])
        self.infinite = infinite
        self.seq_length = seq_length
        self.max_buffer_size = seq_length * num_of_sequences * (1 if self.pretokenized else chars_per_token)
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.shuffle = shuffle
        self.append_concat_token = append_concat_token
        self.add_special_tokens = add_special_tokens
        self.current_size = 0
        self._length: int | None = None

    def __len__(self) -> int:
        """Return the exact number of rows in one pass; the first call tokenizes the data set.

        Raises:
            TypeError: The data set is a stream, which has no length.
        """
        if self._length is None:
            len(self.dataset)  # type: ignore[arg-type]  # a stream must raise TypeError here, before it is read
            num_tokens = sum(len(ids) for buffer in self._buffers(self.dataset) for ids in self._tokenized(buffer))
            self._length = num_tokens // self.seq_length
        return self._length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield rows, endlessly if `infinite`; each worker of a data loader reads its share of the documents."""
        worker = get_worker_info()
        share = (0, 1) if worker is None else (worker.id, worker.num_workers)
        open_row = _OpenRow(self.seq_length)
        while True:
            num_rows_before = self.current_size
            for buffer in self._buffers(islice(iter(self.dataset), share[0], None, share[1])):
                yield from self._rows(buffer, open_row)
            if not self.infinite:
                break
            if self.current_size == num_rows_before and not open_row.num_tokens:
                raise ValueError("the data set is empty, so an infinite stream of it cannot be made")
        if open_row.num_tokens:
            logger.info("the last %d tokens do not fill a row of %d", open_row.num_tokens, self.seq_length)

    def _rows(self, buffer: list[Any], open_row: _OpenRow) -> Iterator[dict[str, torch.Tensor]]:
        if self.shuffle:
            random.shuffle(buffer)
        rows = [row for ids in self._tokenized(buffer) for row in open_row.add(ids)]
        if self.shuffle:
            random.shuffle(rows)
        for row in rows:
            self.current_size += 1
            yield row

    def _buffers(self, examples: Iterable[Example]) -> Iterator[list[Any]]:
        """Yield lists of documents (texts, or token ids) that fill a buffer, except perhaps the last one."""
        buffer: list[Any] = []
        size = 0
        for example in examples:
            for document in self._documents(example):
                buffer.append(document)
                size += len(document)
            if size >= self.max_buffer_size:
                yield buffer
                buffer, size = [], 0
        if buffer:
            yield buffer

    def _documents(self, example: Example) -> list[Any]:
        if self.pretokenized:
            return [list(example["input_ids"])]
        if self.formatting_func is not None:
            made = self.formatting_func(example)
            return list(made) if isinstance(made, list | tuple) else [made]
        if self.text_field not in example:
            raise ValueError(
                f"the data set has no column {self.text_field!r}, only {sorted(example)}; name the text column with "
                "dataset_text_field, or give formatting_func"
            )
        return [example[self.text_field]]

    def _tokenized(self, buffer: list[Any]) -> Iterator[list[int]]:
        documents = buffer if self.pretokenized else self._encoded(buffer)
        end = [self.concat_token_id] if self.append_concat_token else []
        for ids in documents:
            yield [*ids, *end]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        """Tokenize texts; one that begins with the bos token, as chat templates print it, does not get another."""
        bos = str(getattr(self.tokenizer, "bos_token", None) or "")
        has_bos = [bos != "" and text.startswith(bos) for text in texts]
        documents: dict[int, list[int]] = {}
        for flag in set(has_bos):
            places = [place for place, found in enumerate(has_bos) if found is flag]
            special = self.add_special_tokens and not flag
            batch = self.tokenizer([texts[place] for place in places], add_special_tokens=special, truncation=False)
            documents.update(zip(places, batch["input_ids"], strict=True))
        return [documents[place] for place in range(len(texts))]


class _OpenRow:
    """A row that is being filled, across documents and buffers."""

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length
        self.tokens: list[int] = []
        self.lengths: list[int] = []

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def add(self, ids: list[int]) -> Iterator[dict[str, torch.Tensor]]:
        """Add a document and yield every row that it completes."""
        start = 0
        while start < len(ids):
            piece = ids[start : start + self.seq_length - len(self.tokens)]
            start += len(piece)
            self.tokens += piece
            self.lengths.append(len(piece))
            if len(self.tokens) == self.seq_length:
                tokens = torch.tensor(self.tokens)
                yield {"input_ids": tokens, "labels": tokens.clone(), "seq_lengths": torch.tensor(self.lengths)}
                self.tokens, self.lengths = [], []


def constant_length_rows(
    dataset: Any, tokenizer: Any, config: SFTConfig, *, seq_length: int, name: str = "train"
) -> Dataset | ConstantLengthDataset:
    """Pack texts with `ConstantLengthDataset`, as the options `num_of_sequences` and `chars_per_token` request.

    Args:
        dataset: Texts in the column `config.dataset_text_field`, or rows with only `input_ids`.
        tokenizer: Tokenizer of the texts.
        config: The two options, and `dataset_kwargs`.
        seq_length: Number of tokens in a row.
        name: Name of the data set in messages.

    Returns:
        Rows with `input_ids`, `labels`, `seq_lengths`: a `Dataset`, or a stream for a streamed data set.

    Raises:
        ValueError: Options or columns select only a part of the tokens for training, or the texts do not fill a row.
    """
    masks = {"labels", "completion_mask", "assistant_masks"} & set(getattr(dataset, "column_names", None) or ())
    parts = [
        option
        for option in ("completion_only_loss", "assistant_only_loss", "last_turn_only_loss")
        if getattr(config, option)
    ]
    if masks or parts:
        raise ValueError(
            f"{' and '.join(config.constant_length)} pack rows in which every token is trained, which contradicts "
            f"{', '.join([*parts, *sorted(masks)])}; leave out {' and '.join(config.constant_length)}"
        )
    given: dict[str, Any] = {
        option: config.dataset_option(option) for option in ("add_special_tokens", "append_concat_token")
    }
    stream = ConstantLengthDataset(
        tokenizer,
        dataset,
        dataset_text_field=config.dataset_text_field,
        seq_length=seq_length,
        **config.constant_length,
        **{option: value for option, value in given.items() if value is not None},
    )
    if not isinstance(dataset, Dataset):
        return stream
    rows = list(stream)
    if not rows:
        raise ValueError(f"the {name} data set does not fill one row of {seq_length} tokens; lower max_length")
    return Dataset.from_dict({column: [row[column].tolist() for row in rows] for column in rows[0]})
