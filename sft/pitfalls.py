"""Mistakes that train a model silently wrong, looked for before training begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sft.completion_collator import DataCollatorForCompletionOnlyLM

NUM_ROWS_LOOKED_AT = 4


def check_collator(collator: Callable | None, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Look at what a user's collator trains of a data set.

    Args:
        collator: As it was given to the trainer; None = its own, which has neither mistake.
        dataset: Prepared rows; only a `Dataset` is looked at, since looking would use up a stream.
        tokenizer: Its eos and pad tokens are compared.

    Raises:
        ValueError: Nothing would be trained in any row, or the end-of-sequence token never.
    """
    if collator is None or not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    if isinstance(collator, DataCollatorForCompletionOnlyLM):
        check_templates(collator, (batch["input_ids"][0] for batch in dataset.iter(1)), len(dataset))
    elif tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        check_end_is_trained(collator, list(islice(iter(dataset), NUM_ROWS_LOOKED_AT)), tokenizer)


def check_templates(collator: DataCollatorForCompletionOnlyLM, rows: Iterable[Any], num_rows: int) -> None:
    """Make sure that an answer is found in some row; a template that fits the data is in the first one already.

    Args:
        collator: Finds the answers.
        rows: Token ids of each row; read up to the first one that has an answer.
        num_rows: How many there are, for the message.

    Raises:
        ValueError: No row has one; shows the templates' tokens and those of the first row.
    """
    first = None
    for ids in rows:
        first = first if first is not None else list(ids)
        if collator.finds_answer(ids):
            return
    if first is not None:
        raise ValueError(
            f"none of the {num_rows} rows has {collator.templates()}, so nothing would be trained. The first row is "
            f"{collator.tokenizer.convert_ids_to_tokens(first[:40])} {first[:40]}. Give the template as it stands in "
            "the text, or its ids there; if a cut took the answers away, raise max_length"
        )


def check_end_is_trained(collator: Callable, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that a collator which masks padding by its id does not mask the end-of-sequence token with it.

    Args:
        collator: Called with `rows`.
        rows: Some rows of the data set.
        tokenizer: Pads with its end-of-sequence token.

    Raises:
        ValueError: The rows have trained end-of-sequence tokens, and the batch made of them has none.
    """
    eos = tokenizer.eos_token_id
    if not any(eos in row.get("labels", row["input_ids"]) for row in rows):
        return
    labels = collator(rows).get("labels")
    if labels is not None and not bool((torch.as_tensor(labels) == eos).any()):
        raise ValueError(
            f"pad_token and eos_token are both {tokenizer.eos_token!r}, and {type(collator).__name__} masks it as "
            "padding, so the model would never learn to stop: pad with another token (SFTConfig(pad_token=...)), or "
            "leave data_collator out: the trainer's own masks padding by its place"
        )
