"""From a data set of any known shape to token rows with labels: what `SFTTrainer` does before it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from sft.chat import ChatRenderer, TrainOn
from sft.config import DEFAULT_MAX_LENGTH, SFTConfig
from sft.encoding import Encoder
from sft.labels import IGNORE_INDEX
from sft.packing import apply_overflow, pack_dataset, truncate_dataset
from sft.records import Kind, Layout, detect_layout, normalize

logger = logging.getLogger(__name__)

NO_LIMIT = 2**31 - 1
FormattingFunc = Callable[[Any], Any]


@dataclass(frozen=True)
class Plan:
    """How a data set is read and what is trained of it."""

    layout: Layout
    train_on: TrainOn
    text_field: str = "text"
    with_weights: bool = False


def resolve_max_length(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest sequence in tokens: `config.max_length`, else the smaller of 1024 and the tokenizer's limit."""
    if config.max_length is not None:
        return config.max_length
    return min(DEFAULT_MAX_LENGTH, tokenizer.model_max_length)


def prepare_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    *,
    packing: bool = False,
    formatting_func: FormattingFunc | None = None,
    name: str = "train",
) -> Any:
    """Tokenize, mask, cut and pack a data set.

    Args:
        dataset: `Dataset` or `IterableDataset` of texts, conversations, prompts and completions, instructions, or
            token ids; anything else (such as `ConstantLengthDataset`) is passed through.
        tokenizer: A fast tokenizer.
        config: What is trained, and the lengths.
        packing: Put several documents into a row.
        formatting_func: Example (or batch) to text (or texts), applied first.
        name: What messages call the data set.

    Returns:
        Rows with `input_ids`, `labels`, `seq_lengths` when packed, `loss_weights` when some weight is not 1.

    Raises:
        ValueError: The columns are of no known shape, a row does not fit, options contradict the data, or nothing
            trainable is left.
    """
    if config.skip_prepare_dataset or not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"the {name} data set has no rows")
    if "seq_lengths" in columns_of(dataset) and "input_ids" in columns_of(dataset):
        return dataset  # packed already
    if formatting_func is not None:
        dataset = apply_formatting(dataset, formatting_func, config)
    plan = plan_preparation(dataset, config, formatted=formatting_func is not None)
    encoded = encode_dataset(dataset, tokenizer, plan, config)
    return fit_lengths(encoded, resolve_max_length(config, tokenizer), config, packing=packing, name=name)


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Column names; a streamed data set without features is asked for its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the streamed data set has no rows")
    return list(first)


def plan_preparation(dataset: Dataset | IterableDataset, config: SFTConfig, *, formatted: bool = False) -> Plan:
    """Decide from all columns and the options how rows are read and what is trained.

    Raises:
        ValueError: No known combination of columns, or an option that the data can't follow.
    """
    columns = columns_of(dataset)
    text_field = "text" if formatted else config.dataset_text_field
    if formatted:
        layout = Layout(Kind.TEXT, ("text",))
    elif text_field != "text" and text_field in columns:
        layout = Layout(Kind.TEXT, (text_field,))
    else:
        layout = detect_layout(columns)
    weighted = layout.kind in (Kind.MESSAGES, Kind.PROMPT_COMPLETION) and has_key(dataset, "weight")
    return Plan(layout, what_is_trained(layout.kind, dataset, config), text_field, weighted)


def what_is_trained(kind: Kind, dataset: Dataset | IterableDataset, config: SFTConfig) -> TrainOn:
    """Turn `completion_only_loss` and `assistant_only_loss` into one choice.

    Raises:
        ValueError: An option asks for a part that this kind of data does not have.
    """
    if kind is Kind.PROMPT_COMPLETION:
        if config.assistant_only_loss:
            return TrainOn.ASSISTANT
        return TrainOn.ALL if config.completion_only_loss is False else TrainOn.COMPLETION
    if kind is Kind.MESSAGES:
        if config.completion_only_loss and not config.assistant_only_loss:
            raise ValueError(
                "completion_only_loss=True needs columns prompt and completion, the data has conversations; "
                "use assistant_only_loss=True"
            )
        return TrainOn.ASSISTANT if config.assistant_only_loss else TrainOn.ALL
    if kind is Kind.TEXT and (config.assistant_only_loss or config.completion_only_loss):
        option = "assistant_only_loss" if config.assistant_only_loss else "completion_only_loss"
        raise ValueError(
            f"{option}=True, but plain text says nothing of who wrote what; give messages or prompt and completion, "
            "or a DataCollatorForCompletionOnlyLM with the text that begins an answer"
        )
    if kind is Kind.TOKENIZED:
        check_masks(columns_of(dataset), config)
    return TrainOn.ALL


def check_masks(columns: list[str], config: SFTConfig) -> None:
    """Refuse an option on tokenized rows that lack the mask it speaks of."""
    for asked, option, mask in (
        (config.assistant_only_loss, "assistant_only_loss", "assistant_masks"),
        (config.completion_only_loss, "completion_only_loss", "completion_mask"),
    ):
        if asked and mask not in columns and "labels" not in columns:
            raise ValueError(f"{option}=True needs a column {mask} (or labels) beside input_ids, found {columns}")


def has_key(dataset: Dataset | IterableDataset, key: str) -> bool:
    """Whether messages of this data set may carry a key, going by the schema, else by the first row."""
    if dataset.features is not None:
        return f"'{key}'" in repr(dataset.features)
    return f"'{key}'" in repr(next(iter(dataset), None))


def apply_formatting(dataset: Any, formatting_func: FormattingFunc, config: SFTConfig) -> Any:
    """Turn examples into a column `text`.

    The function takes one example and returns its text; or it takes a batch (column -> list) and returns a list of
    texts. Which of both is found by calling it with the first example.
    """
    first = next(iter(dataset))
    batched = returns_list(formatting_func, first)
    size = config.dataset_batch_size
    return dataset.map(
        partial(format_batch, formatting_func=formatting_func, batched=batched),
        batched=True,
        batch_size=size,
        remove_columns=columns_of(dataset),
    )


def returns_list(formatting_func: FormattingFunc, example: dict[str, Any]) -> bool:
    """Whether a formatting function is of the batched form.

    Raises:
        ValueError: It returns neither a text nor a list.
    """
    try:
        result = formatting_func(example)
    except (TypeError, KeyError, IndexError, AttributeError):
        # a function that iterates over a batch may stumble over a single example's values
        result = formatting_func({name: [value] for name, value in example.items()})
    if not isinstance(result, (str, list)):
        raise ValueError(
            f"formatting_func must return a text, or a list of texts for a batch; it returned {type(result).__name__}"
        )
    return isinstance(result, list)


def format_batch(batch: dict[str, list[Any]], formatting_func: FormattingFunc, batched: bool) -> dict[str, list[str]]:
    """Apply a formatting function of either form to a batch."""
    num_rows = len(next(iter(batch.values())))
    if batched:
        texts = formatting_func(batch)
    else:
        texts = [formatting_func({name: values[row] for name, values in batch.items()}) for row in range(num_rows)]
    if len(texts) != num_rows:
        raise ValueError(f"formatting_func returned {len(texts)} texts for {num_rows} examples")
    return {"text": texts}


def encode_dataset(dataset: Any, tokenizer: PreTrainedTokenizerBase, plan: Plan, config: SFTConfig) -> Any:
    """Rows to `input_ids` and `labels`, in one pass.

    The result is cached by what it depends on: the rows, the tokenizer's rules and template, and the plan. Hashing the
    tokenizer object instead would neither find the cached result again nor notice a changed template.
    """
    arguments: dict[str, Any] = {"batched": True, "batch_size": config.dataset_batch_size, "with_indices": True}
    if plan.layout.kind is Kind.TOKENIZED:
        function: Any = labels_of_tokens
    else:
        function = BatchEncoder(tokenizer, plan)
    if isinstance(dataset, Dataset):
        key = [dataset._fingerprint, tokenizer_digest(tokenizer), plan, type(function).__name__]
        arguments |= {"num_proc": config.dataset_num_proc, "desc": "Tokenizing", "new_fingerprint": Hasher.hash(key)}
    return dataset.map(function, remove_columns=columns_of(dataset), **arguments)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how text becomes tokens."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__
    return Hasher.hash([rules, tokenizer.chat_template, tokenizer.special_tokens_map])


class BatchEncoder:
    """Rows of one data set to token rows; an object, so that worker processes can be handed it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
        self.plan = plan
        self.renderer = ChatRenderer(tokenizer, plan.train_on)
        self.encoder = Encoder(tokenizer)

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Encode a batch (column -> values of its rows)."""
        rendered = [self.renderer.render(self.record(batch, place, row)) for place, row in enumerate(indices)]
        rows = self.encoder.encode(rendered, with_weights=self.plan.with_weights)
        names = ["input_ids", "labels", *(["loss_weights"] if self.plan.with_weights else [])]
        return {name: [row[name] for row in rows] for name in names}  # type: ignore[literal-required]

    def record(self, batch: Mapping[str, list[Any]], place: int, row_number: int) -> dict[str, Any]:
        """One row of a batch as a record whose id is the row's number in the data set, or its own."""
        row = {name: values[place] for name, values in batch.items()}
        name = str(row.get("id") or row_number)
        try:
            if self.plan.layout.kind is Kind.TEXT:
                row = {"text": row[self.plan.text_field]}
                return {**normalize(row, Layout(Kind.TEXT, ("text",))), "id": name}
            return {**normalize(row, self.plan.layout, prune_nulls=True), "id": name}
        except ValueError as error:
            raise ValueError(f"row {name}: {error}") from error


def labels_of_tokens(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
    """Labels of rows that are tokenized already: their own, or the ids where all masks are 1."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    labels = []
    for row_number, row in zip(indices, rows, strict=True):
        record = normalize(row, Kind.TOKENIZED)
        masks = [record[name] for name in ("completion_mask", "assistant_masks") if name in record]
        if "labels" in record:
            labels.append(record["labels"])
        else:
            keep = [all(marks) for marks in zip(*masks, strict=True)] if masks else [True] * len(record["input_ids"])
            labels.append(
                [token if kept else IGNORE_INDEX for token, kept in zip(record["input_ids"], keep, strict=True)]
            )
        if not record["input_ids"]:
            raise ValueError(f"row {row_number} has no input_ids")
    return {"input_ids": batch["input_ids"], "labels": labels}


def fit_lengths(dataset: Any, max_length: int, config: SFTConfig, *, packing: bool, name: str) -> Any:
    """Cut or split what is too long, leave out rows in which nothing is trained, pack; says in the log what was cut.

    Raises:
        ValueError: No row with a trained token is left.
    """
    if isinstance(dataset, IterableDataset):
        if packing:
            return pack_dataset(dataset, max_length, config.packing_strategy)
        return truncate_dataset(dataset, max_length)
    wrapped = packing and config.packing_strategy == "wrapped"
    policy = "split" if packing and config.packing_strategy == "bfd_split" else "truncate"
    # wrapping divides documents wherever a row is full, so only rows without trained tokens are left out here
    kept, report = apply_overflow(dataset, NO_LIMIT if wrapped else max_length, policy)
    if report.summary():
        logger.warning("%s data: %s", name, report.summary())
    if len(kept) == 0:
        raise ValueError(
            f"no trainable token in any of the {len(dataset)} {name} rows at max_length={max_length}: look at the "
            "masks with sft.preview_masks, raise max_length, or check completion_only_loss and assistant_only_loss"
        )
    return pack_dataset(kept, max_length, config.packing_strategy) if packing else kept
