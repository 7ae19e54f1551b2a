"""A model that answers the reference token by token scores 1, whatever special tokens the answer has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft.chat.render import ChatRenderer
from sft.evaluate.generation import generate_batch
from sft.evaluate.tasks import exact_match, find_task
from stages.evaluation.rows import EvalRows
from tests.tiny import tiny_model, tiny_tokenizer

CALL = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Lima"})}}
ASKED = {"role": "user", "content": "Weather in Lima?"}
ANSWERED = {"role": "assistant", "content": "Rain.", "reasoning_content": "look outside"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}

HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|start|>assistant to={{ c.function.name }}<|channel|>commentary<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>{% endfor %}"
    "{% if m.content %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def chatml(call: str, thought: str = "<think>{{ m.reasoning_content }}</think>") -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}" + thought + "{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}" + call + "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


ARGUMENTS = "{{ c.function.arguments | tojson }}"
FAMILIES = {
    "harmony": (
        HARMONY,
        "<|return|>",
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"],
    ),
    "mistral": (
        chatml("[TOOL_CALLS]{{ c.function.name }}[ARGS]" + ARGUMENTS, "[THINK]{{ m.reasoning_content }}[/THINK]"),
        "<|im_end|>",
        ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"],
    ),
    "lfm": (
        chatml("<|tool_call_start|>[{{ c.function.name }}(" + ARGUMENTS + ")]<|tool_call_end|>"),
        "<|im_end|>",
        ["<|tool_call_start|>", "<|tool_call_end|>", "<think>", "</think>"],
    ),
    "gemma": (
        chatml(
            "<|tool_call>call:{{ c.function.name }}" + ARGUMENTS + "<tool_call|>",
            "<|channel>thought\n{{ m.reasoning_content }}<channel|>",
        ),
        "<|im_end|>",
        ["<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>"],
    ),
    "qwen": (
        chatml('<tool_call>\n{"name": "{{ c.function.name }}", "arguments": ' + ARGUMENTS + "}\n</tool_call>"),
        "<|im_end|>",
        ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    ),
}


@pytest.mark.parametrize("answer", [ANSWERED, CALLED], ids=["thought", "call"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_scores_1(family: str, answer: dict[str, Any]) -> None:
    template, eos, tokens = FAMILIES[family]
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"eos_token": eos})
    tokenizer.add_tokens(tokens, special_tokens=True)
    model = tiny_model(vocab_size=len(tokenizer))
    stops = [eos, "<|call|>"] if family == "harmony" else [eos]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stops)

    renderer = ChatRenderer(tokenizer)
    record = {"id": "1", "messages": [ASKED, answer]}
    turn = renderer.last_turn(record)
    assert turn is not None
    asked = EvalRows.of([], [turn._asdict()], tokenizer, find_task("text"), 200)
    whole = tokenizer(renderer.render(record).text, add_special_tokens=False)["input_ids"]
    (prompt,) = asked.token_ids
    assert whole[: len(prompt)] == prompt

    (made,) = generate_batch(model, tokenizer, asked.token_ids, 200, begun=[whole[len(prompt) :]])
    assert made.stopped
    assert exact_match(made.text, asked.references[0]) == 1
    assert all(token in made.text for token in tokens if token in turn.reference)
    assert "Rain." in made.text or "Lima" in made.text
