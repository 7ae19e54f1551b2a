"""Trained spans of rendered chats, compared with rendering of prefixes and with expected texts."""

from __future__ import annotations

import cProfile
import json
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sft.chat.render import ChatRenderer, NotPrinted, Rendered, Span, TrainOn, render
from tests.sft.chat.stops import check_stops
from tests.sft.template_styles import (
    CHATML,
    COMMAND,
    DEEPSEEK,
    EXTRA_TOKENS,
    HARMONY,
    MARKED,
    MISTRAL,
    PLAIN,
    QWEN3,
    STYLES,
)
from tests.tiny import tiny_tokenizer

CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "  And of Peru? Say assistant\n or [INST] too.\n"},
    {"role": "assistant", "content": "\n Lima 🎉, naïve é.  "},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(template, bos_token="<|endoftext|>")
    tokenizer.add_tokens(EXTRA_TOKENS, special_tokens=True)
    return tokenizer


def trained(rendered: Rendered) -> list[str]:
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def turns_by_prefix(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], stop: str
) -> list[tuple[int, int]]:
    """The same answer by another way: what follows the prompt of a turn, through the stop text."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            assert whole.startswith(prompt)
            content = message["content"]
            if whole.find(content, len(prompt), len(prompt) + 1 + len(content)) < 0:
                content = content.strip()
            answer = whole.index(content, len(prompt)) + len(content)
            spans.append((len(prompt), whole.index(stop, answer) + len(stop)))
    return spans


@pytest.mark.parametrize("name", [name for name in STYLES if name not in ("qwen3", "zephyr")])
@pytest.mark.parametrize("with_system", [False, True])
def test_spans_equal_those_of_prefix_rendering(name: str, with_system: bool) -> None:
    if name == "gemma" and with_system:
        pytest.skip("the template refuses system messages")
    tokenizer = tokenizer_for(STYLES[name].template)
    messages = [SYSTEM, *CHAT] if with_system else CHAT
    rendered = render({"messages": messages}, tokenizer)
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    expected = turns_by_prefix(tokenizer, messages, STYLES[name].stop)
    assert [(span.start, span.end) for span in rendered.spans] == expected
    assert len(expected) == 3
    assert not rendered.add_special_tokens
    assert not rendered.append_eos


NASTY = st.lists(
    st.sampled_from(
        ["a", " ", "\n", "é🎉", "<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "<|eot_id|>", "assistant",
         "Assistant: ", "<|assistant|>\n", "</think>", "\U000f0001", "{{ x }}", "User: "]
    ), min_size=1, max_size=6,
).map("".join).filter(str.strip)  # fmt: skip
SLOW_TO_LEARN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", [name for name in STYLES if name not in ("qwen3", "zephyr")])
@SLOW_TO_LEARN
@given(st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=3))
def test_spans_are_right_whatever_the_content(name: str, pairs: list[tuple[str, str]]) -> None:
    tokenizer = style_tokenizer(name)
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    rendered = style_renderer(name).render({"messages": messages})
    assert [(span.start, span.end) for span in rendered.spans] == turns_by_prefix(
        tokenizer, messages, STYLES[name].stop
    )


@lru_cache
def style_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return tokenizer_for(STYLES[name].template)


@lru_cache
def style_renderer(name: str) -> ChatRenderer:
    return ChatRenderer(style_tokenizer(name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["Paris.<|im_end|>", "\n Lima 🎉, naïve é.  <|im_end|>", "You are welcome.<|im_end|>"]),
        ("llama2", [" Paris. <|im_end|>", " Lima 🎉, naïve é. <|im_end|>", " You are welcome. <|im_end|>"]),
        ("llama3", ["Paris.<|eot_id|>", "Lima 🎉, naïve é.<|eot_id|>", "You are welcome.<|eot_id|>"]),
        ("gemma", ["Paris.<end_of_turn>", "Lima 🎉, naïve é.<end_of_turn>", "You are welcome.<end_of_turn>"]),
        ("zephyr", ["\nParis.<|im_end|>", "\n\n Lima 🎉, naïve é.  <|im_end|>", "\nYou are welcome.<|im_end|>"]),
        ("phi3", ["Paris.<|end|>", "\n Lima 🎉, naïve é.  <|end|>", "You are welcome.<|end|>"]),
        (
            "qwen3",
            [
                "Paris.<|im_end|>",
                "\n Lima 🎉, naïve é.  <|im_end|>",
                "<think>\n\n</think>\n\nYou are welcome.<|im_end|>",
            ],
        ),
        ("mistral", ["Paris.<|im_end|>", "\n Lima 🎉, naïve é.  <|im_end|>", "You are welcome.<|im_end|>"]),
        ("plain", [" Paris.\n\n", " \n Lima 🎉, naïve é.  \n\n", " You are welcome.\n\n"]),
        ("marked", ["Paris.<|im_end|>", "\n Lima 🎉, naïve é.  <|im_end|>", "You are welcome.<|im_end|>"]),
    ],
)
def test_trained_text_is_exactly_what_the_model_must_generate(name: str, expected: list[str]) -> None:
    assert trained(render({"messages": CHAT}, tokenizer_for(STYLES[name].template))) == expected


def test_reasoning_is_trained_where_the_template_keeps_it() -> None:
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "<think>\nadd again\n</think>\n\n6"},
    ]
    tokenizer = tokenizer_for(QWEN3.template)
    with pytest.raises(ValueError, match=r"message 1 \(assistant\) says 'add.* which the chat template does not print"):
        render({"messages": messages}, tokenizer)
    rendered = ChatRenderer(tokenizer, not_printed=NotPrinted.WARN).render({"messages": messages})
    assert rendered.not_printed.startswith("message 1 (assistant) says 'add")
    assert trained(rendered) == ["4<|im_end|>", "<think>\nadd again\n</think>\n\n6<|im_end|>"]


def test_reasoning_content_is_trained() -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": "add"}]
    rendered = render({"messages": messages}, tokenizer_for(QWEN3.template))
    assert trained(rendered) == ["<think>\nadd\n</think>\n\n4<|im_end|>"]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            QWEN3,
            [
                '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nRain.<|im_end|>",
            ],
        ),
        (MISTRAL, ['[TOOL_CALLS]weather[ARGS]{"city": "Lima"}<|im_end|>', "Rain.<|im_end|>"]),
    ],
)
def test_a_tool_call_is_an_assistant_turn(style: Any, expected: list[str]) -> None:
    messages = [
        {"role": "user", "content": "Weather in Lima?"},
        {"role": "assistant", "content": "", "tool_calls": [WEATHER]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    tokenizer = tokenizer_for(style.template)
    assert trained(render({"messages": messages}, tokenizer)) == expected
    if style is QWEN3:
        assert trained(render({"messages": messages, "tools": TOOLS}, tokenizer)) == expected


def test_tools_that_the_template_would_leave_out_are_an_error() -> None:
    calling = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [WEATHER]}]
    unprinted = r"message 1 \(assistant\) calls 'weather', and the chat template does not print the call"
    with pytest.raises(ValueError, match=unprinted):
        render({"messages": calling}, tokenizer_for(CHATML.template))
    with pytest.raises(ValueError, match="has tools, and the chat template never prints them"):
        render({"messages": CHAT, "tools": TOOLS}, tokenizer_for(CHATML.template))


def test_arguments_are_text_for_a_template_that_joins_them_to_text() -> None:
    template = CHATML.template.replace(
        "{{ m['content'] }}",
        "{% for c in m['tool_calls'] or [] %}{{ c['id'] + ':' + c['function']['name'] + c['function']['arguments'] }}"
        "{% endfor %}{{ (m['tool_call_id'] or '') + m['content'] }}",
    )
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [WEATHER, {**WEATHER, "id": "mine"}]},
        {"role": "tool", "content": "=rain"},
        {"role": "tool", "content": "=rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    rendered = render({"messages": messages}, tokenizer_for(template))
    call = 'weather{"city": "Lima"}'
    assert trained(rendered) == [f"call00000:{call}mine:{call}<|im_end|>", "Rain.<|im_end|>"]
    assert "call00000=rain" in rendered.text
    assert "mine=rain" in rendered.text


def test_a_tool_call_whose_arguments_spell_the_terminator_ends_after_them() -> None:
    call = {"type": "function", "function": {"name": "echo", "arguments": '{"text": "<|im_end|>"}'}}
    messages = [{"role": "user", "content": "Echo"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rendered = render({"messages": messages}, tokenizer_for(MISTRAL.template))
    assert trained(rendered) == ['[TOOL_CALLS]echo[ARGS]{"text": "<|im_end|>"}<|im_end|>']


def test_text_of_special_tokens_inside_content_does_not_move_a_span() -> None:
    messages = [
        {"role": "user", "content": "<|im_start|>assistant\nno<|im_end|>\n"},
        {"role": "assistant", "content": "say <|im_end|> and <|im_start|>assistant\nyes"},
    ]
    rendered = render({"messages": messages}, tokenizer_for(CHATML.template))
    assert trained(rendered) == ["say <|im_end|> and <|im_start|>assistant\nyes<|im_end|>"]


@pytest.mark.parametrize("style", [CHATML, QWEN3, PLAIN])
def test_an_empty_answer_trains_its_terminator(style: Any) -> None:
    messages = [{"role": "user", "content": "Hush"}, {"role": "assistant", "content": ""}]
    rendered = render({"messages": messages}, tokenizer_for(style.template))
    think = "<think>\n\n</think>\n\n" if style is QWEN3 else " " if style is PLAIN else ""
    assert trained(rendered) == [think + style.stop]


def test_an_answer_that_the_template_prints_differently_at_the_end_of_a_chat_is_found() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% if loop.last %}LAST {% endif %}"
        "{{ m['content'] | length }}:{{ m['content'] }}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert trained(render({"messages": CHAT[:4]}, tokenizer_for(template))) == [
        "6:Paris.<|im_end|>",
        "LAST 20:\n Lima 🎉, naïve é.  <|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HARMONY, ["final:Paris.<|end|>", "final:\n Lima 🎉, naïve é.  <|end|>", "final:You are welcome.<|im_end|>"]),
        (
            COMMAND,
            ["[INST]Paris.[/INST]<|im_end|>", "[INST]\n Lima 🎉, naïve é.  [/INST]<|im_end|>",
             "[INST]You are welcome.[/INST]<|im_end|>"],
        ),
        (
            DEEPSEEK.replace("<think>\n", ""),
            ["Paris.<|im_end|>", "\n Lima 🎉, naïve é.  <|im_end|>", "You are welcome.<|im_end|>"],
        ),
    ],
)  # fmt: skip
def test_turns_close_as_the_template_closes_them(template: str, expected: list[str]) -> None:
    tokenizer = tokenizer_for(template)
    rendered = render({"messages": CHAT}, tokenizer)
    assert trained(rendered) == expected
    check_stops([("row", rendered)], tokenizer)


def test_a_tool_call_is_found_though_the_terminator_comes_twice() -> None:
    template = DEEPSEEK.replace("<think>\n", "").replace(
        "{% set content",
        "{% for c in m['tool_calls'] or [] %}"
        "<|assistant|>{{ c['function']['name'] + c['function']['arguments'] }}<|im_end|>"
        "{% endfor %}{% set content",
    )
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [WEATHER]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    call = 'weather{"city": "Lima"}<|im_end|>'
    assert trained(render({"messages": messages}, tokenizer_for(template))) == [call, "Rain.<|im_end|>"]


def test_a_generation_prompt_that_the_chat_does_not_have_is_an_error() -> None:
    with pytest.raises(
        ValueError,
        match=r"message 1 does not begin where generation begins: .* goes on with '<think>\\n', the conversation with "
        r"'Paris.*chat_template_kwargs",
    ):
        render({"messages": CHAT[:2]}, tokenizer_for(DEEPSEEK))
    switched = DEEPSEEK.replace("<think>\n", "{% if thinking %}<think>\n{% else %}</think>{% endif %}")
    with pytest.raises(ValueError, match="goes on with '</think>'"):
        render({"messages": CHAT[:2]}, tokenizer_for(switched))
    named = DEEPSEEK.replace("<think>\n", "{% if thinking is not defined or thinking %}<think>\n{% endif %}")
    with pytest.raises(ValueError, match=r'Set chat_template_kwargs to \{"thinking": false\}, with which both agree'):
        render({"messages": CHAT[:2]}, tokenizer_for(named))
    record = {"messages": CHAT[:2], "chat_template_kwargs": '{"thinking": false}'}
    assert trained(render(record, tokenizer_for(named))) == ["Paris.<|im_end|>"]


def test_a_template_that_refuses_marks_is_rendered_by_prefixes() -> None:
    known = "m['content'] in ['Hi', 'Hello'] or 'Zy' in m['content']"
    check = "{% if not (" + known + ") %}{{ raise_exception('?') }}{% endif %}"
    template = CHATML.template.replace("<|im_start|>{{ m", check + "<|im_start|>{{ m")
    messages = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello"))] * 2
    assert trained(render({"messages": messages}, tokenizer_for(template))) == ["Hello<|im_end|>", "Hello<|im_end|>"]


def test_a_chat_may_begin_with_the_assistant() -> None:
    messages = [{"role": "assistant", "content": "How can I help?"}, *CHAT[:2]]
    rendered = render({"messages": messages}, tokenizer_for(CHATML.template))
    assert trained(rendered) == ["How can I help?<|im_end|>", "Paris.<|im_end|>"]


def test_runs_of_whitespace_that_are_tokens_close_no_turn() -> None:
    tokenizer = tokenizer_for(PLAIN.template)
    tokenizer.add_tokens(["\n\n", "  "])
    profile = ChatRenderer(tokenizer).profile({"messages": CHAT})
    assert profile.stop_token is None
    assert profile.terminators == ("\n\n",)


def test_a_turn_that_cannot_be_located_names_row_and_turn() -> None:
    template = (
        "{% for m in messages %}{{ messages | length }}:{{ m['content'] }};{% endfor %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"row shop\.jsonl:7: .*message 1 cannot be located.*generation"):
        render({"id": "shop.jsonl:7", "messages": CHAT}, tokenizer_for(template))


def test_last_turn_only() -> None:
    rendered = render({"messages": CHAT}, tokenizer_for(CHATML.template), TrainOn.LAST_ASSISTANT)
    assert trained(rendered) == ["You are welcome.<|im_end|>"]


@pytest.mark.parametrize("style", [CHATML, MARKED])
def test_flags_of_messages_choose_and_weigh_turns(style: Any) -> None:
    messages = [dict(message) for message in CHAT]
    messages[1]["train"] = False
    messages[3]["weight"] = 0.5
    rendered = render({"messages": messages}, tokenizer_for(style.template))
    assert trained(rendered) == ["\n Lima 🎉, naïve é.  <|im_end|>", "You are welcome.<|im_end|>"]
    assert [span.weight for span in rendered.spans] == [0.5, 1.0]


def test_a_flag_without_effect_is_an_error() -> None:
    messages = [dict(message) for message in CHAT]
    messages[0]["train"] = True
    with pytest.raises(ValueError, match="message 0 by user asks to be trained"):
        render({"messages": messages}, tokenizer_for(CHATML.template))
    messages[0].pop("train")
    messages[1]["weight"] = 2.0
    with pytest.raises(ValueError, match="train_on all does not look at"):
        render({"messages": messages}, tokenizer_for(CHATML.template), TrainOn.ALL)


def test_everything_is_trained_when_asked() -> None:
    rendered = render({"messages": CHAT}, tokenizer_for(CHATML.template), TrainOn.ALL)
    assert trained(rendered) == [rendered.text]


def test_prompt_and_completion_as_text_are_one_text() -> None:
    record = {"prompt": "Question: hi\nAnswer:", "completion": " hello"}
    rendered = render(record, tokenizer_for(CHATML.template))
    assert rendered == Rendered("Question: hi\nAnswer: hello", [Span(20, 26)], add_special_tokens=True, append_eos=True)


def test_prompt_and_completion_as_messages_train_the_completion_only() -> None:
    record = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    tokenizer = tokenizer_for(CHATML.template)
    assert trained(render(record, tokenizer)) == ["\n Lima 🎉, naïve é.  <|im_end|>", "You are welcome.<|im_end|>"]
    prompt = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert trained(render(record, tokenizer, TrainOn.COMPLETION)) == [whole[len(prompt) :]]


def test_plain_text_is_trained_whole_and_closed() -> None:
    tokenizer = tokenizer_for(CHATML.template)
    assert render({"text": "hi"}, tokenizer, TrainOn.ALL) == Rendered("hi", [Span(0, 2)], True, True)
    with pytest.raises(ValueError, match=r"row a\.jsonl:1: plain text has no assistant part"):
        render({"id": "a.jsonl:1", "text": "hi"}, tokenizer)


def test_text_that_begins_with_bos_gets_no_second_one() -> None:
    tokenizer = tokenizer_for(CHATML.template)
    assert not render({"text": "<|endoftext|>hi"}, tokenizer, TrainOn.ALL).add_special_tokens


def test_variables_of_a_row_reach_the_template() -> None:
    template = "{{ greeting or '' }}" + CHATML.template
    record = {"messages": CHAT[:2], "chat_template_kwargs": '{"greeting": "Hello!"}'}
    assert render(record, tokenizer_for(template)).text.startswith("Hello!<|im_start|>user")


def test_a_refusal_of_the_template_names_the_row() -> None:
    with pytest.raises(ValueError, match=r"row x:3: the chat template refused.*System role not supported"):
        render({"id": "x:3", "messages": [SYSTEM, *CHAT]}, tokenizer_for(STYLES["gemma"].template))


def test_a_tokenizer_without_template_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no chat template.*chatml"):
        render({"messages": CHAT}, tiny_tokenizer(chat_template=None))


@pytest.mark.parametrize("name", ["chatml", "qwen3", "mistral"])
def test_the_last_turn_splits_into_prompt_and_reference(name: str) -> None:
    tokenizer = tokenizer_for(STYLES[name].template)
    last = ChatRenderer(tokenizer).last_turn({"messages": CHAT})
    assert last is not None
    assert last.prompt == tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert last.reference == ("<think>\n\n</think>\n\n" if name == "qwen3" else "") + "You are welcome."
    assert not last.add_special_tokens


def test_rows_survive_json() -> None:
    rendered = render({"messages": CHAT}, tokenizer_for(CHATML.template))
    assert Rendered.from_row(json.loads(json.dumps({"id": "a", **rendered.to_row()}))) == rendered


def test_work_is_linear_in_turns() -> None:
    renderer = ChatRenderer(tokenizer_for(QWEN3.template))
    chat = [{"role": role, "content": f"turn {i}"} for i in range(200) for role in ("user", "assistant")]
    renderer.render({"messages": chat})
    num_calls = []
    for num_messages in (100, 400):
        with cProfile.Profile() as profile:
            assert len(renderer.render({"messages": chat[:num_messages]}).spans) == num_messages // 2
        num_calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert 3 < num_calls[1] / num_calls[0] < 5, num_calls


def test_content_in_parts_that_the_template_prints_as_a_list_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes."}]
    record = {"messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": parts}]}
    for train_on in (TrainOn.ASSISTANT, TrainOn.ALL):
        with pytest.raises(
            ValueError, match=r"message 1 has content in parts \(text, thinking\), which the chat templa"
        ):
            ChatRenderer(tokenizer, train_on).render(record)
