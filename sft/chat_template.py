"""Rendering chats with a tokenizer's template, and what can be learned of a template by probing it once.

Templates are programs: nothing is read off their source. A probe conversation shows where a generation prompt ends
and how an assistant turn is closed; both are then looked for in every rendered chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

GENERATION_MARK = re.compile(r"\{%-?\+?\s*generation\s*-?%\}")
# Two words that no template treats specially, and that occur in none.
PROBE_QUESTION, PROBE_ANSWER = "Zyquestionprobe", "Zyanswerprobe"
_TRAINING_FLAGS = ("train", "weight")

Messages = Sequence[Mapping[str, Any]]


def template_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages as a template expects them: no training flags, no nulls, tool-call arguments as objects."""
    result = []
    for message in messages:
        plain = {key: item for key, item in message.items() if item is not None and key not in _TRAINING_FLAGS}
        if "tool_calls" in plain:
            plain["tool_calls"] = [_tool_call(call) for call in plain["tool_calls"]]
        result.append(plain)
    return result


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments, kept as JSON text, are an object again; text that is no JSON object stays text."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except json.JSONDecodeError:
            arguments = None
        if isinstance(arguments, dict):
            function["arguments"] = arguments
    return {**call, "function": function}


@dataclass(frozen=True)
class ChatTemplate:
    """One template together with the variables that a tokenizer gives it.

    Args:
        source: Jinja source.
        variables: Special tokens by name, and whatever a row adds.
    """

    source: str
    variables: Mapping[str, Any]

    @property
    def marks_generation(self) -> bool:
        """Whether the template itself states what the assistant generates, with `{% generation %}`."""
        return GENERATION_MARK.search(self.source) is not None

    def render(
        self, chats: Sequence[Messages], tools: list[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> list[str]:
        """Render several chats in transformers' sandbox, exactly as `apply_chat_template` does.

        Raises:
            ValueError: The template refused the chat.
        """
        return self._render(chats, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, chat: Messages, tools: list[Any] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """Render one chat; returns the text and the character ranges inside the template's generation marks."""
        texts, ranges = self._render([chat], tools, return_assistant_tokens_mask=True)
        return texts[0], ranges[0]

    def _render(
        self, chats: Sequence[Messages], tools: list[Any] | None, **options: bool
    ) -> tuple[list[str], list[Any]]:
        try:
            return render_jinja_template(
                conversations=list(chats), tools=tools, chat_template=self.source, **options, **self.variables
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refused the conversation: {error}") from error


def chat_template_of(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> ChatTemplate:
    """The template that a tokenizer uses for a chat with or without tools.

    Raises:
        ValueError: The tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so conversations cannot be rendered: name "
            "a format (chatml, llama3, ...) or a Jinja file, or give the data as text"
        )
    return ChatTemplate(tokenizer.get_chat_template(None, tools), dict(tokenizer.special_tokens_map))


@dataclass(frozen=True)
class TemplateProfile:
    """What a probe conversation shows of a template.

    Args:
        generation_prompt: The text that `add_generation_prompt` adds, e.g. `<|im_start|>assistant\\n`; empty when the
            template adds nothing.
        after_question: All text between the last question and the point where generation begins.
        lead: Text between that point and the answer, e.g. the space in `[/INST] answer`.
        tail: All text after a final answer.
        terminator: The tail through its first special token, e.g. `<|im_end|>`; the whole tail when it has none.
        stop_token: The special token that the terminator ends in; None when it has none.
    """

    generation_prompt: str
    after_question: str
    lead: str
    tail: str
    terminator: str
    stop_token: str | None

    @property
    def has_stop_token(self) -> bool:
        """Whether a special token ends a turn."""
        return self.stop_token is not None

    @classmethod
    def probe(cls, template: ChatTemplate, special_tokens: Sequence[str]) -> TemplateProfile:
        """Render a question with and without generation prompt, and the question with its answer.

        Args:
            template: The template.
            special_tokens: Texts of all added tokens of the tokenizer.

        Raises:
            ValueError: The template does not render a plain question and answer.
        """
        question = [{"role": "user", "content": PROBE_QUESTION}]
        asked, answered = template.render([question, [*question, {"role": "assistant", "content": PROBE_ANSWER}]])
        prompt = template.render([question], add_generation_prompt=True)[0]
        at_answer = answered.find(PROBE_ANSWER)
        if PROBE_QUESTION not in prompt or at_answer < 0:
            raise ValueError(f"the chat template does not print a plain question and its answer, but {answered!r:.200}")
        tail = answered[at_answer + len(PROBE_ANSWER) :]
        stop, token = _first_special_token(tail, special_tokens)
        return cls(
            generation_prompt=prompt[len(asked) :] if prompt.startswith(asked) else "",
            after_question=prompt[prompt.rfind(PROBE_QUESTION) + len(PROBE_QUESTION) :],
            lead=answered[len(prompt) : at_answer] if answered.startswith(prompt) else "",
            tail=tail,
            terminator=tail[:stop] if token else tail,
            stop_token=token,
        )


def _first_special_token(tail: str, special_tokens: Sequence[str]) -> tuple[int, str | None]:
    """End and text of the first special token in a tail, the longest of those that begin there."""
    found = [(tail.find(token), -len(token), token) for token in special_tokens if token and token in tail]
    if not found:
        return 0, None
    start, _, token = min(found)
    return start + len(token), token


def special_token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of all tokens that a tokenizer never splits."""
    return sorted({str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens))
