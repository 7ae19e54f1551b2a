"""Reasoning is kept, removed, or trained answer by answer, in templates that print it as known families do."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft.chat.render import ChatRenderer, Rendered, TrainOn
from sft.chat.template import ChatTemplate
from sft.chat.thinking import TemplateThinking, split_reasoning
from sft.chat.thinking_variable import set_thinking_variable
from sft.options import ThinkingPolicy
from sft.tokens.encoding import Encoder
from tests.sft.chat.reasoning_templates import (
    DEEPSEEK_R1,
    FAMILIES,
    HARMONY,
    KIMI,
    QWEN3,
    QWEN35,
    SPECIAL_TOKENS,
    Family,
)
from tests.tiny import CHATML, tiny_tokenizer

ID = "functions.weather:0"
CALL = {"id": ID, "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Lima"})}}


@functools.lru_cache
def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def field(reasoning: str, answer: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": answer, "reasoning_content": reasoning, **keys}


def inline(reasoning: str, answer: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n{answer}", **keys}


def parts(reasoning: str, answer: str, **keys: Any) -> dict[str, Any]:
    thinking = {"type": "thinking", "thinking": reasoning}
    return {"role": "assistant", "content": [thinking, {"type": "text", "text": answer}], **keys}


def chat(said: Any = field) -> list[dict[str, Any]]:
    return [
        user("What is 2+2?"), said("Two and two.", "Four."), user("And 3+3?"), said("Three twice.", "Six."),
        user("Thanks"), said("They are polite.", "You are welcome!"),
    ]  # fmt: skip


def chat_with_call() -> list[dict[str, Any]]:
    asks = field("I must look.", "", tool_calls=[CALL])
    result = {"role": "tool", "content": "rain", "tool_call_id": ID}
    return [*chat()[:2], user("Rain in Lima?"), asks, result, field("It says rain.", "It rains.")]


def rows(messages: list[dict[str, Any]], template: str, thinking: ThinkingPolicy, **options: Any) -> list[Rendered]:
    return ChatRenderer(tokenizer_for(template), thinking=thinking, **options).render_rows({"messages": messages})


def trained(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end, _ in rendered.spans]


def generated(family: Family, message: dict[str, Any]) -> str:
    form = family.call if message.get("tool_calls") else family.answer
    return form.format(r=message["reasoning_content"], a=message["content"], i=ID)


def prompts_and_answers(messages: list[dict[str, Any]], family: Family, said: Any) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt as a server makes them, and those that the model has to generate."""
    tokenizer = tokenizer_for(family.template)
    pairs = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = [
            said(m["reasoning_content"], m["content"], **{k: v for k, v in m.items() if k == "tool_calls"})
            if m["role"] == "assistant"
            else m
            for m in messages[:index]
        ]
        parsed = [
            {**m, "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Lima"}}}]}
            if m.get("tool_calls")
            else m
            for m in before
        ]
        prompt = tokenizer.apply_chat_template(parsed, tokenize=False, add_generation_prompt=True)
        texts = prompt, generated(family, message)
        first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        pairs.append((first, second))
    return pairs


def thinking_field(reasoning: str, answer: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": answer, "thinking": reasoning, **keys}


def tagged(reasoning: str, answer: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n{answer}", **keys}


# The form of reasoning that each family's template reads, in which a server gets the history.
READ = {"gpt-oss": thinking_field, "magistral": parts, "smollm3": tagged}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("with_call", [False, True])
def test_unrolled_rows_are_what_generation_sees_and_must_produce_token_by_token(name: str, with_call: bool) -> None:
    family = FAMILIES[name]
    if with_call and not family.call:
        pytest.skip("the family does not reason before calls")
    messages = chat_with_call() if with_call else chat()
    made = rows(messages, family.template, "unroll")
    encoded = Encoder(tokenizer_for(family.template)).encode(made)
    expected = prompts_and_answers(messages, family, READ.get(name, field))
    assert [row["input_ids"] for row in encoded] == [prompt + answer for prompt, answer in expected]
    assert [row["labels"] for row in encoded] == [[-100] * len(prompt) + answer for prompt, answer in expected]
    assert [row.turn for row in made] == [index for index, m in enumerate(messages) if m["role"] == "assistant"]


@pytest.mark.parametrize("said", [field, inline, parts, thinking_field])
@pytest.mark.parametrize("name", FAMILIES)
def test_reasoning_is_read_in_any_form(name: str, said: Any) -> None:
    family = FAMILIES[name]
    made = rows(chat(said), family.template, "unroll")
    if name == "smollm3" and said is inline:  # printed as it is
        family = family._replace(answer=family.answer.replace("</think>\n", "</think>\n\n"))
    assert [trained(row) for row in made] == [[generated(family, m)] for m in chat() if m["role"] == "assistant"]


@pytest.mark.parametrize("name", FAMILIES)
def test_last_trains_only_what_the_template_leaves(name: str) -> None:
    family = FAMILIES[name]
    (row,) = rows(chat(), family.template, "last")
    answers = [generated(family, message) for message in chat() if message["role"] == "assistant"]
    assert trained(row) == (answers if family.history else answers[-1:])
    assert row.thinking_removed == (() if family.history else ("Two and two.", "Three twice."))


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_trains_all_or_names_the_way_out(name: str) -> None:
    family = FAMILIES[name]
    (single,) = rows(chat()[:2], family.template, "keep")
    assert trained(single) == [generated(family, chat()[1])]
    if family.history:
        (row,) = rows(chat(), family.template, "keep")
        assert trained(row) == [generated(family, message) for message in chat() if message["role"] == "assistant"]
        return
    with pytest.raises(ValueError, match=r"message 1 .*'Two and two\.'.*state thinking: unroll .* or last"):
        rows(chat(), family.template, "keep")


def test_keep_sets_the_variable_that_keeps_reasoning_if_a_chat_needs_it() -> None:
    tokenizer = tiny_tokenizer(QWEN35.template)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    with pytest.raises(ValueError, match=r'set chat_template_kwargs to \{"preserve_thinking": true\}'):
        ChatRenderer(tokenizer).render({"messages": chat()})
    assert set_thinking_variable(tokenizer, "keep", [chat()[:2]]) == {}
    assert set_thinking_variable(tokenizer, "keep", [chat()[:2], chat()]) == {"preserve_thinking": True}
    rendered = ChatRenderer(tokenizer).render({"messages": chat()})
    assert trained(rendered) == [generated(QWEN35, message) for message in chat() if message["role"] == "assistant"]
    prompt = tokenizer.apply_chat_template(chat()[:5], tokenize=False, add_generation_prompt=True)
    assert rendered.text.startswith(prompt)


@pytest.mark.parametrize(
    ("name", "variable", "expected"),
    [
        ("qwen3", {"enable_thinking": False}, ["Four.<|im_end|>", "Six.<|im_end|>", "You are welcome!<|im_end|>"]),
        ("qwen3.5", {"enable_thinking": False}, ["Four.<|im_end|>", "Six.<|im_end|>", "You are welcome!<|im_end|>"]),
        ("smollm3", {"enable_thinking": False}, ["Four.<|im_end|>", "Six.<|im_end|>", "You are welcome!<|im_end|>"]),
        ("glm-4.5", {"enable_thinking": False}, ["\nFour.<|user|>", "\nSix.<|user|>", "\nYou are welcome!<|user|>"]),
        ("magistral", {}, ["Four.<|im_end|>", "Six.<|im_end|>", "You are welcome!<|im_end|>"]),
        (
            "kimi",
            {},
            [f"<think></think>{text}<|im_end|>" for text in ("Four.", "Six.", "You are welcome!")],
        ),
        (
            "gpt-oss",
            {},
            [
                "<|channel|>final<|message|>Four.<|end|>",
                "<|channel|>final<|message|>Six.<|end|>",
                "<|channel|>final<|message|>You are welcome!<|return|>",
            ],
        ),
    ],
)
@pytest.mark.parametrize("said", [field, inline])
def test_drop_removes_all_reasoning_and_turns_it_off(
    name: str, variable: dict[str, bool], expected: list[str], said: Any
) -> None:
    tokenizer = tiny_tokenizer(FAMILIES[name].template)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    assert set_thinking_variable(tokenizer, "drop", []) == variable
    row = ChatRenderer(tokenizer, thinking="drop").render({"messages": chat(said)})
    assert trained(row) == expected
    assert row.thinking_removed == ("Two and two.", "Three twice.", "They are polite.")
    plain = [{"role": message["role"], "content": message["content"]} for message in chat()[:5]]
    prompt = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert row.text.startswith(prompt + expected[-1])


def test_drop_closes_the_block_that_a_prompt_always_opens() -> None:
    (row,) = rows(chat()[:2], DEEPSEEK_R1.template, "drop")
    assert trained(row) == ["\n</think>\n\nFour.<|im_end|>"]
    with pytest.raises(ValueError, match="message 1 does not begin where generation begins"):
        rows(chat(), DEEPSEEK_R1.template, "drop")


def test_a_variable_against_drop_is_an_error() -> None:
    tokenizer = tiny_tokenizer(QWEN3.template)
    with pytest.raises(ValueError, match=r"drop needs enable_thinking=false .* sets it to true; remove it there"):
        set_thinking_variable(tokenizer, "drop", [], {"enable_thinking": True})


def test_reasoning_before_a_call_goes_with_the_answer_that_ends_it() -> None:
    (row,) = rows(chat_with_call(), HARMONY.template, "last")
    assert trained(row) == [generated(HARMONY, chat_with_call()[-1])]
    assert row.thinking_removed == ("Two and two.", "I must look.")
    (row,) = rows(chat_with_call(), QWEN3.template, "last")
    assert trained(row) == [generated(QWEN3, message) for message in chat_with_call()[3::2]]
    assert row.thinking_removed == ("Two and two.",)


def test_flags_and_train_on_choose_the_unrolled_rows() -> None:
    messages = chat()
    messages[1] = {**messages[1], "train": False}
    messages[3] = {**messages[3], "weight": 0.5}
    first, second = rows(messages, QWEN3.template, "unroll")
    assert (first.spans[0].weight, second.spans[0].weight) == (0.5, 1.0)
    assert first.thinking_removed == ("Two and two.",)
    assert [row.turn for row in rows(messages, QWEN3.template, "unroll", train_on=TrainOn.LAST_ASSISTANT)] == [5]
    record = {"prompt": chat()[:3], "completion": chat()[3:]}
    renderer = ChatRenderer(tokenizer_for(QWEN3.template), TrainOn.COMPLETION, thinking="unroll")
    assert [row.turn for row in renderer.render_rows(record)] == [3, 5]
    with pytest.raises(ValueError, match="train_on all trains the prompts, too"):
        rows(chat(), QWEN3.template, "unroll", train_on=TrainOn.ALL)


def test_a_chat_without_reasoning_unrolls_to_the_same_answers() -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "Hello."}] * 2
    assert [trained(row) for row in rows(messages, CHATML, "unroll")] == [["Hello.<|im_end|>"]] * 2
    assert [trained(row) for row in rows(messages, CHATML, "last")] == [["Hello.<|im_end|>"] * 2]


def test_the_prompt_of_the_last_turn_is_that_of_a_server() -> None:
    for thinking in ("last", "unroll"):
        renderer = ChatRenderer(tokenizer_for(HARMONY.template), thinking=thinking)  # type: ignore[arg-type]
        last = renderer.last_turn({"messages": chat_with_call()})
        assert last is not None
        assert "<|channel|>analysis<|message|>I must look.<|end|>" in last.prompt
        assert last.prompt.endswith("rain<|end|><|start|>assistant")


def test_reasoning_that_no_template_prints_at_the_end_is_still_refused() -> None:
    for thinking in ("keep", "last", "unroll"):
        with pytest.raises(ValueError, match=r"says 'They are polite\.'|says 'Two and two\.'"):
            rows(chat(), CHATML, thinking)  # type: ignore[arg-type]
    assert rows(chat(), CHATML, "drop")[0].thinking_removed == ("Two and two.", "Three twice.", "They are polite.")


def test_variables_of_a_row_select_its_form() -> None:
    renderer = ChatRenderer(tokenizer_for(HARMONY.template))
    low = {"messages": chat()[:2], "chat_template_kwargs": '{"reasoning_effort": "low"}'}
    assert "Reasoning: low<|end|>" in renderer.render(low).text
    plain = {"messages": [user("Hi"), {"role": "assistant", "content": "Hello."}]}
    for name in ("qwen3", "qwen3.5", "smollm3", "glm-4.5"):
        renderer = ChatRenderer(tokenizer_for(FAMILIES[name].template))
        off = renderer.render({**plain, "chat_template_kwargs": '{"enable_thinking": false}'})
        assert trained(off) == ["\nHello.<|user|>" if name == "glm-4.5" else "Hello.<|im_end|>"]


@pytest.mark.parametrize(
    ("content", "reasoning", "rest"),
    [
        ("<think>\na\n</think>\n\nb", "a", "b"),
        ("a\n</think>\n\nb", "a", "b"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("<think></think>b", "", "b"),
        ("The tag <think> opens it, </think> closes it.", "", "The tag <think> opens it, </think> closes it."),
        ("<think>a</think>b\n<think>c</think>d", "a\n\nc", "b\nd"),
    ],
)
def test_reasoning_is_told_from_the_answer(content: str, reasoning: str, rest: str) -> None:
    split = split_reasoning({"role": "assistant", "content": content})
    assert (split.reasoning, split.rest["content"]) == (reasoning, rest)


def test_an_open_block_cannot_be_dropped() -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "<think>\nwell, I"}]
    with pytest.raises(
        ValueError, match=r"message 1: .*opens a block of reasoning and does not close it.*fix the data"
    ):
        rows(messages, QWEN3.template, "drop")


def test_generation_marks_move_with_the_reasoning() -> None:
    marked = KIMI.template.replace("<think>{{ ''", "{% generation %}<think>{{ ''").replace(
        "{% elif m.role == 'tool' %}##", "{% endgeneration %}{% elif m.role == 'tool' %}##"
    )
    (row,) = rows(chat()[:2], marked, "keep")
    assert trained(row) == ["<think>Two and two.</think>Four."]


def test_a_template_is_asked_what_it_prints() -> None:
    how = TemplateThinking(ChatTemplate(QWEN35.template, {}))
    assert (how.keeping_variable(), how.silencing_variable()) == (
        {"preserve_thinking": True},
        {"enable_thinking": False},
    )
    assert how.block is None
    block = TemplateThinking(ChatTemplate(DEEPSEEK_R1.template, {"bos_token": ""})).block
    assert block is not None
    assert tuple(block) == ("<think>\n", "\n</think>\n\n")
