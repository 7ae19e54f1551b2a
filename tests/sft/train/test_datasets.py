"""Rows of every known form become the right token ids and labels."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import processors

from sft.config import SFTConfig
from sft.tokens.constant_length import ConstantLengthDataset, constant_length_rows
from sft.tokens.pretokenized import labels_of_tokens, warn_of_double_bos
from sft.train.datasets import chats_of, prepare_dataset, prepare_rows, resolve_max_length
from tests.sft.template_styles import QWEN3
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def with_bos() -> Any:
    tokenizer = tiny_tokenizer(bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def prepare(rows: Any, tokenizer: Any = TOKENIZER, *, packing: bool = False, func: Any = None, **options: Any) -> Any:
    config = SFTConfig(output_dir="out", use_cpu=True, **options)
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare_dataset(dataset, tokenizer, config, packing=packing, formatting_func=func)


def texts(rows: Any, tokenizer: Any = TOKENIZER) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in rows]


def trained(rows: Any, tokenizer: Any = TOKENIZER) -> list[str]:
    return [tokenizer.decode([label for label in row["labels"] if label >= 0]) for row in rows]


# shapes of rows


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "Hello"}, {}, "Hello<|im_end|>"),
        ({"body": "Hello", "text": "no"}, {"dataset_text_field": "body"}, "Hello<|im_end|>"),
        ({"messages": CHAT}, {"assistant_only_loss": True}, "1<|im_end|>2<|im_end|>"),
        ({"messages": CHAT}, {"last_turn_only_loss": True}, "2<|im_end|>"),
        ({"prompt": "One?", "completion": " 1"}, {}, " 1<|im_end|>"),
        ({"prompt": "One?", "completion": " 1"}, {"completion_only_loss": False}, "One? 1<|im_end|>"),
        ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {}, "2<|im_end|>\n"),
        ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {"assistant_only_loss": True}, "2<|im_end|>"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, {"assistant_only_loss": True}, "2<|im_end|>"),
        (
            {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]},
            {"assistant_only_loss": True},
            "1<|im_end|>",
        ),
    ],
)
def test_what_is_trained_of_each_kind_of_row(row: dict[str, Any], options: dict[str, Any], expected: str) -> None:
    assert trained(prepare([row], **options)) == [expected]
    stream = Dataset.from_list([row]).to_iterable_dataset()
    assert trained(prepare(stream, **options)) == [expected]


def test_text_column_is_used_instead_of_question_and_answer_unless_only_answers_are_trained() -> None:
    row = {"instruction": "One?", "input": "", "output": "1", "text": "Q One? A 1"}
    assert texts(prepare([row])) == ["Q One? A 1<|im_end|>"]
    assert trained(prepare([row], assistant_only_loss=True)) == ["1<|im_end|>"]


def test_conversations_may_be_named_as_the_text_field() -> None:
    assert texts(prepare([{"messages": CHAT[:1]}], dataset_text_field="messages"))[0].startswith("<|im_start|>user")


def test_missing_text_field_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"dataset_text_field='body' is not a column of the data, which has \['text'\]"
    ):
        prepare([{"text": "a"}], dataset_text_field="body")


def test_prompt_and_completion_as_messages_show_the_whole_chat() -> None:
    rows = prepare([{"prompt": CHAT[:3], "completion": CHAT[3:]}])
    assert texts(rows) == [TOKENIZER.apply_chat_template(CHAT, tokenize=False)]


def test_flags_and_weights_of_messages() -> None:
    chat = [CHAT[0], {**CHAT[1], "train": False}, CHAT[2], {**CHAT[3], "weight": 0.5}]
    rows = prepare(
        [{"messages": [{"train": None, "weight": None, **message} for message in chat]}] * 2, assistant_only_loss=True
    )
    assert trained(rows) == ["2<|im_end|>"] * 2
    assert sorted(set(rows[0]["loss_weights"])) == [0.0, 0.5]


WEIGHTED = [[CHAT[0], CHAT[1]], [CHAT[2], {**CHAT[3], "weight": 0.5}]]


@pytest.mark.parametrize(
    "rows",
    [
        Dataset.from_list([{"messages": chat} for chat in WEIGHTED]),
        Dataset.from_list([{"messages": json.dumps(chat)} for chat in WEIGHTED]),
        Dataset.from_list(
            [{"messages": WEIGHTED[1]}, {"messages": [{"role": "user", "content": [{"type": "text"}]}, *WEIGHTED[1]]}],
            on_mixed_types="use_json",
        ),
        IterableDataset.from_generator(lambda: ({"messages": chat} for chat in WEIGHTED)),
    ],
    ids=["columns", "text", "json", "stream"],
)
def test_weights_are_found_whatever_the_schema_says_of_them(rows: Any) -> None:
    weights = {weight for row in prepare(rows, assistant_only_loss=True) for weight in row["loss_weights"]}
    assert 0.5 in weights


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_are_a_list_or_json(as_json: bool) -> None:
    template = (
        "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
    )
    tools = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
    row = {"messages": CHAT, "tools": json.dumps(tools) if as_json else tools}
    if not as_json:
        tools[0]["function"].pop("parameters")
    assert texts(prepare([row], tiny_tokenizer(template)))[0].startswith("weather <|im_start|>user")


def test_tokenized_rows_stay_as_they_are() -> None:
    given = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
    ]
    assert list(prepare(given)) == given


@pytest.mark.parametrize(
    ("columns", "options", "labels"),
    [
        ({}, {}, [5, 6, 7]),
        ({"completion_mask": [0, 1, 1]}, {}, [-100, 6, 7]),
        ({"completion_mask": [0, 1, 1]}, {"completion_only_loss": False}, [5, 6, 7]),
        ({"assistant_masks": [0, 0, 1]}, {"assistant_only_loss": True}, [-100, -100, 7]),
        ({"completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]}, {}, [-100, -100, 7]),
        ({"labels": [-100, 6, 7], "assistant_masks": [1, 1, 0]}, {}, [-100, 6, -100]),
    ],
)
def test_masks_of_tokenized_rows(columns: dict[str, Any], options: dict[str, Any], labels: list[int]) -> None:
    assert prepare([{"input_ids": [5, 6, 7], **columns}], **options)[0]["labels"] == labels


@pytest.mark.parametrize("format", ["torch", "numpy"])
@pytest.mark.parametrize("streamed", [False, True])
def test_tokenized_rows_in_another_format_are_the_same_rows(format: str, streamed: bool) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [8, 9]]})
    formatted: Any = rows.with_format(format)
    prepared = prepare(formatted.to_iterable_dataset() if streamed else formatted)
    assert list(prepared) == list(rows)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_padding_of_tokenized_rows_is_removed(packing: bool, streamed: bool) -> None:
    batch = TOKENIZER(["Hello", "fox"], padding="max_length", max_length=12)
    rows: Any = Dataset.from_dict(
        {"input_ids": [[3, *batch["input_ids"][0]], [3, *batch["input_ids"][1]]]}
        | {"attention_mask": [[0, *batch["attention_mask"][0]], [0, *batch["attention_mask"][1]]]}
    )
    prepared = prepare(rows.to_iterable_dataset() if streamed else rows, packing=packing)
    assert "".join(texts(prepared)) == "Hellofox"
    assert [row["labels"] for row in prepared] == [row["input_ids"] for row in prepared]


def test_attention_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 0: attention_mask has 3 values for 2 input_ids"):
        prepare(Dataset.from_dict({"input_ids": [[5, 6]], "attention_mask": [[1, 1, 0]]}))


def test_kind_is_decided_for_the_whole_set_and_a_row_that_does_not_fit_is_named() -> None:
    rows = [{"messages": CHAT, "text": None}, {"messages": None, "text": "Hello"}]
    with pytest.raises(ValueError, match=r"row 1: no value in \['messages'\]"):
        prepare(rows)
    with pytest.raises(ValueError, match=r"row 1: columns of one row differ in length"):
        labels_of_tokens({"input_ids": [[1, 2], [1, 2]], "labels": [[1, 2], [1]]}, [0, 1])


@pytest.mark.parametrize(
    ("row", "options", "complaint"),
    [
        ({"text": "a"}, {"assistant_only_loss": True}, "assistant_only_loss=True, but plain text"),
        ({"text": "a"}, {"completion_only_loss": True}, "completion_only_loss=True, but plain text"),
        ({"messages": CHAT}, {"completion_only_loss": True}, "use assistant_only_loss=True"),
        ({"input_ids": [1, 2]}, {"completion_only_loss": True}, "needs a column completion_mask"),
        ({"input_ids": [1, 2]}, {"assistant_only_loss": True}, "needs a column assistant_masks"),
        ({"input_ids": [1, 2]}, {"last_turn_only_loss": True}, "needs a column labels"),
        ({"words": "a"}, {}, "Rename the columns"),
    ],
)
def test_options_that_the_data_cannot_follow_are_refused(
    row: dict[str, Any], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare([row], **options)


# formatting functions


def single(example: dict[str, Any]) -> str:
    return f"Q {example['q']}"


def batched(batch: dict[str, Any]) -> list[str]:
    return [f"Q {batch['q'][place]}" for place in range(len(batch["q"]))]


def twofold(batch: dict[str, Any]) -> list[str]:
    return [f"{kind} {text}" for text in batch["q"] for kind in ("Q", "A")]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("function", [single, batched])
def test_formatting_function_of_either_form(function: Any, streamed: bool) -> None:
    rows: Any = Dataset.from_dict({"q": ["one", "two"]})
    prepared = prepare(rows.to_iterable_dataset() if streamed else rows, func=function)
    assert texts(prepared) == ["Q one<|im_end|>", "Q two<|im_end|>"]


def test_batched_formatting_function_may_make_several_texts_of_an_example() -> None:
    assert len(prepare([{"q": "one"}, {"q": "two"}], func=twofold)) == 4


def test_formatting_function_that_loses_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="returned 1 texts for a batch of 2 examples"):
        prepare([{"q": "one"}, {"q": "two"}], func=lambda batch: ["all"])
    with pytest.raises(ValueError, match="it returned int"):
        prepare([{"q": "one"}], func=lambda example: 3)


# special tokens


def test_a_text_gets_bos_once() -> None:
    rows = prepare([{"text": "Hello"}, {"text": "<|endoftext|>Hello"}], with_bos())
    assert texts(rows) == ["<|endoftext|>Hello<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"add_special_tokens": False}, "Hello<|im_end|>"),
        ({"append_concat_token": False}, "<|endoftext|>Hello"),
        ({"add_special_tokens": True, "append_concat_token": True}, "<|endoftext|>Hello<|im_end|>"),
    ],
)
def test_special_tokens_of_plain_text_are_an_option(kwargs: dict[str, bool], expected: str) -> None:
    assert texts(prepare([{"text": "Hello"}], with_bos(), dataset_kwargs=kwargs)) == [expected]


def test_special_tokens_of_a_chat_are_the_templates() -> None:
    off = {"add_special_tokens": False, "append_concat_token": False}
    assert texts(prepare([{"messages": CHAT}], dataset_kwargs=off)) == texts(prepare([{"messages": CHAT}]))
    for key in off:
        with pytest.raises(ValueError, match="the chat template prints a conversation's special tokens itself"):
            prepare([{"messages": CHAT}], dataset_kwargs={key: True})


def test_tokenized_rows_with_two_bos_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    bos = TOKENIZER.bos_token_id
    with caplog.at_level(logging.WARNING):
        prepare([{"input_ids": [5, 6]}, {"input_ids": [bos, bos, 7]}])
    assert "1 rows begin with the beginning-of-sequence token" in caplog.text
    assert "first: row 1" in caplog.text
    assert warn_of_double_bos([[bos, 5]], bos, "train") == 0


# lengths


def test_default_length_is_1024_or_the_tokenizers_limit() -> None:
    config = SFTConfig(output_dir="out", use_cpu=True)
    assert resolve_max_length(config, tiny_tokenizer(model_max_length=10**30)) == 1024
    assert resolve_max_length(config, tiny_tokenizer(model_max_length=300)) == 300


def answers(*lengths: int) -> list[dict[str, str]]:
    return [{"prompt": "a" * length, "completion": "b"} for length in lengths]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_whose_completion_was_truncated_are_counted_and_dropped(
    caplog: pytest.LogCaptureFixture, streamed: bool, packing: bool
) -> None:
    rows: Any = Dataset.from_list(answers(2, 50, 3))
    with caplog.at_level(logging.WARNING):
        prepared = list(prepare(rows.to_iterable_dataset() if streamed else rows, max_length=8, packing=packing))
    assert "".join(trained(prepared)).count("b<|im_end|>") == 2
    assert "limit of 8 tokens: " in caplog.text
    assert ("1 dropped without trained tokens" if streamed else "1 masked") in caplog.text


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "in_order", "wrapped"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_long_document_is_cut_by_bfd_and_in_order_and_divided_by_the_other_strategies(
    streamed: bool, strategy: str
) -> None:
    rows = Dataset.from_dict({"input_ids": [list(range(5, 25)), [30, 31]]})
    options = {"max_length": 8, "packing": True, "packing_strategy": strategy}
    prepared = list(prepare(rows.to_iterable_dataset() if streamed else rows, **options))
    kept = range(5, 13) if strategy in ("bfd", "in_order") else range(5, 25)
    assert sorted(token for row in prepared for token in row["input_ids"]) == [*kept, 30, 31]


@pytest.mark.parametrize("packing", [False, True])
def test_a_long_answer_is_divided_with_its_prompt(packing: bool) -> None:
    rows = [{"prompt": "One?", "completion": " fox" * 20}]
    options = {"max_length": 16, "packing": packing, "overflow": "split_with_prompt"}
    prepared = list(prepare(rows, **options))
    whole = prepare(rows)[0]
    prompt = [token for token, label in zip(whole["input_ids"], whole["labels"], strict=True) if label < 0]
    assert len(prepared) > 1
    assert [row["input_ids"][: len(prompt)] for row in prepared] == [prompt] * len(prepared)
    num_trained = sum(label >= 0 for row in prepared for label in row["labels"])
    assert num_trained == sum(label >= 0 for label in whole["labels"]) - (len(prepared) - 1)
    with pytest.raises(ValueError, match="overflow='split_with_prompt' looks at all rows, and train rows are a stream"):
        prepare(Dataset.from_list(rows).to_iterable_dataset(), **options)


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_left_to_train_is_an_error(streamed: bool) -> None:
    rows: Any = Dataset.from_list(answers(50, 60))
    with pytest.raises(ValueError, match=r"no trainable token in any of the (first )?2 train rows at max_length=8"):
        list(prepare(rows.to_iterable_dataset() if streamed else rows, max_length=8))


def test_truncated_rows_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepare([{"text": "fox " * 3000}])
    assert "limit of 1024 tokens: 1 truncated" in caplog.text


def test_rows_packed_already_pass() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "seq_lengths": [[1, 1]]})
    assert prepare(rows) is rows


def test_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the train data set has no rows"):
        prepare(Dataset.from_dict({"text": []}))


# the old way to pack


def old_config(**options: Any) -> SFTConfig:
    return SFTConfig(output_dir="out", use_cpu=True, packing=True, num_of_sequences=2, **options)


def test_constant_length_options_pack_a_data_set_or_a_stream() -> None:
    rows = Dataset.from_dict({"text": ["The quick brown fox jumps"] * 8})
    packed = constant_length_rows(rows, TOKENIZER, old_config(chars_per_token=2.0), seq_length=8)
    assert isinstance(packed, Dataset)
    assert {len(row["input_ids"]) for row in packed} == {8}
    assert all(sum(row["seq_lengths"]) == 8 and row["labels"] == row["input_ids"] for row in packed)
    stream = constant_length_rows(rows.to_iterable_dataset(), TOKENIZER, old_config(), seq_length=8)
    assert isinstance(stream, ConstantLengthDataset)
    assert len(list(stream)) == len(packed)
    assert stream.max_buffer_size == 8 * 2 * 3.6


def test_constant_length_options_contradict_masks_and_short_data() -> None:
    rows = Dataset.from_dict({"text": ["Hello"]})
    with pytest.raises(ValueError, match="num_of_sequences pack rows in which every token is trained"):
        constant_length_rows(rows, TOKENIZER, old_config(assistant_only_loss=True), seq_length=8)
    with pytest.raises(ValueError, match="does not fill one row of 500 tokens"):
        constant_length_rows(rows, TOKENIZER, old_config(), seq_length=500)


def test_constant_length_options_without_packing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chars_per_token=3.0 .* would be ignored without packing=True"):
        SFTConfig(output_dir="out", chars_per_token=3.0)


def test_constant_length_text_gets_bos_once() -> None:
    tokenizer = with_bos()
    rows = Dataset.from_dict({"text": ["<|endoftext|>Hello", "Hello"]})
    stream = ConstantLengthDataset(tokenizer, rows, seq_length=4, shuffle=False)
    ids = [token for row in stream for token in row["input_ids"].tolist()]
    assert not any(pair == (0, 0) for pair in pairwise(ids))


def test_prepared_stream_stays_a_stream() -> None:
    assert isinstance(prepare(Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()), IterableDataset)


# length limits, shuffling, transforms


LONG = list(range(10, 20))


def test_max_length_none_is_no_limit_and_the_default_is_lowered_to_the_tokenizers() -> None:
    tokenizer = tiny_tokenizer(model_max_length=8)
    text = [{"text": "a" * 2000}]
    for options, length in (({}, 8), ({"max_length": 1024}, 1024), ({"max_length": None}, 2001)):
        rows = prepare(text, tokenizer, **options)
        assert (options, len(rows[0]["input_ids"])) == (options, length)
    streamed = prepare(Dataset.from_list(text).to_iterable_dataset(), tokenizer, max_length=None)
    assert [len(row["input_ids"]) for row in streamed] == [2001]


def test_packing_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length is None: give the length of a row of the train data set"):
        prepare([{"input_ids": LONG}], packing=True, max_length=None)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_truncation_keeps_the_beginning_or_the_end(packing: bool, streamed: bool) -> None:
    rows = Dataset.from_list([{"input_ids": LONG}, {"input_ids": [5, 6]}])
    for mode, kept in (("keep_start", LONG[:4]), ("keep_end", LONG[-4:])):
        given = rows.to_iterable_dataset() if streamed else rows
        prepared = list(prepare(given, packing=packing, max_length=4, truncation_mode=mode))
        assert [row["input_ids"] for row in prepared] == [kept, [5, 6]]
        assert [row["labels"] for row in prepared] == [kept, [5, 6]]


def test_kept_end_of_a_completion_is_trained_and_rows_left_without_targets_are_dropped() -> None:
    row = {"input_ids": LONG, "completion_mask": [0] * 8 + [1, 1]}
    assert prepare([row], max_length=4, truncation_mode="keep_end")[0]["labels"] == [-100, -100, 18, 19]
    with pytest.raises(ValueError, match="no trainable token in any of the 1 train rows"):
        prepare([row], max_length=4)


def test_shuffling_is_by_seed_for_rows_packed_rows_and_streams() -> None:
    rows = Dataset.from_list([{"input_ids": [number, number]} for number in range(5, 25)])
    given = rows["input_ids"]

    def order(dataset: Any, seed: int = 1, **options: Any) -> list[list[int]]:
        prepared = prepare(dataset, packing=bool(options), shuffle_dataset=True, seed=seed, **options)
        return [row["input_ids"] for row in prepared]

    assert order(rows) != given
    assert sorted(order(rows)) == list(given)
    assert order(rows) == order(rows) != order(rows, seed=2)
    assert sorted(order(rows.to_iterable_dataset())) == list(given) != order(rows.to_iterable_dataset())
    packed = order(rows, max_length=4)
    assert sorted(token for row in packed for token in row[::2]) == list(range(5, 25))
    assert packed != [[*first, *second] for first, second in zip(given[::2], given[1::2], strict=True)]
    already = Dataset.from_list([{"input_ids": [number], "seq_lengths": [1]} for number in range(20)])
    assert [row["input_ids"][0] for row in prepare(already, shuffle_dataset=True)] != list(range(20))


def test_transforms_are_refused_with_a_way_out_and_formats_are_not() -> None:
    rows = Dataset.from_list([{"text": "Hello"}])
    for changed in (rows.with_transform(lambda batch: batch), rows):
        if changed is rows:
            rows.set_transform(lambda batch: batch)
        with pytest.raises(ValueError, match=r"the train data set has a transform.*map\(\).*skip_prepare_dataset"):
            prepare(changed)
    tokens = Dataset.from_list([{"input_ids": [5, 6, 7]}])
    assert prepare(tokens.with_format("torch"))[0]["input_ids"] == [5, 6, 7]


@pytest.mark.parametrize("packing", [{}, {"packing": True, "num_of_sequences": 2, "max_length": 3}])
def test_formatting_func_beside_token_ids_warns_and_keeps_the_ids(
    packing: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def never(example: Any) -> str:
        raise AssertionError("called")

    config = SFTConfig(output_dir="out", use_cpu=True, **packing)
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "text": "x"}] if not packing else [{"input_ids": [5, 6, 7]}])
    prepared = prepare_rows(rows, TOKENIZER, config, packing=bool(packing), formatting_func=never, name="train")
    assert 5 in next(iter(prepared))["input_ids"]
    assert (
        "the train data set has input_ids, which are trained as they are: formatting_func is not called" in caplog.text
    )


# what is said and not trained


THOUGHT = [CHAT[0], {**CHAT[1], "reasoning_content": "count"}]


def test_reasoning_that_the_template_does_not_print_stops_warns_or_drops(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": CHAT[:2]}, {"messages": THOUGHT}]
    with pytest.raises(ValueError, match=r"row 1: message 1 \(assistant\) says 'count' \(reasoning_content\)"):
        prepare(rows, assistant_only_loss=True)
    assert trained(prepare(rows, assistant_only_loss=True, not_printed="warn")) == ["1<|im_end|>"] * 2
    assert "row 1 and perhaps others are trained without it: message 1 (assistant) says 'count'" in caplog.text
    assert trained(prepare(rows, assistant_only_loss=True, not_printed="drop")) == ["1<|im_end|>"]
    assert "1 of 2 rows are dropped by not_printed='drop'" in caplog.text
    with pytest.raises(ValueError, match="drops all rows"):
        prepare(rows[1:], not_printed="drop")
    with pytest.raises(ValueError, match="not_printed='keep': use one of fail, warn, drop"):
        prepare(rows, not_printed="keep")


THOUGHTS = [*THOUGHT, CHAT[0], {**CHAT[1], "reasoning_content": "again"}]
BLOCK = "<think>\n{}\n</think>\n\n1<|im_end|>"


def test_reasoning_is_unrolled_removed_or_dropped(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer(QWEN3.template)
    rows = [{"messages": CHAT[:2]}, {"messages": THOUGHTS}]
    unrolled = prepare(rows, tokenizer, assistant_only_loss=True, thinking="unroll")
    assert trained(unrolled, tokenizer) == [BLOCK.format(""), BLOCK.format("count"), BLOCK.format("again")]
    assert unrolled.column_names == ["input_ids", "labels"]
    packed = prepare(rows, tokenizer, packing=True, assistant_only_loss=True, thinking="unroll", shuffle_dataset=True)
    assert sum(map(len, packed["seq_lengths"])) == 3
    last = prepare(rows, tokenizer, assistant_only_loss=True, thinking="last")
    assert trained(last, tokenizer) == [BLOCK.format(""), BLOCK.format("again")]
    assert "row 1 and perhaps others: thinking='last' removes reasoning, here 'count'" in caplog.text
    dropped = prepare(rows[1:], tokenizer, assistant_only_loss=True, thinking="drop")
    assert trained(dropped, tokenizer) == ["1<|im_end|>" + BLOCK.format("")]
    streamed = prepare(
        IterableDataset.from_generator(lambda: iter(rows)), tokenizer, assistant_only_loss=True, thinking="unroll"
    )
    assert trained(streamed, tokenizer) == trained(unrolled, tokenizer)


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"messages": THOUGHTS}, {"thinking": "unroll"}, "without assistant_only_loss=True the prompts are trained"),
        ({"text": "Hi"}, {"thinking": "last"}, "thinking='last' is about the assistant's messages, and the rows are"),
        ({"messages": THOUGHTS}, {"thinking": "all"}, "thinking='all': use one of keep, last, unroll, drop"),
    ],
)
def test_thinking_without_effect_is_refused(row: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare([row], **options)


def test_chats_are_found_in_all_data_sets() -> None:
    chats = {"a": Dataset.from_list([{"messages": CHAT[:2]}]), "b": Dataset.from_list([{"text": "Hi"}])}
    assert [[message["role"] for message in chat] for chat in chats_of(chats)] == [["user", "assistant"]]
    assert list(chats_of(None)) == []


def test_special_tokens_in_texts_and_empty_answers_are_said(caplog: pytest.LogCaptureFixture) -> None:
    prepare([{"messages": [{"role": "user", "content": "Say <|im_end|>"}, CHAT[1]]}])
    assert "row 0 and perhaps others: message 0 (user) spells out '<|im_end|>'" in caplog.text
    prepare([{"prompt": "One?", "completion": " 1"}, {"prompt": "Two?", "completion": ""}])
    assert "row 1 and perhaps others: the answer is empty" in caplog.text


CALLS_TEMPLATE = tiny_tokenizer().chat_template.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for c in message.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
)


@pytest.mark.parametrize("form", ["table", "stream", "generator", "text"])
def test_nulls_that_a_user_wrote_stay(form: str) -> None:
    arguments = {"city": "Lima", "unit": None}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    row: dict[str, Any] = {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    if form == "text":
        row = {"messages": json.dumps(row["messages"])}
    rows: Any = [row]
    if form == "stream":
        rows = Dataset.from_list(rows).to_iterable_dataset()
    elif form == "generator":
        rows = IterableDataset.from_generator(lambda: iter([row]))
    prepared = prepare(rows, tiny_tokenizer(CALLS_TEMPLATE), assistant_only_loss=True)
    assert '{"city": "Lima", "unit": null}' in trained(prepared)[0]


def test_nulls_that_arrow_added_go() -> None:
    calls = [{"name": "weather", "arguments": {"city": "Lima"}}, {"name": "clock", "arguments": {"zone": "UTC"}}]
    rows = [
        {
            "messages": [
                CHAT[0],
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": f}]},
            ]
        }
        for f in calls
    ]
    prepared = trained(prepare(rows, tiny_tokenizer(CALLS_TEMPLATE), assistant_only_loss=True))
    assert ['"arguments": {"city": "Lima"}' in prepared[0], '"arguments": {"zone": "UTC"}' in prepared[1]] == [
        True,
        True,
    ]


def test_flags_of_other_projects_decide_what_is_trained() -> None:
    messages = [CHAT[0], {**CHAT[1], "loss": False}, CHAT[2], CHAT[3]]
    assert trained(prepare([{"messages": messages}], assistant_only_loss=True)) == ["2<|im_end|>"]
