"""Preparation of data sets: rows of texts, conversations or token ids become token rows with labels, perhaps packed.

`prepare_all` prepares the data sets that are given to `SFTTrainer`, `prepare_later` one that is given to `evaluate` or
`predict`. Each data set goes through `prepare_dataset`:

1. `apply_formatting` calls the user's `formatting_func`, if there is one.
2. `plan_preparation` decides from the columns and the options how rows are read and what is trained.
3. `encode_dataset` renders each row as text, tokenizes it, and masks what is not trained.
4. `fit_lengths` truncates, splits or packs rows, and drops those in which nothing is trained; `shuffled` shuffles them
   before, if asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from sft.chat.checks import SpecialText
from sft.chat.render import ChatRenderer, Rendered, TrainOn, asked_part, messages_of
from sft.chat.stops import TurnEnds
from sft.config import SFTConfig
from sft.data.messages import check_text_alone
from sft.data.records import (
    CONVERSATION_COLUMNS,
    Kind,
    Layout,
    detect_layout,
    normalize,
)
from sft.data.source_row import without_added_nulls
from sft.labels import TOKEN_MASKS
from sft.options import NotPrintedPolicy, ThinkingPolicy
from sft.tokens.constant_length import constant_length_rows
from sft.tokens.encoding import Encoder
from sft.tokens.packing import apply_overflow, limit_and_pack, pack_dataset
from sft.tokens.pretokenized import StreamLimit, labels_of_tokens, nothing_trained, warn_of_double_bos
from sft.train.batches import choose_packing

logger = logging.getLogger(__name__)

NUM_CHECKED_ROWS = 64
"""Rows of a data set of which it is checked that what they end in ends generation."""

NUM_CHECKED_STREAMED = 2
"""The same for a stream, whose rows are read once more for it."""

NO_LIMIT = 2**31 - 1
"""Length limit of rows that are not limited, or that are divided when they are packed."""

GROUP_COLUMN = "conversation"
"""Column of token rows with the number of the conversation that they were made of, by `thinking="unroll"`."""

FormattingFunc = Callable[[Any], Any]
"""Returns the text of an example, or a list of texts for a batch (column -> values)."""


@dataclass(frozen=True)
class Plan:
    """How a data set is read, and which of its tokens are trained.

    Args:
        layout: The kind of rows, and the columns with their content.
        train_on: The part of each row that the loss is taken on.
        text_field: Column of plain text.
        with_weights: Whether rows get `loss_weights`.
        add_special_tokens: Whether the tokenizer adds its special tokens to plain text; None = yes, unless the text
            begins with bos.
        append_eos: Whether the end-of-sequence token is appended to plain text; None = yes.
        masks: Columns of tokenized rows that mark the trained tokens.
        not_printed: What to do with a conversation that says more than the chat template prints.
        thinking: What to do with the reasoning of the assistant.
    """

    layout: Layout
    train_on: TrainOn
    text_field: str = "text"
    with_weights: bool = False
    add_special_tokens: bool | None = None
    append_eos: bool | None = None
    masks: tuple[str, ...] = TOKEN_MASKS
    not_printed: NotPrintedPolicy = "fail"
    thinking: ThinkingPolicy = "keep"


def prepare_all(dataset: Any, *, name: str, **kwargs: Any) -> Any:
    """Apply `prepare_rows` to a data set or to each of a dict of data sets; return None for None."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: prepare_rows(rows, name=f"{name} {key}", **kwargs) for key, rows in dataset.items()}
    return prepare_rows(dataset, name=name, **kwargs)


def prepare_later(dataset: Any, config: SFTConfig, prepare: Callable[..., Any]) -> Any:
    """Prepare rows that are given to `evaluate` or `predict`, unless they are prepared already.

    Args:
        dataset: As it was given. None and names of data sets are returned as they are.
        config: Whether evaluation rows are packed.
        prepare: `prepare_all` with the trainer's tokenizer, options and formatting function.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)) or "labels" in (dataset.column_names or ()):
        return dataset
    return prepare(dataset, packing=choose_packing(config, None, []).eval, name="eval")


def prepare_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    *,
    packing: bool,
    formatting_func: FormattingFunc | None,
    name: str,
    turn_ends: TurnEnds | None = None,
) -> Any:
    """Prepare one data set; with `num_of_sequences` or `chars_per_token`, pack it as `ConstantLengthDataset` does."""
    is_raw = isinstance(dataset, (Dataset, IterableDataset)) and not config.skip_prepare_dataset
    if not (packing and config.constant_length and is_raw):
        return prepare_dataset(
            dataset,
            tokenizer,
            config,
            packing=packing,
            formatting_func=formatting_func,
            name=name,
            turn_ends=turn_ends,
        )
    check_preparable(dataset, config, packing=packing, name=name)
    formatting_func = formatting_of_raw_rows(dataset, formatting_func, name)
    if formatting_func is not None:
        dataset = apply_formatting(dataset, formatting_func, config)
    seq_length = resolve_max_length(config, tokenizer)
    dataset = shuffled(dataset, config)
    return constant_length_rows(dataset, tokenizer, config, seq_length=seq_length, name=name)


def prepare_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    *,
    packing: bool = False,
    formatting_func: FormattingFunc | None = None,
    name: str = "train",
    turn_ends: TurnEnds | None = None,
) -> Any:
    """Tokenize, mask, truncate and pack a data set.

    Args:
        dataset: `Dataset` or `IterableDataset` of texts, conversations, prompts with completions, instructions, or
            token ids. Anything else (such as `ConstantLengthDataset`) is returned as it is, and so are packed rows.
        tokenizer: A fast tokenizer.
        config: Lengths, and which tokens are trained.
        packing: Put several documents into one row.
        formatting_func: Returns the text of an example, or the texts of a batch; applied first.
        name: Name of the data set in messages.
        turn_ends: Checks whether what the first rows end in ends generation; None = no check.

    Returns:
        Rows with `input_ids`, `labels`, `seq_lengths` when packed, and `loss_weights` when messages may have weights.

    Raises:
        ValueError: The columns have no known form, a row is invalid, options contradict the data, or no row has a
            trained token.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    if config.skip_prepare_dataset:
        return shuffled(dataset, config)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"the {name} data set has no rows")
    if "seq_lengths" in columns_of(dataset) and "input_ids" in columns_of(dataset):
        return shuffled(dataset, config)  # packed already
    check_preparable(dataset, config, packing=packing, name=name)
    formatting_func = formatting_of_raw_rows(dataset, formatting_func, name)
    dataset = as_python_values(dataset)
    if formatting_func is not None:
        dataset = apply_formatting(dataset, formatting_func, config)
    plan = plan_preparation(dataset, config, formatted=formatting_func is not None)
    encoded = encode_dataset(dataset, tokenizer, plan, config)
    if turn_ends is not None:
        check_turn_ends(turn_ends, dataset, tokenizer, plan)
    if plan.layout.kind is Kind.TOKENIZED and isinstance(encoded, Dataset):
        warn_of_double_bos((batch["input_ids"][0] for batch in encoded.iter(1)), tokenizer.bos_token_id, name)
    fitted = fit_lengths(
        shuffled(encoded, config), resolve_max_length(config, tokenizer), config, packing=packing, name=name
    )
    # rows packed by best fit are in order of length
    return shuffled(fitted, config) if packing and isinstance(fitted, Dataset) else fitted


def resolve_max_length(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the longest sequence in tokens: `max_length`, lowered to the tokenizer's limit if it was not given."""
    if config.max_length is None:
        return NO_LIMIT
    return config.max_length if config.is_max_length_given else min(config.max_length, tokenizer.model_max_length)


def check_preparable(dataset: Dataset | IterableDataset, config: SFTConfig, *, packing: bool, name: str) -> None:
    """Check that a data set has no transform of the user's, and that packed rows have a length.

    Raises:
        ValueError: It has a transform, which preparation would run once, so that a random one would always give one
            draw; or it is packed, and `max_length` is None.
    """
    if packing and config.max_length is None:
        raise ValueError(
            f"packing fills rows of max_length tokens, and max_length is None: give the length of a row of the {name} "
            "data set, such as max_length=2048, or packing=False"
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"the {name} data set has a transform, set by Dataset.with_transform() or set_transform(), which "
            "preparation would run once for the whole training: apply it with map() before, or else give "
            "dataset_kwargs={'skip_prepare_dataset': True} and have the transform return trainer-ready rows "
            "(input_ids and labels)"
        )


def formatting_of_raw_rows(
    dataset: Dataset | IterableDataset, formatting_func: FormattingFunc | None, name: str
) -> FormattingFunc | None:
    """Return the formatting function; None, with a warning, for a data set that is tokenized already."""
    if formatting_func is None or "input_ids" not in columns_of(dataset):
        return formatting_func
    logger.warning(
        "the %s data set has input_ids, which are trained as they are: formatting_func is not called. Leave it out, or "
        "remove the column input_ids to have its texts trained",
        name,
    )
    return None


def shuffled(dataset: Any, config: SFTConfig) -> Any:
    """Return the data set in random order by `seed` if `shuffle_dataset` is set; a stream through a buffer of rows."""
    return dataset.shuffle(seed=config.seed) if config.shuffle_dataset else dataset


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the names of the columns; if a stream does not state them, read its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the streamed data set has no rows")
    return list(first)


def as_python_values(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the data set without its output format (torch, numpy, ...)."""
    return dataset if isinstance(dataset, Dataset) and dataset.format["type"] is None else dataset.with_format(None)


def apply_formatting(dataset: Any, formatting_func: FormattingFunc, config: SFTConfig) -> Any:
    """Replace the columns by one of texts, `dataset_text_field`.

    The function either takes one example and returns its text, or takes a batch (column -> list) and returns a list of
    texts. `returns_list` finds out which, with the first example.
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
    """Return whether a formatting function takes batches, by calling it with an example.

    Raises:
        ValueError: It returns neither a text nor a list.
    """
    try:
        result = formatting_func(example)
    except (TypeError, KeyError, IndexError, AttributeError):
        # a function that iterates over the values of a batch may fail on those of one example
        result = formatting_func({name: [value] for name, value in example.items()})
    if not isinstance(result, (str, list)):
        raise ValueError(
            f"formatting_func must return a text, or a list of texts for a batch; it returned {type(result).__name__}"
        )
    return isinstance(result, list)


def format_batch(
    batch: dict[str, list[Any]], formatting_func: FormattingFunc, batched: bool, column: str
) -> dict[str, list[str]]:
    """Apply a formatting function of either form to a batch; return its texts as one column."""
    num_rows = len(next(iter(batch.values())))
    if batched:
        texts = formatting_func(batch)
    else:
        texts = [formatting_func({name: values[row] for name, values in batch.items()}) for row in range(num_rows)]
    if len(texts) < num_rows:  # more texts than examples are fine: an example may have several
        raise ValueError(
            f"formatting_func returned {len(texts)} texts for a batch of {num_rows} examples; return one for each, or "
            "write it for a single example"
        )
    return {column: texts}


def plan_preparation(dataset: Dataset | IterableDataset, config: SFTConfig, *, formatted: bool = False) -> Plan:
    """Decide from the columns and the options how rows are read and which tokens are trained.

    Raises:
        ValueError: The columns have no known form, or an option does not fit the data.
    """
    layout = choose_layout(columns_of(dataset), config, formatted=formatted)
    train_on = what_is_trained(layout.kind, dataset, config)
    check_thinking(layout.kind, train_on, config)
    return Plan(
        layout,
        train_on,
        config.dataset_text_field,
        may_be_weighted(dataset, layout),
        config.dataset_option("add_special_tokens"),
        config.dataset_option("append_concat_token"),
        tuple(mask for mask in TOKEN_MASKS if mask != "completion_mask" or config.completion_only_loss is not False),
        cast(NotPrintedPolicy, config.not_printed),
        cast(ThinkingPolicy, config.thinking),
    )


def check_thinking(kind: Kind, train_on: TrainOn, config: SFTConfig) -> None:
    """Check that `thinking` has an effect on rows of this kind.

    Raises:
        ValueError: The rows are not conversations; or `unroll` would make a row of each answer, and prompts are
            trained.
    """
    if config.thinking != "keep" and kind in (Kind.TEXT, Kind.TOKENIZED):
        raise ValueError(
            f"thinking={config.thinking!r} is about the assistant's messages, and the rows are {kind.value}; leave it "
            "out, or give conversations"
        )
    if config.thinking == "unroll" and train_on is TrainOn.ALL:
        raise ValueError(
            "thinking='unroll' makes one row of each answer, and without assistant_only_loss=True the prompts are "
            "trained, too, once for each answer; set assistant_only_loss=True, or thinking='keep'"
        )


def chats_of(dataset: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the conversations of a data set, or of each of a dict of data sets; none of a stream, which is read once.

    Rows that can't be read are left out; preparation names them.
    """
    for rows in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if not isinstance(rows, Dataset):
            continue
        try:
            layout = detect_layout(rows.column_names)
        except ValueError:
            continue
        if layout.kind not in (Kind.MESSAGES, Kind.PROMPT_COMPLETION):
            continue
        for row in as_python_values(rows):
            try:
                messages = messages_of(normalize(row, layout, prune_nulls=True))
            except ValueError:
                continue
            if messages:
                yield messages


def choose_layout(columns: list[str], config: SFTConfig, *, formatted: bool = False) -> Layout:
    """Find out which columns have the content of rows.

    Where a data set has both a text column and questions with answers, the text is used, unless an option asks for a
    part that only the latter have. Data sets such as Alpaca's repeat `instruction` and `output` in a text column.

    Raises:
        ValueError: The columns have no known form, or `dataset_text_field` names none of them.
    """
    text_field = config.dataset_text_field
    as_text = Layout(Kind.TEXT, (text_field,))
    if formatted or (text_field in columns and text_field not in ("text", *CONVERSATION_COLUMNS)):
        return as_text
    layout = detect_layout(columns)
    if layout.kind is Kind.TEXT and text_field not in columns:
        raise ValueError(f"dataset_text_field={text_field!r} is not a column of the data, which has {columns}")
    asked = config.completion_only_loss or config.assistant_only_loss or config.last_turn_only_loss
    if layout.is_question_answer and text_field in columns and not asked:
        logger.info("column %r is trained; columns %s are not read", text_field, " and ".join(layout.content))
        return as_text
    return layout


def what_is_trained(kind: Kind, dataset: Dataset | IterableDataset, config: SFTConfig) -> TrainOn:
    """Return the part of each row that `completion_only_loss` and the like ask for.

    Raises:
        ValueError: An option asks for a part that this kind of rows does not have.
    """
    if kind is Kind.TOKENIZED:
        check_masks(columns_of(dataset), config)
        return TrainOn.ALL
    asked = [name for name in ("last_turn_only_loss", "assistant_only_loss") if getattr(config, name)]
    if kind is Kind.TEXT and (asked or config.completion_only_loss):
        raise ValueError(
            f"{[*asked, 'completion_only_loss'][0]}=True, but plain text does not tell who wrote which part; give "
            "messages, or prompt and completion, or a DataCollatorForCompletionOnlyLM with the text before an answer"
        )
    part = asked_part(config, has_completion=kind is Kind.PROMPT_COMPLETION)
    if part is None:
        raise ValueError(
            "completion_only_loss=True needs columns prompt and completion, the data has conversations; "
            "use assistant_only_loss=True"
        )
    return part


def check_masks(columns: list[str], config: SFTConfig) -> None:
    """Check that tokenized rows have the mask, or the labels, that an option needs."""
    for asked, option, mask in (
        (config.last_turn_only_loss, "last_turn_only_loss", "labels"),
        (config.assistant_only_loss, "assistant_only_loss", "assistant_masks"),
        (config.completion_only_loss, "completion_only_loss", "completion_mask"),
    ):
        if asked and mask not in columns and "labels" not in columns:
            raise ValueError(f"{option}=True needs a column {mask} (or labels) next to input_ids, found {columns}")


def may_be_weighted(dataset: Dataset | IterableDataset, layout: Layout) -> bool:
    """Return whether messages of a data set may have a weight: by its schema, and yes if it has none."""
    if layout.is_question_answer or layout.kind not in (Kind.MESSAGES, Kind.PROMPT_COMPLETION):
        return False
    if dataset.features is None:
        first: Any = next(iter(dataset), {})
        return layout.kind is Kind.MESSAGES or not isinstance(first.get("prompt"), str)
    schema = " ".join(repr(dataset.features[name]) for name in layout.content)
    as_json = "Json(" in schema or (layout.kind is Kind.MESSAGES and schema.startswith("Value("))
    return as_json or "'weight'" in schema


def encode_dataset(dataset: Any, tokenizer: PreTrainedTokenizerBase, plan: Plan, config: SFTConfig) -> Any:
    """Turn rows into `input_ids` and `labels`, in one pass.

    `datasets` caches the result by what it depends on: the rows, the tokenizer's rules and template, and the plan. A
    hash of the tokenizer object would change from process to process and not depend on the template.
    """
    arguments: dict[str, Any] = {"batched": True, "batch_size": config.dataset_batch_size, "with_indices": True}
    if plan.layout.kind is Kind.TOKENIZED:
        function: Any = partial(labels_of_tokens, masks=plan.masks)
    else:
        nulls = NullsOf.of(dataset)
        function = BatchEncoder(tokenizer, plan, as_table=isinstance(dataset, Dataset), nulls=nulls)
    if isinstance(dataset, Dataset):
        key = [dataset._fingerprint, tokenizer_digest(tokenizer), plan, type(function).__name__]
        arguments |= {"num_proc": config.dataset_num_proc, "desc": "Tokenizing", "new_fingerprint": Hasher.hash(key)}
    encoded = dataset.map(function, remove_columns=columns_of(dataset), **arguments)
    if isinstance(dataset, Dataset) and len(encoded) < len(dataset):
        dropped = len(dataset) - len(encoded)
        logger.warning("%d of %d rows are dropped by not_printed='drop'", dropped, len(dataset))
        if not len(encoded):
            raise ValueError("not_printed='drop' drops all rows: the chat template prints less than each of them says")
    if isinstance(dataset, Dataset) and plan.thinking == "unroll":
        logger.info("thinking='unroll': %d rows became %d, one for each answer", len(dataset), len(encoded))
    return encoded


def check_turn_ends(turn_ends: TurnEnds, dataset: Any, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
    """Check the first rows of a data set by `TurnEnds`; texts that the user wants without eos are not checked."""
    if plan.layout.kind is Kind.TEXT and plan.append_eos is False:
        return
    encoder = BatchEncoder(tokenizer, plan)
    limit = NUM_CHECKED_ROWS if isinstance(dataset, Dataset) else NUM_CHECKED_STREAMED
    batch: dict[str, list[Any]] = next(iter(dataset.iter(limit)), {})
    numbers = list(range(len(next(iter(batch.values()), []))))
    if plan.layout.kind is Kind.TOKENIZED:
        rows = labels_of_tokens(batch, numbers, plan.masks)
        turn_ends.check_tokens(list(zip(rows["input_ids"], rows["labels"], strict=True)))
        return
    try:
        rendered = [row for place in numbers for row in encoder.render_rows(encoder.record(batch, place, place))]
    except ValueError:
        return  # of a stream: the row is refused when it is reached
    turn_ends.check_rendered(rendered)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that determines which tokens a text becomes."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__
    return Hasher.hash([rules, tokenizer.chat_template, tokenizer.special_tokens_map])


@dataclass(frozen=True)
class NullsOf:
    """Which nulls of a data set's tools and arguments are removed, since Arrow added them.

    Args:
        features: Features of the columns; None if they are not known.
        are_added: Whether all nulls count as added where the features are not known.
    """

    features: Any = None
    are_added: bool = True

    @classmethod
    def of(cls, dataset: Dataset | IterableDataset) -> NullsOf:
        """Return the rule for a data set; rows of a Python generator never went through Arrow."""
        if isinstance(dataset, Dataset) or dataset.features is not None:
            return cls(dataset.features)
        source = getattr(dataset, "_ex_iterable", None)
        return cls(are_added=source is None or getattr(source, "iter_arrow", None) is not None)

    def clean(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row without nulls that its features show to be added."""
        if self.features is None:
            return row
        return {name: without_added_nulls(value, self.features.get(name)) for name, value in row.items()}


class BatchEncoder:
    """Function that turns rows of a data set into token rows; an object, since worker processes need to pickle it.

    Args:
        tokenizer: A fast tokenizer.
        plan: How rows are read.
        as_table: Return Arrow tables, which a data set stores as they are, instead of lists, which streams expect.
        nulls: Which nulls are removed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        *,
        as_table: bool = False,
        nulls: NullsOf = NullsOf(),
    ) -> None:
        self.plan = plan
        self._nulls = nulls
        self.as_table = as_table
        self.renderer = ChatRenderer(tokenizer, plan.train_on, plan.not_printed, plan.thinking)
        self.encoder = Encoder(tokenizer)
        self._special_text = SpecialText(tokenizer)
        self._has_warned: set[str] = set()

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]] | pa.Table:
        """Encode a batch.

        Args:
            batch: Column -> values of its rows.
            indices: Numbers of the rows in the data set, for messages.
        """
        records = [self.record(batch, place, row) for place, row in enumerate(indices)]
        for record in records:
            self._warn_of_text(record)
        self.renderer.render_ahead(records)
        made = [self.render_rows(record) for record in records]
        indices = [row for row, rows in zip(indices, made, strict=True) for _ in rows]
        rendered, indices = self._without_dropped([row for rows in made for row in rows], indices)
        self._warn_of_removed(rendered, indices)
        encoded = self.encoder.encode_flat(rendered, with_weights=self.plan.with_weights)
        if encoded.crossings and "crossings" not in self._has_warned:
            self._has_warned.add("crossings")
            number, detail = next(iter(encoded.crossings.items()))
            logger.warning(
                "row %d and perhaps others: %s. When the model generates, its prompt ends there in other tokens than "
                "in training; let the text before end with a complete token (no space at the end of a generation "
                "prompt)",
                indices[number],
                detail,
            )
        if self.as_table:
            table = encoded.table()
            return table.append_column(GROUP_COLUMN, pa.array(indices)) if self.plan.thinking == "unroll" else table
        rows = encoded.rows()
        return {name: [row[name] for row in rows] for name in encoded.columns()}  # type: ignore[literal-required]

    def _warn_of_text(self, record: dict[str, Any]) -> None:
        """Warn once of a message that spells out a special token, and once of a row whose answer is empty."""
        problem = None if "special_text" in self._has_warned else self._special_text.find(record)
        if problem is not None:
            self._has_warned.add("special_text")
            logger.warning(
                "row %s and perhaps others: %s. It becomes that special token; remove it where it is not meant",
                record["id"],
                problem.detail,
            )
        if "empty_answer" not in self._has_warned and has_empty_answer(record):
            self._has_warned.add("empty_answer")
            logger.warning(
                "row %s and perhaps others: the answer is empty, so that the model is trained to end at once; remove "
                "such rows where that is not meant",
                record["id"],
            )

    def _without_dropped(self, rendered: list[Rendered], indices: list[int]) -> tuple[list[Rendered], list[int]]:
        """Apply `not_printed` to rows that say more than the template prints."""
        lost = [place for place, row in enumerate(rendered) if row.not_printed]
        if not lost:
            return rendered, indices
        if "not_printed" not in self._has_warned:
            self._has_warned.add("not_printed")
            what = "are dropped" if self.plan.not_printed == "drop" else "are trained without it"
            logger.warning("row %s and perhaps others %s: %s", indices[lost[0]], what, rendered[lost[0]].not_printed)
        if self.plan.not_printed == "warn":
            return rendered, indices
        dropped = {indices[place] for place in lost}  # with all rows that its conversation became
        kept = [place for place, row in enumerate(indices) if row not in dropped]
        return [rendered[place] for place in kept], [indices[place] for place in kept]

    def _warn_of_removed(self, rendered: list[Rendered], indices: list[int]) -> None:
        """Warn once that `thinking` removed reasoning."""
        found = next((place for place, row in enumerate(rendered) if row.thinking_removed), None)
        if found is not None and "thinking" not in self._has_warned:
            self._has_warned.add("thinking")
            logger.warning(
                "row %s and perhaps others: thinking=%r removes reasoning, here %r",
                indices[found],
                self.plan.thinking,
                rendered[found].thinking_removed[0][:80],
            )

    def render_rows(self, record: dict[str, Any]) -> list[Rendered]:
        """Render a record as one or several texts; apply the options on special tokens to plain text.

        Raises:
            ValueError: The options ask for special tokens in a conversation, whose chat template writes them.
        """
        return [self._with_special_tokens(rendered) for rendered in self.renderer.render_rows(record)]

    def _with_special_tokens(self, rendered: Rendered) -> Rendered:
        if rendered.append_eos:  # plain text; `rendered.add_special_tokens` is False if it begins with bos
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
        """Return a row of a batch as a record; its id is that of the row, or else the row's number."""
        row = {name: values[place] for name, values in batch.items()}
        name = str(row.get("id") or row_number)
        try:
            if self.plan.layout.kind is Kind.TEXT:
                row = {"text": row[self.plan.text_field]}
                return {**normalize(row, Layout(Kind.TEXT, ("text",))), "id": name}
            prune = self._nulls.features is None and self._nulls.are_added
            record = normalize(self._nulls.clean(row), self.plan.layout, prune_nulls=prune)
            check_text_alone(record)
            return {**record, "id": name}
        except ValueError as error:
            raise ValueError(f"row {name}: {error}") from error


def has_empty_answer(record: Mapping[str, Any]) -> bool:
    """Return whether the completion, or the last message, of a record is an answer without any text or call."""
    answer = record.get("completion", record.get("messages"))
    if not answer or isinstance(answer, str):
        return answer is not None and not answer.strip() if isinstance(answer, str) else False
    last = answer[-1]
    is_blank = isinstance(last["content"], str) and not last["content"].strip()
    return last["role"] == "assistant" and is_blank and not last.get("tool_calls")


def fit_lengths(dataset: Any, max_length: int, config: SFTConfig, *, packing: bool, name: str) -> Any:
    """Truncate or split long rows, drop rows in which nothing is trained, and pack; log what was lost.

    Raises:
        ValueError: No row has a trained token.
    """
    keep_end = config.truncation_mode == "keep_end"
    if isinstance(dataset, IterableDataset):
        if config.overflow not in (None, "truncate"):
            raise ValueError(
                f"overflow={config.overflow!r} looks at all rows, and {name} rows are a stream, whose long documents "
                "can only be truncated; leave it out, or load the data set without streaming"
            )
        divided = packing and config.packing_strategy in ("bfd_split", "wrapped")
        limit = StreamLimit(NO_LIMIT if divided else max_length, name, keep_end=keep_end)
        kept = dataset.map(limit, batched=True, batch_size=config.dataset_batch_size)
        return pack_dataset(kept, max_length, config.packing_strategy) if packing else kept
    groups = None
    if GROUP_COLUMN in dataset.column_names:
        groups = np.array(dataset[GROUP_COLUMN], dtype=np.int64)
        dataset = dataset.remove_columns(GROUP_COLUMN)
    if packing:
        fitted, report = limit_and_pack(
            dataset,
            max_length,
            config.packing_strategy,
            keep_end=keep_end,
            groups=groups,
            overflow=config.overflow,
        )
    else:
        fitted, report = apply_overflow(dataset, max_length, config.overflow or "truncate", keep_end=keep_end)
    if report.summary():
        logger.warning("%s data: %s", name, report.summary())
    if not report.source_rows:
        raise ValueError(nothing_trained(name, f"the {len(dataset)}", max_length))
    return fitted
