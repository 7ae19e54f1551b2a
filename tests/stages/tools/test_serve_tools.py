"""A model that was trained to call a tool is served, and a client of OpenAI's gets its calls as `tool_calls`.

The model is a real one, trained here until it knows three answers by heart; nothing stands in for its generation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from openai import APIConnectionError, BadRequestError, OpenAI
from ruamel.yaml import YAML

from sft.labels import IGNORE_INDEX
from stages.engines.server import free_port
from stages.tools import serve
from tests.stages.tiny_run import REPO, WIDE, tiny_params, write_tiny_run
from tests.tiny import tiny_model, tiny_tokenizer

KEY = "key-of-the-tests"
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
ASKED = [{"role": "user", "content": "Rome?"}]
ARGUMENTS = {"city": "Rome"}
END = "<|im_end|>"
HEAD = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}"
)
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


class Family(NamedTuple):
    """A chat template, and how a model of it calls the tool."""

    template: str
    call: str
    content: str | None = None
    reasoning: str | None = None


FAMILIES = {
    "hermes": Family(
        HEAD
        + "{% for call in m.tool_calls or [] %}<tool_call>\n"
        + '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
        + "{% endfor %}{# <think> enable_thinking #}"
        + TAIL,
        '<think>\nA city.\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
        "</tool_call>",
        "I look.",
        "A city.",
    ),
    "llama3": Family(
        HEAD
        + "{% for call in m.tool_calls or [] %}"
        + '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}{% endfor %}'
        + "{# <|python_tag|> #}"
        + TAIL,
        '{"name": "weather", "parameters": {"city": "Rome"}}',
    ),
    "mistral": Family(
        HEAD
        + "{% for call in m.tool_calls or [] %}{% if call.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        + "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}"
        + TAIL,
        '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}',
    ),
}


def history(call_id: str) -> list[dict[str, Any]]:
    """Return the conversation after the tool has answered."""
    function = {"name": "weather", "arguments": ARGUMENTS}
    return [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "type": "function", "function": function}]},
        {"role": "tool", "content": "27", "tool_call_id": call_id},
    ]


def train_by_heart(family: Family, folder: Path) -> None:
    """Train a tiny model on three answers until it gives them, and save it with its tokenizer."""
    tokenizer = tiny_tokenizer(family.template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]})
    prompts = [
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        for messages, tools in ((ASKED, TOOLS), (history("123456789"), TOOLS), (ASKED, None))
    ]
    rows = []
    for prompt, answer in zip(prompts, (family.call, "27 degrees.", '{"city": "Rome"}'), strict=True):
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer + END))
        rows.append((torch.tensor([before + after]), torch.tensor([[IGNORE_INDEX] * len(before) + after])))
    model = tiny_model(vocab_size=len(tokenizer), **WIDE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        losses = [model(input_ids=ids, labels=labels).loss for ids, labels in rows]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if max(losses) < 0.02:
            break
    assert max(losses) < 0.02
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", params=list(FAMILIES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Family, OpenAI]]:
    """Serve a family's model; yields the family and a client."""
    family = FAMILIES[request.param]
    paths = write_tiny_run(tmp_path_factory.mktemp("serve"))
    train_by_heart(family, paths.out("merge", "model"))
    with paths.params.open("w", encoding="utf-8") as file:
        YAML().dump(tiny_params().model_dump(), file)
    port = free_port()
    command = [sys.executable, "-m", "stages", "serve", "--port", str(port), "--root", str(paths.root)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", serve.KEY: KEY}
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("serving") for line in process.stdout)
    client = OpenAI(base_url=f"http://{serve.HOST}:{port}/v1", api_key=KEY, max_retries=0, timeout=60)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # the line comes before the server listens
            with suppress(APIConnectionError):
                client.models.list()
                break
            time.sleep(0.2)
        yield family, client
    finally:
        process.kill()
        process.communicate()


def ask(client: OpenAI, messages: list[dict[str, Any]], **fields: Any) -> Any:
    return client.chat.completions.create(
        model="shop-extractor", messages=messages, temperature=0, max_tokens=120, **fields
    )


def test_a_call_is_a_field_of_the_answer(served: tuple[Family, OpenAI]) -> None:
    family, client = served
    (choice,) = ask(client, ASKED, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "weather", ARGUMENTS)
    assert choice.message.content == family.content
    assert getattr(choice.message, "reasoning_content", None) == family.reasoning


def test_a_call_is_streamed(served: tuple[Family, OpenAI]) -> None:
    family, client = served
    chunks = [chunk.choices[0] for chunk in ask(client, ASKED, tools=TOOLS, stream=True)]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert (call.index, call.function.name, json.loads(call.function.arguments)) == (0, "weather", ARGUMENTS)
    assert ("".join(chunk.delta.content or "" for chunk in chunks) or None) == family.content
    reasoning = "".join(getattr(chunk.delta, "reasoning_content", None) or "" for chunk in chunks)
    assert (reasoning or None) == family.reasoning


def test_the_result_of_a_call_goes_back_to_the_model(served: tuple[Family, OpenAI]) -> None:
    _, client = served
    message = ask(client, ASKED, tools=TOOLS).choices[0].message
    result = {"role": "tool", "content": "27", "tool_call_id": message.tool_calls[0].id}
    (choice,) = ask(client, [*ASKED, message.model_dump(exclude_none=True), result], tools=TOOLS).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", "27 degrees.", None)


def test_an_answer_without_tools_and_one_that_may_not_call_are_text(served: tuple[Family, OpenAI]) -> None:
    _, client = served
    (choice,) = ask(client, ASKED).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", '{"city": "Rome"}')
    (choice,) = ask(client, ASKED, tools=TOOLS, tool_choice="none").choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert '"Rome"' in choice.message.content
    with pytest.raises(BadRequestError, match="`tool_choice` is not supported by this server"):
        ask(client, ASKED, tools=TOOLS, tool_choice="required")


def test_a_call_that_is_cut_off_is_text(served: tuple[Family, OpenAI]) -> None:
    _, client = served
    (choice,) = client.chat.completions.create(
        model="shop-extractor", messages=ASKED, tools=TOOLS, temperature=0, max_tokens=len("[TOOL_CALLS]") // 2
    ).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
