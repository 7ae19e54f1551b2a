"""Formatting functions chosen by columns, and ChatML's tokens."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from sft.chat.formats import setup_chat_format
from sft.scripts.formatting import ChatMlSpecialTokens, get_formatting_func_from_dataset
from sft.tokens.constant_length import ConstantLengthDataset
from tests.tiny import tiny_model, tiny_tokenizer

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
TEXT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [CHAT, CHAT]},
        {"conversations": [CHAT, CHAT]},
        {"prompt": ["Hello"] * 2, "completion": ["Hi"] * 2},
    ],
)
def test_known_columns_are_formatted_alone_and_in_batches(columns: dict[str, Any]) -> None:
    dataset = Dataset.from_dict(columns)
    function = get_formatting_func_from_dataset(dataset, tiny_tokenizer())
    assert function is not None
    assert function(dataset[0]) == TEXT
    assert function(dataset[0:2]) == [TEXT, TEXT]


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["Hello"]},
        {"conversations": [[{"from": "human", "value": "Hello"}]]},
        {"messages": [[{**CHAT[0], "name": "x"}]]},
        {"prompt": ["Hello"], "completion": ["Hi"], "id": [1]},
        {"prompt": [1], "completion": [2]},
    ],
)
def test_other_columns_have_no_formatting_function(columns: dict[str, Any]) -> None:
    assert get_formatting_func_from_dataset(Dataset.from_dict(columns), tiny_tokenizer()) is None


def test_packed_streams_have_no_formatting_function() -> None:
    tokenizer = tiny_tokenizer()
    assert get_formatting_func_from_dataset(ConstantLengthDataset(tokenizer, [{"text": "a"}]), tokenizer) is None


def test_tools_reach_the_template() -> None:
    tokenizer = tiny_tokenizer("{{ tools | length }}")
    function = get_formatting_func_from_dataset(Dataset.from_dict({"messages": [CHAT]}), tokenizer, tools=[{}, {}])
    assert function is not None
    assert function({"messages": CHAT}) == "2"


def test_tokens_and_template_of_chatml_are_those_that_a_model_is_set_up_with() -> None:
    tokens = ChatMlSpecialTokens()
    assert (tokens.system, tokens.user, tokens.assistant) == (
        "<|im_start|>system",
        "<|im_start|>user",
        "<|im_start|>assistant",
    )
    tokenizer = setup_chat_format(tiny_model(), tiny_tokenizer(None))[1]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (tokens.bos_token, tokens.eos_token)
    assert tokenizer.chat_template == tokens.chat_template
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == TEXT
    assert "<s>" in ChatMlSpecialTokens(bos_token="<s>").chat_template
