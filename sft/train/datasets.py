"""From a data set of any known shape to token rows with labels: what `SFTTrainer` does before it trains.

The data sets of a trainer: each prepared and packed as its options say, at the start or when it is evaluated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from sft.chat.render import ChatRenderer, Rendered, TrainOn, asked_part
from sft.config import DEFAULT_MAX_LENGTH, SFTConfig
from sft.data.messages import check_text_alone
from sft.data.records import (
    CONVERSATION_COLUMNS,
    Kind,
    Layout,
    detect_layout,
    normalize,
)
from sft.labels import TOKEN_MASKS
from sft.tokens.constant_length import constant_length_rows
from sft.tokens.encoding import Encoder
from sft.tokens.packing import apply_overflow, limit_and_pack, pack_dataset
from sft.tokens.pretokenized import StreamLimit, labels_of_tokens, nothing_trained, warn_of_double_bos
from sft.train.batches import choose_packing

logger = logging.getLogger(__name__)

NO_LIMIT = 2**31 - 1

FormattingFunc = Callable[[Any], Any]


@dataclass(frozen=True)
class Plan:
    """How a data set is read and what is trained of it.

    Args:
        layout: Which columns hold what.
        train_on: What the loss is taken on.
        text_field: Column of plain text.
        with_weights: Whether rows carry `loss_weights`.
        add_special_tokens: Whether the tokenizer adds its own to plain text; None = unless the text begins with them.
        append_eos: Whether the end-of-sequence token follows plain text; None = yes.
        masks: Columns of tokenized rows that say what is trained.
    """

    layout: Layout
    train_on: TrainOn
    text_field: str = "text"
    with_weights: bool = False
    add_special_tokens: bool | None = None
    append_eos: bool | None = None
    masks: tuple[str, ...] = TOKEN_MASKS


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
    dataset = as_python_values(dataset)
    if formatting_func is not None:
        dataset = apply_formatting(dataset, formatting_func, config)
    plan = plan_preparation(dataset, config, formatted=formatting_func is not None)
    encoded = encode_dataset(dataset, tokenizer, plan, config)
    if plan.layout.kind is Kind.TOKENIZED and isinstance(encoded, Dataset):
        warn_of_double_bos((batch["input_ids"][0] for batch in encoded.iter(1)), tokenizer.bos_token_id, name)
    return fit_lengths(encoded, resolve_max_length(config, tokenizer), config, packing=packing, name=name)


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Column names; a streamed data set without features is asked for its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the streamed data set has no rows")
    return list(first)


def as_python_values(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data set without the format (torch, numpy, ...) that it was set to; a transform of the user's stays."""
    if isinstance(dataset, Dataset):
        return dataset if dataset.format["type"] in (None, "custom") else dataset.with_format(None)
    return dataset.with_format(None)


def plan_preparation(dataset: Dataset | IterableDataset, config: SFTConfig, *, formatted: bool = False) -> Plan:
    """Decide from all columns and the options how rows are read and what is trained.

    Raises:
        ValueError: No known combination of columns, or an option that the data can't follow.
    """
    layout = choose_layout(columns_of(dataset), config, formatted=formatted)
    return Plan(
        layout,
        what_is_trained(layout.kind, dataset, config),
        config.dataset_text_field,
        may_be_weighted(dataset, layout),
        config.dataset_option("add_special_tokens"),
        config.dataset_option("append_concat_token"),
        tuple(mask for mask in TOKEN_MASKS if mask != "completion_mask" or config.completion_only_loss is not False),
    )


def what_is_trained(kind: Kind, dataset: Dataset | IterableDataset, config: SFTConfig) -> TrainOn:
    """Turn `completion_only_loss`, `assistant_only_loss` and `last_turn_only_loss` into one choice.

    Raises:
        ValueError: An option asks for a part that this kind of data does not have.
    """
    if kind is Kind.TOKENIZED:
        check_masks(columns_of(dataset), config)
        return TrainOn.ALL
    asked = [name for name in ("last_turn_only_loss", "assistant_only_loss") if getattr(config, name)]
    if kind is Kind.TEXT and (asked or config.completion_only_loss):
        raise ValueError(
            f"{[*asked, 'completion_only_loss'][0]}=True, but plain text says nothing of who wrote what; give messages "
            "or prompt and completion, or a DataCollatorForCompletionOnlyLM with the text that begins an answer"
        )
    part = asked_part(config, has_completion=kind is Kind.PROMPT_COMPLETION)
    if part is None:
        raise ValueError(
            "completion_only_loss=True needs columns prompt and completion, the data has conversations; "
            "use assistant_only_loss=True"
        )
    return part


def check_masks(columns: list[str], config: SFTConfig) -> None:
    """Refuse an option on tokenized rows that lack the mask it speaks of."""
    for asked, option, mask in (
        (config.last_turn_only_loss, "last_turn_only_loss", "labels"),
        (config.assistant_only_loss, "assistant_only_loss", "assistant_masks"),
        (config.completion_only_loss, "completion_only_loss", "completion_mask"),
    ):
        if asked and mask not in columns and "labels" not in columns:
            raise ValueError(f"{option}=True needs a column {mask} (or labels) beside input_ids, found {columns}")


def choose_layout(columns: list[str], config: SFTConfig, *, formatted: bool = False) -> Layout:
    """Which columns hold what; texts in `dataset_text_field` go before questions and answers beside them.

    Data sets such as Alpaca's have the text that was made of `instruction` and `output` in a column of its own.

    Raises:
        ValueError: No known combination of columns, or no column of the name that was asked for.
    """
    text_field = config.dataset_text_field
    as_text = Layout(Kind.TEXT, (text_field,))
    if formatted or (text_field in columns and text_field not in ("text", *CONVERSATION_COLUMNS)):
        return as_text
    layout = detect_layout(columns)
    if layout.kind is Kind.TEXT and text_field not in columns:
        raise ValueError(f"dataset_text_field={text_field!r} is no column of the data, which has {columns}")
    asked = config.completion_only_loss or config.assistant_only_loss or config.last_turn_only_loss
    if layout.is_question_answer and text_field in columns and not asked:
        logger.info("column %r is trained; %s are not read", text_field, " and ".join(layout.content))
        return as_text
    return layout


def may_be_weighted(dataset: Dataset | IterableDataset, layout: Layout) -> bool:
    """Whether messages of this data set may carry a weight: the schema says, and where there is none, they may."""
    if layout.is_question_answer or layout.kind not in (Kind.MESSAGES, Kind.PROMPT_COMPLETION):
        return False
    if dataset.features is None:
        first: Any = next(iter(dataset), {})
        return layout.kind is Kind.MESSAGES or not isinstance(first.get("prompt"), str)
    schema = " ".join(repr(dataset.features[name]) for name in layout.content)
    as_json = "Json(" in schema or (layout.kind is Kind.MESSAGES and schema.startswith("Value("))
    return as_json or "'weight'" in schema


def apply_formatting(dataset: Any, formatting_func: FormattingFunc, config: SFTConfig) -> Any:
    """Turn examples into a column of texts, `dataset_text_field`.

    The function takes one example and returns its text; or it takes a batch (column -> list) and returns a list of
    texts. Which of both is found by calling it with the first example.
    """
    first = next(iter(dataset))
    batched = returns_list(formatting_func, first)
    size = config.dataset_batch_size
    return dataset.map(
        partial(format_batch, formatting_func=formatting_func, batched=batched, column=config.dataset_text_field),
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


def format_batch(
    batch: dict[str, list[Any]], formatting_func: FormattingFunc, batched: bool, column: str
) -> dict[str, list[str]]:
    """Apply a formatting function of either form to a batch; its texts become the column."""
    num_rows = len(next(iter(batch.values())))
    if batched:
        texts = formatting_func(batch)
    else:
        texts = [formatting_func({name: values[row] for name, values in batch.items()}) for row in range(num_rows)]
    if len(texts) < num_rows:  # several texts of an example are as good as one
        raise ValueError(
            f"formatting_func returned {len(texts)} texts for a batch of {num_rows} examples; return one for each, or "
            "write it for a single example"
        )
    return {column: texts}


def encode_dataset(dataset: Any, tokenizer: PreTrainedTokenizerBase, plan: Plan, config: SFTConfig) -> Any:
    """Rows to `input_ids` and `labels`, in one pass.

    The result is cached by what it depends on: the rows, the tokenizer's rules and template, and the plan. Hashing the
    tokenizer object instead would neither find the cached result again nor notice a changed template.
    """
    arguments: dict[str, Any] = {"batched": True, "batch_size": config.dataset_batch_size, "with_indices": True}
    if plan.layout.kind is Kind.TOKENIZED:
        function: Any = partial(labels_of_tokens, masks=plan.masks)
    else:
        function = BatchEncoder(tokenizer, plan, as_table=isinstance(dataset, Dataset))
    if isinstance(dataset, Dataset):
        key = [dataset._fingerprint, tokenizer_digest(tokenizer), plan, type(function).__name__]
        arguments |= {"num_proc": config.dataset_num_proc, "desc": "Tokenizing", "new_fingerprint": Hasher.hash(key)}
    return dataset.map(function, remove_columns=columns_of(dataset), **arguments)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how text becomes tokens."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__
    return Hasher.hash([rules, tokenizer.chat_template, tokenizer.special_tokens_map])


class BatchEncoder:
    """Rows of one data set to token rows; an object, so that worker processes can be handed it.

    Args:
        tokenizer: A fast tokenizer.
        plan: How rows are read.
        as_table: Give Arrow tables, which a data set stores as they are, instead of lists, which streams expect.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, plan: Plan, *, as_table: bool = False) -> None:
        self.plan = plan
        self.as_table = as_table
        self.renderer = ChatRenderer(tokenizer, plan.train_on)
        self.encoder = Encoder(tokenizer)
        self._has_warned = False

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]] | pa.Table:
        """Encode a batch (column -> values of its rows)."""
        rendered = [self.render(self.record(batch, place, row)) for place, row in enumerate(indices)]
        encoded = self.encoder.encode_flat(rendered, with_weights=self.plan.with_weights)
        if encoded.crossings and not self._has_warned:
            self._has_warned = True
            number, detail = next(iter(encoded.crossings.items()))
            logger.warning(
                "row %d and perhaps others: %s. When the model generates, its prompt ends there in other tokens than "
                "in training; let what comes before end in a whole token (no space at the end of a generation prompt)",
                indices[number],
                detail,
            )
        if self.as_table:
            return encoded.table()
        rows = encoded.rows()
        return {name: [row[name] for row in rows] for name in encoded.columns()}  # type: ignore[literal-required]

    def render(self, record: dict[str, Any]) -> Rendered:
        """Render a record; what the options say of special tokens holds for plain text.

        Raises:
            ValueError: The options ask for tokens that a chat template is there to print.
        """
        rendered = self.renderer.render(record)
        if rendered.append_eos:  # plain text; where it begins with bos, another one would be one too many
            add_special_tokens = rendered.add_special_tokens and self.plan.add_special_tokens is not False
            append_eos = self.plan.append_eos is not False
            return replace(rendered, add_special_tokens=add_special_tokens, append_eos=append_eos)
        if self.plan.add_special_tokens or self.plan.append_eos:
            raise ValueError(
                "dataset_kwargs asks for add_special_tokens or append_concat_token, but the chat template prints a "
                "conversation's special tokens itself; leave them out, or set them to False"
            )
        return rendered

    def record(self, batch: Mapping[str, list[Any]], place: int, row_number: int) -> dict[str, Any]:
        """One row of a batch as a record whose id is the row's number in the data set, or its own."""
        row = {name: values[place] for name, values in batch.items()}
        name = str(row.get("id") or row_number)
        try:
            if self.plan.layout.kind is Kind.TEXT:
                row = {"text": row[self.plan.text_field]}
                return {**normalize(row, Layout(Kind.TEXT, ("text",))), "id": name}
            record = normalize(row, self.plan.layout, prune_nulls=True)
            check_text_alone(record)
            return {**record, "id": name}
        except ValueError as error:
            raise ValueError(f"row {name}: {error}") from error


def fit_lengths(dataset: Any, max_length: int, config: SFTConfig, *, packing: bool, name: str) -> Any:
    """Cut or split what is too long, leave out rows in which nothing is trained, pack; says in the log what was cut.

    Raises:
        ValueError: No row with a trained token is left.
    """
    if isinstance(dataset, IterableDataset):
        divided = packing and config.packing_strategy in ("bfd_split", "wrapped")
        limit = StreamLimit(NO_LIMIT if divided else max_length, name)
        kept = dataset.map(limit, batched=True, batch_size=config.dataset_batch_size)
        return pack_dataset(kept, max_length, config.packing_strategy) if packing else kept
    if packing:
        fitted, report = limit_and_pack(dataset, max_length, config.packing_strategy)
    else:
        fitted, report = apply_overflow(dataset, max_length)
    if report.summary():
        logger.warning("%s data: %s", name, report.summary())
    if not report.source_rows:
        raise ValueError(nothing_trained(name, f"the {len(dataset)}", max_length))
    return fitted


def prepare_all(dataset: Any, *, name: str, **kwargs: Any) -> Any:
    """`prepare_rows` for one data set, for each of a dict of them, or for none."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: prepare_rows(rows, name=f"{name} {key}", **kwargs) for key, rows in dataset.items()}
    return prepare_rows(dataset, name=name, **kwargs)


def prepare_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    *,
    packing: bool,
    formatting_func: FormattingFunc | None,
    name: str,
) -> Any:
    """Prepare one data set; the options of `ConstantLengthDataset` have it packed in that way."""
    is_raw = isinstance(dataset, (Dataset, IterableDataset)) and not config.skip_prepare_dataset
    if not (packing and config.constant_length and is_raw):
        return prepare_dataset(dataset, tokenizer, config, packing=packing, formatting_func=formatting_func, name=name)
    if formatting_func is not None:
        dataset = apply_formatting(dataset, formatting_func, config)
    seq_length = resolve_max_length(config, tokenizer)
    return constant_length_rows(dataset, tokenizer, config, seq_length=seq_length, name=name)


def prepare_later(dataset: Any, config: SFTConfig, prepare: Callable[..., Any]) -> Any:
    """Rows for an evaluation of their own: prepared as the trainer's evaluation rows were, unless they are already.

    Args:
        dataset: As it was given to `evaluate` or `predict`; None and names are handed back.
        config: Whether evaluation rows are packed.
        prepare: `prepare_all` with the trainer's tokenizer, options and formatting function.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)) or "labels" in (dataset.column_names or ()):
        return dataset
    return prepare(dataset, packing=choose_packing(config, None, []).eval, name="eval")
