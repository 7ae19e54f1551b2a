"""The held-out prompts as requests: messages where the tokenizer renders these as `format` did, else the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft.chat.render import messages_of
from sft.untrusted.templates import chat_templates_in_child
from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths
from stages.evaluation.rows import EvalRows


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt.

    Args:
        id: Id of its row.
        text: The rendered text.
        token_ids: Its tokens.
        messages: The messages before the answer; None = the prompt is asked as tokens.
        tools: Tools of the row.
    """

    id: str
    text: str
    token_ids: list[int]
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


def read_requests(
    paths: Paths, asked: EvalRows, tokenizer: PreTrainedTokenizerBase, system: str | None
) -> list[Prompt]:
    """Return the held-out prompts with the messages that render to their text.

    Args:
        paths: The checkout.
        asked: The held-out rows.
        tokenizer: Tokenizer of the run.
        system: System message that `format` adds to rows without one.
    """
    wanted = {prompt["id"] for prompt in asked.prompts}
    file = paths.out("load", "eval.jsonl")
    records = {row["id"]: row for row in read_jsonl(file) if row["id"] in wanted} if file.is_file() else {}
    found = []
    with chat_templates_in_child():
        for prompt, token_ids in zip(asked.prompts, asked.token_ids, strict=True):
            chat = _chat(records.get(prompt["id"], {}), prompt["prompt"], tokenizer, system)
            found.append(Prompt(prompt["id"], prompt["prompt"], list(token_ids), *chat))
    return found


def _chat(
    record: Mapping[str, Any], text: str, tokenizer: PreTrainedTokenizerBase, system: str | None
) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None]:
    """Return messages and tools of a record if they render to the text, else None for both."""
    messages = messages_of(record) if record and tokenizer.chat_template else None
    places = [number for number, message in enumerate(messages or []) if message["role"] == "assistant"]
    if not messages or not places:
        return None, None
    before: Sequence[Mapping[str, Any]] = messages[: places[-1]]
    if system is not None and all(message["role"] != "system" for message in messages):
        before = [{"role": "system", "content": system}, *before]
    tools = record.get("tools") or None
    given = [{key: value for key, value in message.items() if value is not None} for message in before]
    try:
        rendered = tokenizer.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template raises errors of any class; the prompt is then asked as tokens
        return None, None
    return (given, tools) if rendered == text else (None, None)
