"""Checks of the data before training begins.

* `check_ignored`: options that would have no effect on the data given.
* `check_kbit_arguments`: arguments of the preparation of a k-bit model that would have no effect.
* `check_collator`: a user's collator that would train nothing, or never the end-of-sequence token.
* `check_token_rows`: packed rows whose documents would see each other, token ids without an embedding, documents that
  are longer than the positions that the model has learned.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from inspect import signature
from itertools import islice
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft.batches.collator import DataCollatorForSFT
from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM
from sft.config import SFTConfig
from sft.inner_model import causal_lm
from sft.models.adapters import is_unprepared
from sft.models.kbit import is_kbit
from sft.suggest import did_you_mean
from sft.tokens.constant_length import ConstantLengthDataset
from sft.train.batches import Packing

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 10_000
"""Rows of a data set that are read into memory at once."""

NUM_SAMPLE_ROWS = 4
"""Rows that a user's collator is tried out on."""

COLUMN_OF_PART = {
    "completion_only_loss": "completion_mask",
    "assistant_only_loss": "assistant_masks",
    "last_turn_only_loss": "labels",
}
"""Option that trains a part of each row -> the column of prepared rows that marks this part."""

KBIT_ARGUMENTS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")
"""Arguments of `prepare_model_for_kbit_training` other than the model."""

POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings|pos_emb\w*)$")
"""Names of tables of positions: `wpe` in GPT-2, `embed_positions` in OPT and, as a buffer, in GPT-J and CodeGen."""

SPARE_ROWS = 2
"""Rows that a table may have in addition to its positions, as OPT's has."""


def check_ignored(config: SFTConfig, collator: Callable | None, packing: Packing, train: Any, evaluation: Any) -> None:
    """Check that all options have an effect on these data sets and with this collator.

    Args:
        config: The options.
        collator: The user's, or one for images; None = this library's for token rows, which follows all options.
        packing: Which of the data sets are to be packed.
        train: Training data as the user gave it.
        evaluation: Evaluation data as the user gave it; may be a dict of data sets.

    Raises:
        ValueError: An option would be ignored. The message says why, and where the option belongs.
    """
    if isinstance(train, dict):
        raise ValueError(f"train_dataset has the splits {sorted(train)}; give one of them, such as dataset['train']")
    for option in ("padding_free", "pad_to_multiple_of"):
        asked = getattr(config, option)
        if collator is not None and asked and getattr(collator, option, None) != asked:
            raise ValueError(
                f"{option}={asked} would be ignored: {_name(collator)} makes the batches; give it there, or leave "
                "data_collator out"
            )
    if config.image_folder is not None and getattr(collator, "image_folder", None) != config.image_folder:
        where = "the data has no images" if collator is None else f"{_name(collator)} makes the batches"
        raise ValueError(
            f"image_folder={config.image_folder!r} would be ignored: {where}; leave it out, or give it there"
        )
    rest = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    named = [
        ("train", train, packing.train),
        *((f"eval {key}".strip(), rows, packing.eval) for key, rows in rest.items()),
    ]
    for name, dataset, packed in named:
        if dataset is None or (isinstance(dataset, (Dataset, IterableDataset)) and not config.skip_prepare_dataset):
            continue
        why = (
            f"the {name} data set goes to the collator as it is "
            f"({'skip_prepare_dataset' if config.skip_prepare_dataset else type(dataset).__name__})"
        )
        ignored = _ignored_part(dataset, config, collator)
        if ignored is not None:
            raise ValueError(f"{ignored}=True would be ignored: {why}; leave {ignored} out, or prepare the rows so")
        if config.shuffle_dataset and not isinstance(dataset, (Dataset, IterableDataset)):
            raise ValueError(
                f"shuffle_dataset=True would be ignored: {why}; leave it out, or shuffle the rows yourself"
            )
        _warn_of_lengths(dataset, config, collator, why, packed=packed)


def _columns_of_rows(dataset: Any) -> list[str] | None:
    """Return the columns of rows as the collator gets them; None if they are not known without reading a stream."""
    if isinstance(dataset, ConstantLengthDataset):
        return ["input_ids", "seq_lengths"]  # its labels train all tokens
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom" and len(dataset):
        return list(dataset[0])  # what the user's transform returns
    return getattr(dataset, "column_names", None)


def _ignored_part(dataset: Any, config: SFTConfig, collator: Callable | None) -> str | None:
    """Return the option that would train a part of each row and has no effect on rows that are not prepared here."""
    columns = _columns_of_rows(dataset)
    for option, column in COLUMN_OF_PART.items():
        followed = columns is None or not {column, "labels"}.isdisjoint(columns) or getattr(collator, option, False)
        if getattr(config, option) and not followed:
            return option
    return None


def _warn_of_lengths(dataset: Any, config: SFTConfig, collator: Callable | None, why: str, *, packed: bool) -> None:
    """Warn if rows that are not prepared here are to be packed or truncated; older scripts ask for both at once."""
    if packed and "seq_lengths" not in (_columns_of_rows(dataset) or ()):
        logger.warning("packing=True has no effect: %s, so that each of its rows is a document of its own", why)
    limited = isinstance(dataset, ConstantLengthDataset) or getattr(collator, "max_length", None) is not None
    if config.is_max_length_given and config.max_length is not None and not limited:
        logger.warning("max_length=%d has no effect: %s; truncate its rows yourself", config.max_length, why)
    if config.truncation_mode != "keep_start":
        logger.warning("truncation_mode=%r has no effect: %s", config.truncation_mode, why)
    if config.overflow is not None:
        logger.warning("overflow=%r has no effect: %s", config.overflow, why)


def _name(collator: Callable) -> str:
    return getattr(collator, "__name__", type(collator).__name__)


def check_kbit_arguments(model: Any, config: SFTConfig) -> None:
    """Check that `prepare_in_int8_kwargs` has an effect, and does not contradict `activation_checkpointing`.

    Args:
        model: Before an adapter is put on it, or with the user's own.
        config: The options.

    Raises:
        ValueError: A key is unknown, the model is not in 4 or 8 bits or is prepared already, or checkpointing is turned
            off there and on in the options.
    """
    given = config.prepare_in_int8_kwargs
    if not given:
        return
    if not isinstance(given, dict):
        raise ValueError(f'prepare_in_int8_kwargs={given!r} is not a JSON object such as {{"name": true}}')
    for key in given:
        if key not in KBIT_ARGUMENTS:
            known = did_you_mean(key, KBIT_ARGUMENTS, otherwise=f"its keys are {', '.join(KBIT_ARGUMENTS)}")
            raise ValueError(f"prepare_in_int8_kwargs has the unknown key {key!r}: {known}")
    if not is_unprepared(model):
        why = "is prepared already" if is_kbit(causal_lm(model)) else "is not loaded in 4 or 8 bits"
        raise ValueError(f"prepare_in_int8_kwargs={given} would be ignored: the model {why}; leave it out")
    if given.get("use_gradient_checkpointing") is False and config.activation_checkpointing:
        raise ValueError(
            "prepare_in_int8_kwargs has use_gradient_checkpointing=False, and the options have "
            "gradient_checkpointing=True; give one of them"
        )


def check_collator(collator: Callable | None, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a user's collator trains some tokens, and the end-of-sequence token among them.

    Args:
        collator: As it was given to the trainer; None = this library's, which needs no check.
        dataset: Prepared rows. Only a `Dataset` is checked, since reading a stream would use it up.
        tokenizer: Its eos and pad tokens are compared.

    Raises:
        ValueError: Nothing would be trained in any row, or the end-of-sequence token would never be.
    """
    if collator is None or not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    if isinstance(collator, DataCollatorForCompletionOnlyLM):
        check_templates(collator, (batch["input_ids"][0] for batch in dataset.iter(1)), len(dataset))
    elif tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        check_end_is_trained(collator, list(islice(iter(dataset), NUM_SAMPLE_ROWS)), tokenizer)


def check_templates(collator: DataCollatorForCompletionOnlyLM, rows: Iterable[Any], num_rows: int) -> None:
    """Check that a collator finds an answer in at least one row.

    Args:
        collator: Finds answers by the text that comes before them.
        rows: Token ids of each row. They are read until an answer is found, which should be in the first row.
        num_rows: Number of rows, for the message.

    Raises:
        ValueError: No row has an answer. The message shows the tokens of the templates and of the first row, or how
            a row has a template with other white space.
    """
    first = None
    for ids in rows:
        first = first if first is not None else list(ids)
        if collator.finds_answer(ids):
            return
    near_miss = collator.near_miss()
    if near_miss is not None:
        raise ValueError(near_miss)
    if first is not None:
        raise ValueError(
            f"none of the {num_rows} rows has {collator.templates()}, so nothing would be trained. The first row is "
            f"{collator.tokenizer.convert_ids_to_tokens(first[:40])} {first[:40]}. Give the template as it is in the "
            "text, or its token ids there; if rows were truncated before their answers, raise max_length"
        )


def check_end_is_trained(collator: Callable, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a collator which masks padding by its id does not mask the end-of-sequence token, too.

    Args:
        collator: Called with `rows`.
        rows: Some rows of the data set.
        tokenizer: Its padding token is its end-of-sequence token.

    Raises:
        ValueError: The rows have end-of-sequence tokens to train, and the batch made of them has none.
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


def check_token_rows(model: Any, config: SFTConfig, collator: Callable | None, train: Any, evaluation: Any) -> None:
    """Check prepared rows by `check_borders`, `check_token_ids` and `check_positions`."""
    check_borders(collator, train, evaluation)
    check_token_ids(model, train, evaluation)
    check_positions(model, config, train, evaluation)


def check_borders(collator: Callable | None, train: Any, evaluation: Any) -> None:
    """Check that a user's collator keeps the `seq_lengths` of packed rows, which state where documents end.

    Args:
        collator: As it was given to the trainer; None = this library's.
        train: Prepared rows.
        evaluation: Prepared rows, or a dict of data sets.

    Raises:
        ValueError: The collator drops `seq_lengths`, so that the documents of a row would see each other.
    """
    if collator is None or isinstance(collator, (DataCollatorForSFT, DataCollatorForCompletionOnlyLM)):
        return
    for rows in [train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]:
        first = next(iter(rows), None) if isinstance(rows, (Dataset, IterableDataset)) else None
        if first is not None and "seq_lengths" in first and "seq_lengths" not in collator([first]):
            raise ValueError(
                f"rows are packed, and {_name(collator)} drops their seq_lengths, so that documents would see each "
                "other: leave data_collator out, keep that column (as DataCollatorForSFT does), or set packing=False"
            )


def check_token_ids(model: Any, *data: Any) -> None:
    """Check that the model has an embedding for every token id. Streams are not checked.

    Args:
        model: Wrapped or not.
        data: Prepared data sets, dicts of data sets, or None.

    Raises:
        ValueError: An id has no embedding. The message names the id, its row and the number of embeddings.
    """
    num_tokens = causal_lm(model).get_input_embeddings().weight.shape[0]
    for dataset in data:
        if isinstance(dataset, dict):
            check_token_ids(model, *dataset.values())
        if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names or num_tokens == 0:
            continue
        batches = dataset.select_columns("input_ids").with_format("arrow").iter(ROWS_AT_A_TIME)
        for number, batch in enumerate(batches):
            ids = pc.list_flatten(batch["input_ids"])
            bounds = pc.min_max(ids).as_py()
            wrong = [value for value in (bounds["max"], bounds["min"]) if value is not None]
            wrong = [value for value in wrong if not 0 <= value < num_tokens]
            if wrong:
                place = pc.index(ids, wrong[0]).as_py()
                row = number * ROWS_AT_A_TIME + pc.list_parent_indices(batch["input_ids"])[place].as_py()
                raise ValueError(
                    f"row {row} has the token id {wrong[0]}, and the model has embeddings for {num_tokens} tokens; "
                    "tokenize with the model's own tokenizer, or resize its embeddings"
                )


def check_positions(model: Any, config: SFTConfig, *data: Any) -> None:
    """Check that no document is longer than the number of positions that the model has learned.

    Args:
        model: Wrapped or not.
        config: `max_length`, by which streamed rows are judged.
        data: Prepared data sets, dicts of data sets, or None.

    Raises:
        ValueError: A document is too long. The message names its length, its row if known, the number of positions
            and the option to set.
    """
    limit = num_positions(model)
    if limit is None:
        return
    for dataset in data:
        if isinstance(dataset, dict):
            check_positions(model, config, *dataset.values())
            continue
        length, where = _longest(dataset, config)
        if length > limit:
            raise ValueError(
                f"{where}, and the model ({causal_lm(model).config.model_type}) has learned {limit} positions: set "
                f"max_length={limit}, or less"
            )


def _longest(dataset: Any, config: SFTConfig) -> tuple[int, str]:
    """Return the length of the longest document that a data set has (or may have), and a clause that says where."""
    if isinstance(dataset, ConstantLengthDataset):
        return dataset.seq_length, f"documents of up to seq_length={dataset.seq_length} tokens are packed"
    if isinstance(dataset, IterableDataset) and not config.skip_prepare_dataset and config.max_length is not None:
        length = int(config.max_length)
        return length, f"rows are streamed, with up to max_length={length} tokens"
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return 0, ""
    packed = "seq_lengths" in dataset.column_names
    longest, row = 0, 0
    column = "seq_lengths" if packed else "input_ids"
    for number, batch in enumerate(dataset.select_columns(column).with_format("arrow").iter(ROWS_AT_A_TIME)):
        lengths = pc.list_flatten(batch[column]) if packed else pc.list_value_length(batch[column])
        found = pc.max(lengths).as_py() or 0
        if found > longest:
            place = pc.index(lengths, found).as_py()
            place = pc.list_parent_indices(batch[column])[place].as_py() if packed else place
            longest, row = found, number * ROWS_AT_A_TIME + place
    return longest, f"row {row} has a document of {longest} tokens"


def number_left_padded(collator: Callable | None, model: Any) -> None:
    """Have a collator that pads on the left number positions from each row's first token, for learned positions.

    Without position ids, such a model would number the padding, too: a row's loss would depend on its neighbours.
    """
    if isinstance(collator, DataCollatorForCompletionOnlyLM) and num_positions(model) is not None:
        takes_them = "position_ids" in signature(causal_lm(model).forward).parameters
        collator.return_position_ids = takes_them and collator.tokenizer.padding_side == "left"


def num_positions(model: Any) -> int | None:
    """Return the number of positions that a model has a table for; None if it computes positions, as rotary ones."""
    base = causal_lm(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    modules = [module for _, module in _position_tables(base.named_modules()) if isinstance(module, nn.Embedding)]
    sizes = [module.num_embeddings for module in modules]
    sizes += [len(buffer) for _, buffer in _position_tables(base.named_buffers())]
    return limit if any(limit <= size <= limit + SPARE_ROWS for size in sizes) else None


def _position_tables(named: Any) -> list[tuple[str, Any]]:
    return [(name, found) for name, found in named if POSITION_TABLE.search(name)]
