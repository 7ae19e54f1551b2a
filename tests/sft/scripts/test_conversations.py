"""Functions on examples: which are conversations, and what the template makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from sft.scripts.conversations import (
    apply_chat_template,
    is_conversational,
    is_conversational_from_value,
    maybe_apply_chat_template,
    maybe_convert_to_chatml,
)
from tests.tiny import tiny_tokenizer

ASK = [{"role": "user", "content": "Sky?"}]
BLUE = [{"role": "assistant", "content": "Blue."}]
GREEN = [{"role": "assistant", "content": "Green."}]
PROMPT = "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
THINKING = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"prompt": ASK}, True),
        ({"messages": [*ASK, *BLUE]}, True),
        ({"chosen": BLUE, "rejected": GREEN}, True),
        ({"prompt": "The sky is"}, False),
        ({"text": "The sky is"}, False),
        ({"messages": []}, False),
        ({"messages": [{"from": "user", "value": "Sky?"}]}, False),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, True),
    ],
)
def test_conversations_are_lists_of_messages_with_a_role(example: dict[str, Any], expected: bool) -> None:
    assert is_conversational(example) is expected


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"conversations": [{"from": "user", "value": "Sky?"}]}, True),
        ({"conversations": ASK}, False),
        ({"conversations": "The sky is"}, False),
        ({"messages": [{"from": "user", "value": "Sky?"}]}, False),
    ],
)
def test_turns_with_from_and_value_are_told_apart(example: dict[str, Any], expected: bool) -> None:
    assert is_conversational_from_value(example) is expected


def test_from_and_value_become_role_and_content_in_a_column_messages() -> None:
    example = {"conversations": [{"from": "user", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}], "id": 3}
    assert maybe_convert_to_chatml(example) == {
        "messages": [{"role": "user", "content": "Sky?"}, {"role": "gpt", "content": "Blue."}],
        "id": 3,
    }
    assert "from" in example["conversations"][0]  # the example itself is not changed
    assert maybe_convert_to_chatml({"messages": ASK}) == {"messages": ASK}


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"messages": [*ASK, *BLUE]}, {"text": f"{PROMPT}Blue.<|im_end|>\n"}),
        ({"prompt": ASK}, {"prompt": PROMPT}),
        ({"prompt": [*ASK, {"role": "assistant", "content": "It is"}]}, {"prompt": f"{PROMPT}It is"}),
        ({"prompt": ASK, "completion": BLUE}, {"prompt": PROMPT, "completion": "Blue.<|im_end|>\n"}),
        (
            {"prompt": ASK, "completion": BLUE, "label": True},
            {"prompt": PROMPT, "completion": "Blue.<|im_end|>\n", "label": True},
        ),
        (
            {"prompt": ASK, "chosen": BLUE, "rejected": GREEN},
            {"prompt": PROMPT, "chosen": "Blue.<|im_end|>\n", "rejected": "Green.<|im_end|>\n"},
        ),
        (
            {"chosen": [*ASK, *BLUE], "rejected": [*ASK, *GREEN]},
            {"chosen": f"{PROMPT}Blue.<|im_end|>\n", "rejected": f"{PROMPT}Green.<|im_end|>\n"},
        ),
    ],
)
def test_each_form_of_example_is_rendered(example: dict[str, Any], expected: dict[str, Any]) -> None:
    assert apply_chat_template(example, tiny_tokenizer()) == expected
    assert maybe_apply_chat_template(example, tokenizer=tiny_tokenizer()) == expected


def test_text_is_returned_as_it_is() -> None:
    assert maybe_apply_chat_template({"prompt": "The sky", "completion": " is blue"}, tiny_tokenizer()) == {
        "prompt": "The sky",
        "completion": " is blue",
    }


def test_prompt_is_cut_to_what_it_shares_with_prompt_and_answer() -> None:
    tokenizer = tiny_tokenizer(THINKING)
    assert apply_chat_template({"prompt": ASK, "completion": BLUE}, tokenizer) == {
        "prompt": "<user>Sky?<assistant>",
        "completion": "Blue.",
    }
    assert apply_chat_template({"prompt": ASK}, tokenizer) == {"prompt": "<user>Sky?<assistant><think>"}


def test_tools_and_variables_reach_the_template() -> None:
    tokenizer = tiny_tokenizer("{{ tools | length if tools else 'none' }} {{ mood }} {{ tone }}")
    example = {"messages": ASK, "chat_template_kwargs": '{"mood": "calm"}'}
    assert apply_chat_template(example, tokenizer, tools=[{"name": "f"}], tone="low") == {"text": "1 calm low"}
    assert apply_chat_template(example, tokenizer, tools=[]) == {"text": "none calm "}


def test_examples_that_can_not_be_rendered_say_why() -> None:
    with pytest.raises(KeyError, match=r"Invalid keys in the example: \['completion'\]"):
        apply_chat_template({"completion": BLUE}, tiny_tokenizer())
    with pytest.raises(ValueError, match="Invalid role in the last message: 'system'"):
        apply_chat_template({"prompt": [{"role": "system", "content": "x"}]}, tiny_tokenizer())
    with pytest.raises(ValueError, match="needs a tokenizer"):
        apply_chat_template({"messages": ASK})
