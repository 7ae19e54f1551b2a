"""Everything that a chat says is printed by the template, or accounted for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft.chat.formats import set_template_variables
from sft.chat.render import ChatRenderer, Rendered, TrainOn, render
from tests.tiny import CHATML, tiny_tokenizer

ASKED = {"role": "user", "content": "weather in Paris?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
PRINTS_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML


def call(name: str = "weather", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def calling(*calls: dict[str, Any], content: str = "", **keys: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "content": content, "tool_calls": list(calls), **keys}]}


def printing(calls: str) -> str:
    """Return ChatML with a Jinja text that prints tool calls."""
    return CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}" + calls)


def lost(record: dict[str, Any], template: str) -> str:
    """Return what is missing in the text, and check that it is an error unless another policy is stated."""
    tokenizer = tiny_tokenizer(template)
    missing = ChatRenderer(tokenizer, not_printed="warn").render(record).not_printed
    if missing:
        with pytest.raises(ValueError, match=r"does not print.*state not_printed: warn"):
            render(record, tokenizer)
        with pytest.raises(ValueError, match="does not print"):
            render(record, tokenizer, TrainOn.ALL)
    return missing


ALL_CALLS = (
    "{% for c in message.tool_calls or [] %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v }};{% endfor %}){% endfor %}"
)
AS_JSON = "{% for c in message.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"


def test_a_name_in_the_list_of_tools_is_not_the_call() -> None:
    record = {**calling(call(city="Paris")), "tools": json.dumps([TOOL])}
    unprinted = "calls 'weather', and the chat template does not print the call (the first of 3 such texts)"
    assert lost(record, PRINTS_TOOLS) == f"message 1 (assistant) {unprinted}"


def test_every_call_and_every_argument_counts() -> None:
    record = calling(call(city="Paris"), call(city="Lima"))
    assert lost(record, printing(ALL_CALLS)) == ""
    assert lost(record, printing(AS_JSON)) == ""
    first = printing(ALL_CALLS.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]"))
    assert "calls 'weather'" in lost(record, first)
    names = printing("{% for c in message.tool_calls or [] %}{{ c.function.name }}{% endfor %}")
    assert "says 'city' (argument city of call 0)" in lost(record, names)
    keys = printing(ALL_CALLS.replace("{{ v }}", ""))
    assert "says 'Paris' (argument city of call 0)" in lost(record, keys)


@pytest.mark.parametrize("value", [3, 2.5, True, None, "", [], {}, [1, "x", {"y": 2}], 'a "quoted"\nline', "é🎉"])
def test_values_of_any_type_are_found_as_templates_write_them(value: Any) -> None:
    record = calling(call(city="Paris", value=value))
    for template in (ALL_CALLS, AS_JSON, AS_JSON.replace("tojson", "string")):
        assert lost(record, printing(template)) == ""


@pytest.mark.parametrize("value", [3, 2.5, True, [7]])
def test_values_that_are_left_out_are_found(value: Any) -> None:
    only_texts = printing(ALL_CALLS.replace("={{ v }}", "={% if v is string %}{{ v }}{% endif %}"))
    assert lost(calling(call(city="Paris")), only_texts) == ""
    assert "(argument value" in lost(calling(call(value=value, city="Paris")), only_texts)


def test_content_beside_a_call_and_the_result_of_a_tool_count() -> None:
    either = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message.tool_calls %}" + ALL_CALLS + "{% elif message.role != 'tool' %}{{ message.content }}{% endif %}",
    )
    assert lost(calling(call(city="Paris")), either) == ""
    assert "says 'Let me look.' (content)" in lost(calling(call(city="Paris"), content="Let me look."), either)
    messages = [*calling(call(city="Paris"))["messages"], {"role": "tool", "content": "rain"}]
    record = {"messages": [*messages, {"role": "assistant", "content": "Rain."}]}
    assert lost(record, either).startswith("message 2 (tool) says 'rain' (content)")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", "thought", "chain_of_thought"])
def test_reasoning_counts_under_any_name(key: str) -> None:
    record = {"messages": [ASKED, {"role": "assistant", "content": "Rain.", key: "look outside"}]}
    assert f"says 'look outside' ({key})" in lost(record, CHATML)
    prints = CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{{ message['" + key + "'] }}")
    assert lost(record, prints) == ""


def test_metadata_need_not_be_printed() -> None:
    answer = {"role": "assistant", "content": "Rain.", "id": "m1", "name": "bot", "timestamp": "2025-01-01"}
    assert lost({"messages": [ASKED, answer]}, CHATML) == ""


def test_thoughts_that_the_template_cuts_off_are_found() -> None:
    record = {"messages": [ASKED, {"role": "assistant", "content": "<think>\nlook outside\n</think>\n\nRain."}]}
    cuts = CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1].strip() }}")
    assert "says 'look outside" in lost(record, cuts)
    moves = CHATML.replace(
        "{{ message['content'] }}",
        "{% if '</think>' in message.content %}"
        "<think>{{ message.content.split('</think>')[0].replace('<think>', '').strip() }}</think>"
        "{{ message.content.split('</think>')[-1].strip() }}{% else %}{{ message.content }}{% endif %}",
    )
    assert lost(record, moves) == ""


def test_a_text_that_is_cut_short_is_found() -> None:
    record = {"messages": [ASKED, {"role": "assistant", "content": "It rains all day in Paris and in Lima."}]}
    cuts = CHATML.replace("{{ message['content'] }}", "{{ message['content'][:17] }}")
    assert "all day in Paris and in Lima.' (content)" in lost(record, cuts)


def test_a_system_message_that_is_skipped_is_found() -> None:
    skips = "{% for message in messages if message.role != 'system' %}" + CHATML.partition("%}")[2]
    record = {
        "messages": [{"role": "system", "content": "Be brief."}, ASKED, {"role": "assistant", "content": "Rain."}]
    }
    assert lost(record, skips).startswith("message 0 (system) says 'Be brief.' (content)")


def test_a_tool_that_is_not_printed_is_an_error() -> None:
    other = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    record = {"messages": [ASKED, {"role": "assistant", "content": "Rain."}], "tools": json.dumps([TOOL, other])}
    assert isinstance(render(record, tiny_tokenizer(PRINTS_TOOLS)), Rendered)
    with pytest.raises(ValueError, match="the record has a tool 'clock', which the chat template does not print"):
        render(record, tiny_tokenizer(PRINTS_TOOLS.replace("tools | tojson", "tools[:1] | tojson")))


THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}",
)


def test_variables_become_defaults_of_the_template() -> None:
    tokenizer = tiny_tokenizer(THINKING)
    record = {"messages": [ASKED, {"role": "assistant", "content": "Rain."}]}
    with pytest.raises(ValueError, match=r'Set chat_template_kwargs to \{"enable_thinking": false\}'):
        render(record, tokenizer)
    set_template_variables(tokenizer, {"enable_thinking": False})
    rendered = render(record, tokenizer)
    assert [rendered.text[start:end] for start, end, _ in rendered.spans] == ["Rain.<|im_end|>"]
    prompt = tokenizer.apply_chat_template([ASKED], tokenize=False, add_generation_prompt=True)
    assert rendered.text.startswith(prompt)
    asked = {**record, "chat_template_kwargs": '{"enable_thinking": true}'}
    with pytest.raises(ValueError, match="does not begin where generation begins"):
        render(asked, tokenizer)


def test_a_variable_that_the_template_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"names 'enable_thinkin', which is not a variable.*'enable_thinking'"):
        set_template_variables(tiny_tokenizer(THINKING), {"enable_thinkin": False})
