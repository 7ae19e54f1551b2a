"""Reasoning of the assistant: where messages hold it, and how a chat template prints it.

Data sets give reasoning as a key of a message (`reasoning_content`, `thinking`, ...), as `<think> ... </think>` in its
content, or as a part of the content. A template reads one of these forms. It is probed once, and reasoning is given to
it in a form that it prints.

Some templates never print the reasoning of an answer, although the model generates it: they cut it off, and expect that
the answer is only used as history. If their generation prompt or their answers show a block of reasoning, the reasoning
of the last answer is put into that block (`Block`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from sft.chat.template import (
    PROBE_ANSWER,
    PROBE_CHAT,
    PROBE_QUESTION,
    ChatTemplate,
    Messages,
    template_messages,
    wants_text_arguments,
)
from sft.chat.template_syntax import template_variables
from sft.data.messages import REASONING_KEY

_PLAIN_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_TAGS = r"think|thinking|thought|reasoning"
_LINE = re.compile(
    rf"(?:\A|(?<=\n))[ \t]*(?:<(?P<tag>{_TAGS})>(?P<text>.*?)</(?P=tag)>|\[THINK\](?P<other>.*?)\[/THINK\])\s*",
    re.DOTALL,
)
"""Block of reasoning in a content, at its beginning or at the beginning of a line."""
_OPENED = re.compile(rf"\A\s*(?:<(?:{_TAGS})>|\[THINK\])")
_END = "</think>"
_EMPTY = re.compile(r"<think>(\s*)</think>(\s*)\Z")
_CLOSED = re.compile(r"(?:<think>\s*)?</think>\s*\Z")
_PROMPT_OPENS = re.compile(r"<think>(\s*)\Z")
_PROMPT_CLOSES = re.compile(r"</think>\s*\Z")
_EMPTY_IN_SOURCE = re.compile(r"<think>((?:\\n|\n)*)</think>((?:\\n|\n)*)")

MARK = "\U0010fff0"
"""Private-use character that a template prints where the reasoning of the last answer belongs."""
_LOOK_BACK = 64
"""Characters before the mark in which a block that the template printed is searched for."""

REASONING_TAGS = ("<think>", "</think>", "[THINK]", "[/THINK]")
"""Tags around reasoning, which are special tokens of some tokenizers."""

TEXT, PARTS, FIELD = "text", "parts", "reasoning_content"
"""Forms of reasoning: in the content, as a part of it, and the most common key; other forms are other keys."""
_FORMS = (FIELD, "thinking", "reasoning", PARTS, TEXT)
_PROBE_REASONING = "Zyreasoningprobe"
_PROBE_CALL = {"type": "function", "function": {"name": "zyprobe", "arguments": json.dumps({"zykey": PROBE_ANSWER})}}


class Split(NamedTuple):
    """A message of the assistant, divided into its reasoning and the rest.

    Args:
        reasoning: The reasoning; empty if there is none.
        rest: The message without it.
        forms: Forms in which the message gives it.
        is_first: Whether all of it stands before the answer.
    """

    reasoning: str
    rest: dict[str, Any]
    forms: tuple[str, ...]
    is_first: bool = True


def split_reasoning(message: Mapping[str, Any]) -> Split:
    """Divide a message into its reasoning and the rest; messages of other roles have none.

    Raises:
        ValueError: The content opens a block of reasoning and does not close it.
    """
    rest = dict(message)
    if message["role"] != "assistant":
        return Split("", rest, ())
    found: list[str] = []
    forms: list[str] = []
    for key, value in message.items():
        if REASONING_KEY.search(key) and not isinstance(value, (bool, int, float)):
            del rest[key]
            text = _text_of(value)
            found += [text] if text.strip() else []
            forms += [key] if text.strip() else []
    content = message.get("content")
    texts: list[str] = []
    is_first = True
    if isinstance(content, str):
        texts, rest["content"], is_first = _split_text(content)
    elif isinstance(content, Sequence):
        texts, rest["content"], is_first = _split_parts(content)
    if texts:
        found += texts
        forms.append(TEXT if isinstance(content, str) else PARTS)
    return Split("\n\n".join(found), rest, tuple(forms), is_first)


def _text_of(value: Any) -> str:
    """Return the text of a value under a key of reasoning: a text, parts, or a list of them."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Mapping):
        texts = [
            item for key, item in value.items() if REASONING_KEY.search(key) or key in ("text", "content", "summary")
        ]
        return "\n\n".join(map(_text_of, texts)) if texts else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Sequence):
        return "\n\n".join(map(_text_of, value))
    return ""


def _may_have_block(content: str) -> bool:
    return "</" in content or "[/THINK]" in content or content.lstrip().startswith(("<", "["))


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Return whether a glance at a message shows that it has no reasoning."""
    content = message.get("content", "")
    return message.keys() <= _PLAIN_KEYS and isinstance(content, str) and not _may_have_block(content)


def _split_text(content: str) -> tuple[list[str], str, bool]:
    if not _may_have_block(content):
        return [], content, True
    blocks = list(_LINE.finditer(content))
    if blocks:
        found = [(block["text"] if block["tag"] else block["other"]).strip() for block in blocks]
        is_first = len(blocks) == 1 and not content[: blocks[0].start()].strip()
        return [text for text in found if text], _LINE.sub("", content), is_first
    if _OPENED.match(content):
        raise ValueError(f"the content {content[:60]!r} opens a block of reasoning and does not close it")
    before, end, after = content.partition(_END)
    if not end or "<think>" in before:  # the tags stand in the middle of a sentence, which is about them
        return [], content, True
    return [before.strip()] if before.strip() else [], after.lstrip("\n"), True


def _split_parts(parts: Sequence[Any]) -> tuple[list[str], Any, bool]:
    reasons = [bool(REASONING_KEY.search(str(part.get("type", "")))) for part in parts]
    if not any(reasons):
        return [], parts, True
    others = [part for part, is_reason in zip(parts, reasons, strict=True) if not is_reason]
    texts = (
        _text_of({key: value for key, value in part.items() if key != "type"}).strip()
        for part, is_reason in zip(parts, reasons, strict=True)
        if is_reason
    )
    is_text = all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in others)
    rest = "".join(part["text"] for part in others) if is_text else others
    return [text for text in texts if text], rest, all(reasons[: sum(reasons)])


def has_reasoning(message: Mapping[str, Any]) -> bool:
    """Return whether a message holds reasoning."""
    try:
        return bool(split_reasoning(message).reasoning)
    except ValueError:
        return True


def has_earlier_reasoning(messages: Messages) -> bool:
    """Return whether a message of the assistant before the last question holds reasoning."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return bool(questions) and any(map(has_reasoning, messages[: questions[-1]]))


def without_reasoning(messages: Messages, indices: Sequence[int]) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Remove the reasoning of some messages.

    Returns:
        The chat, and the removed reasoning by the index of its message.

    Raises:
        ValueError: A content opens a block of reasoning and does not close it; names the message.
    """
    result: list[dict[str, Any]] = [dict(message) for message in messages]
    removed: dict[int, str] = {}
    for index in indices:
        try:
            split = split_reasoning(messages[index])
        except ValueError as error:
            raise ValueError(f"message {index}: {error}, so it cannot be removed; fix the data") from None
        result[index] = split.rest
        if split.reasoning:
            removed[index] = split.reasoning
    return result, removed


def with_reasoning_apart(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record whose messages have the reasoning that begins their content under a key of its own."""
    result = dict(record)
    for column in ("messages", "prompt", "completion"):
        if isinstance(record.get(column), list):
            result[column] = [_apart(message) for message in record[column]]
    return result


def _apart(message: dict[str, Any]) -> dict[str, Any]:
    try:
        reasoning, rest, forms, is_first = split_reasoning(message)
    except ValueError:
        return message
    return {**rest, FIELD: reasoning} if forms == (TEXT,) and is_first else message


class Block(NamedTuple):
    """Block into which the reasoning of the last answer is put, for a template that does not print it.

    The template prints a mark in its place, and the mark is replaced. An empty block before the mark is part of it.

    Args:
        opening: Text before the reasoning, e.g. `<think>\\n`.
        closing: Text after it, e.g. `\\n</think>\\n\\n`.
    """

    opening: str
    closing: str

    def hide(self, chat: Messages) -> tuple[Messages, str | None]:
        """Return a chat whose last message has a mark instead of its reasoning, and the reasoning; None if none."""
        last = chat[-1] if chat else {}
        reasoning, content = last.get(FIELD), last.get("content")
        if last.get("role") != "assistant" or last.get("tool_calls") or not isinstance(reasoning, str):
            return chat, None
        if isinstance(content, str):
            content = MARK + content
        elif content and content[0].get("type") == "text":
            content = [{**content[0], "text": MARK + content[0]["text"]}, *content[1:]]
        else:
            return chat, None
        marked = {**{key: value for key, value in last.items() if key != FIELD}, "content": content}
        return [*chat[:-1], marked], reasoning

    def show(
        self, text: str, reasoning: str | None, ranges: Sequence[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Replace the mark in a rendered chat by the block, and move ranges of characters with the text."""
        if reasoning is None or MARK not in text:
            return text, list(ranges)
        if text.count(MARK) > 1:  # the answer is printed several times, and it is unknown which one is generated
            return text.replace(MARK, ""), list(ranges)
        end = text.index(MARK)
        closed = _CLOSED.search(text[max(0, end - _LOOK_BACK) : end])
        start = end - (len(closed[0]) if closed else 0)
        new = f"{self.opening}{reasoning}{self.closing}"
        grown = len(new) - (end + len(MARK) - start)

        def moved(place: int) -> int:
            return place if place <= start else max(start, place + grown)

        return text[:start] + new + text[end + len(MARK) :], [(moved(first), moved(last)) for first, last in ranges]


@dataclass(frozen=True)
class TemplateThinking:
    """How a template prints reasoning.

    Args:
        template: The template, without a block of its own.
    """

    template: ChatTemplate

    @cached_property
    def _knows_tags(self) -> bool:
        return "<think" in self.template.source or _END in self.template.source

    @cached_property
    def block(self) -> Block | None:
        """Block for the reasoning of the last answer; None if the template prints it, or shows no block."""
        if not self._knows_tags or self._form_of_answers is not None:
            return None
        try:
            answered = self.template.render([PROBE_CHAT])[0]
        except ValueError:
            return None
        empty = _EMPTY.search(answered.partition(PROBE_ANSWER)[0][-_LOOK_BACK:])
        if empty:
            return _block(empty[1], empty[2])
        opened = _PROMPT_OPENS.search(self.prompt)
        return Block(f"<think>{opened[1]}", f"{opened[1]}{_END}{opened[1] * 2}") if opened else None

    @cached_property
    def prompt(self) -> str:
        """What the template prints for a question and the generation prompt; empty if it refuses it."""
        try:
            return self.template.render([PROBE_CHAT[:1]], add_generation_prompt=True)[0]
        except ValueError:
            return ""

    @cached_property
    def opens_block(self) -> bool:
        """Whether the generation prompt begins a block of reasoning, which the model then has to close."""
        return _PROMPT_OPENS.search(self.prompt) is not None

    @cached_property
    def _inline(self) -> Block:
        shown = _EMPTY_IN_SOURCE.search(self.template.source)
        if shown is None:
            return Block("<think>\n", f"\n{_END}\n\n")
        return _block(*(part.replace("\\n", "\n") for part in shown.groups()))

    @cached_property
    def _form_of_answers(self) -> str | None:
        return self._form(is_call=False)

    @cached_property
    def _form_of_calls(self) -> str | None:
        return self._form(is_call=True)

    def _form(self, *, is_call: bool) -> str | None:
        forms = _FORMS if self._knows_tags else _FORMS[:-1]
        return next((form for form in forms if self._prints(form, is_call=is_call)), None)

    def _prints(self, form: str, *, is_call: bool) -> bool:
        """Return whether the template prints reasoning in a form, before an answer or a call that ends a chat."""
        answer: dict[str, Any] = {"role": "assistant", "content": "" if is_call else PROBE_ANSWER}
        if is_call:
            answer["tool_calls"] = [_PROBE_CALL]
        chat = [PROBE_CHAT[0], self._given(answer, _PROBE_REASONING, form)]
        as_text = is_call and wants_text_arguments(self.template.source)
        try:
            text = self.template.render([template_messages(chat, arguments_as_text=as_text)])[0]
        except ValueError:
            return False
        before, _, after = text.partition(_PROBE_REASONING)
        if PROBE_ANSWER not in after or "'thinking'" in before or '"thinking"' in before:
            return False
        printed = before.partition(PROBE_QUESTION)[2] + after
        return form != TEXT or printed.count(_END) == 1

    def _given(self, rest: Mapping[str, Any], reasoning: str, form: str) -> dict[str, Any]:
        """Return a message with its reasoning in one form."""
        content = rest.get("content") or ""
        if form == PARTS:
            others = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            others = [part for part in others if part.get("text") != ""]
            return {**rest, "content": [{"type": "thinking", "thinking": reasoning}, *others]}
        if form == TEXT and isinstance(content, str):
            return {**rest, "content": f"{self._inline.opening}{reasoning}{self._inline.closing}{content}"}
        return {**rest, (FIELD if form == TEXT else form): reasoning}

    def prepare(self, messages: Messages) -> list[dict[str, Any]]:
        """Return a chat whose reasoning is in a form that the template prints, as far as it prints one.

        Args:
            messages: Messages as `sft.chat.template.template_messages` returns them.
        """
        return [dict(message) if _is_plain(message) else self._prepared(message) for message in messages]

    def _prepared(self, message: Mapping[str, Any]) -> dict[str, Any]:
        try:
            reasoning, rest, given, is_first = split_reasoning(message)
        except ValueError:
            return dict(message)  # the template may print the open block as it is
        if not reasoning or not is_first:
            return dict(message)
        is_call = bool(message.get("tool_calls"))
        form = self._form_of_calls if is_call else self._form_of_answers
        # text that a template without tags prints would be part of the answer
        is_foreign = given == (TEXT,) and form is not None and not self._knows_tags
        if not is_foreign and all(self._is_printed(own, is_call=is_call) for own in given):
            return dict(message)
        if form is None and (is_call or self.block is None):
            return dict(message)
        return self._given(rest, reasoning, form or FIELD)

    def _is_printed(self, form: str, *, is_call: bool) -> bool:
        known: dict[tuple[str, bool], bool] = self.__dict__.setdefault("_known_forms", {})
        if (form, is_call) not in known:
            known[form, is_call] = self._prints(form, is_call=is_call)
        return known[form, is_call]

    def with_empty_blocks(self, messages: Messages) -> list[dict[str, Any]]:
        """Return a chat without reasoning whose answers close the block that the generation prompt opens."""
        if self.block is None or not self.opens_block:
            return [dict(message) for message in messages]
        return [{**message, FIELD: ""} if message["role"] == "assistant" else dict(message) for message in messages]

    def _variants(self) -> Sequence[tuple[str, bool]]:
        names = [name for name in template_variables(self.template.source) if name not in self.template.variables]
        return list(product(names, (False, True)))

    def _with(self, name: str, value: bool) -> TemplateThinking:
        return TemplateThinking(replace(self.template, variables={**self.template.variables, name: value}))

    def keeping_variable(self) -> dict[str, bool]:
        """Return the variable with which the template prints the reasoning of earlier answers; none if it needs none.

        An example is `{"preserve_thinking": True}`.
        """
        if self._form_of_answers is None or self._prints_earlier():
            return {}
        return next(
            ({name: value} for name, value in self._variants() if self._with(name, value)._prints_earlier()), {}
        )

    def _prints_earlier(self) -> bool:
        earlier = {"role": "assistant", "content": "Zyearlieranswer"}
        if self._form_of_answers is None:
            return False
        answers = [
            self._given(earlier, "Zyearlierreasoning", self._form_of_answers),
            self._given(PROBE_CHAT[1], _PROBE_REASONING, self._form_of_answers),
        ]
        try:
            text = self.template.render([[PROBE_CHAT[0], answers[0], PROBE_CHAT[0], answers[1]]])[0]
        except ValueError:
            return False
        return "Zyearlierreasoning" in text and _PROBE_REASONING in text

    def silencing_variable(self) -> dict[str, bool]:
        """Return the variable with which the generation prompt closes the block of reasoning; none if it needs none.

        An example is `{"enable_thinking": False}`.
        """
        if not self._knows_tags or _PROMPT_CLOSES.search(self.prompt):
            return {}
        closing = (pair for pair in self._variants() if _PROMPT_CLOSES.search(self._with(*pair).prompt))
        return dict([pair]) if (pair := next(closing, None)) else {}


def _block(inside: str, after: str) -> Block:
    half = (len(inside) + 1) // 2
    return Block(f"<think>{inside[:half]}", f"{inside[half:]}{_END}{after}")
