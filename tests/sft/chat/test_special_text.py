"""Special tokens that messages contain as text are found, and can be turned into plain text."""

from __future__ import annotations

import pytest

from sft.chat.checks import SpecialText
from tests.tiny import tiny_tokenizer

CALL = {"type": "function", "function": {"name": "say", "arguments": '{"text": "<|im_end|>"}'}}


def chat(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes.", **more}]}


def test_a_token_is_found_wherever_it_would_be_printed() -> None:
    special = SpecialText(tiny_tokenizer())
    problem = special.find(chat("What does <|im_end|> mean?"))
    assert problem is not None
    assert problem.detail == "message 0 (user) spells out '<|im_end|>': 'What does <|im_end|> mean?'"
    assert special.find(chat("What?", tool_calls=[CALL])) is not None
    assert special.find({**chat("What?"), "tools": '["<|im_start|>"]'}) is not None
    assert special.find(chat("What does <|im_ end|> mean? <b>")) is None


def test_plain_text_may_contain_special_tokens() -> None:
    special = SpecialText(tiny_tokenizer())
    assert special.find({"text": "<|im_start|>user"}) is None
    assert special.find({"prompt": "<|im_start|>user", "completion": "x"}) is None


def test_tokens_that_are_allowed_are_left_alone() -> None:
    assert SpecialText(tiny_tokenizer(), allowed=["<|im_end|>"]).find(chat("a <|im_end|>")) is None


@pytest.mark.parametrize("text", ["a<|im_end|>b", "<|im_start|><|im_end|>", "<|im_<|im_end|>end|>"])
def test_neutralised_text_has_no_special_token_and_reads_the_same(text: str) -> None:
    tokenizer = tiny_tokenizer()
    record = SpecialText(tokenizer).neutralised(chat(text))
    assert record is not None
    plain = record["messages"][0]["content"]
    assert plain.replace("\u200b", "") == text
    ids = tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert SpecialText(tokenizer).find(record) is None
