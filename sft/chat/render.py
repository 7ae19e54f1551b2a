"""Rendering of records to text, with the character spans that are trained.

Spans index characters of the full text, so that a prompt and its answer are tokenized together. Tokenizing them
separately would give other tokens wherever a token crosses the border between them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from sft.chat.printed import Unprinted, unprinted
from sft.chat.said import Kind, MarkedChat, MarkedText, mark_chat, render_with_marks
from sft.chat.template import (
    ChatTemplate,
    TemplateProfile,
    chat_template_of,
    special_token_texts,
    template_messages,
    wants_text_arguments,
)
from sft.chat.thinking import TemplateThinking, has_reasoning, without_reasoning
from sft.chat.turns import Turn, TurnFinder, assistant_indices
from sft.options import NotPrintedPolicy, ThinkingPolicy

_USE_ANOTHER = "use one that does, as the named format chatml"
_NEEDS_COMPLETION = "train_on completion needs prompt and completion; conversations have assistant turns"


class TrainOn(StrEnum):
    """Part of a record that the loss is computed on."""

    ALL = "all"
    COMPLETION = "completion"
    ASSISTANT = "assistant"
    LAST_ASSISTANT = "last_assistant"


class PartOptions(Protocol):
    """The options of `SFTConfig` that select the trained part of a row."""

    completion_only_loss: bool | None
    assistant_only_loss: bool
    last_turn_only_loss: bool


def asked_part(options: PartOptions, *, has_completion: bool) -> TrainOn | None:
    """Return the part that the options select; None if that is the completion and the rows do not have one.

    Args:
        options: Options that select the trained part.
        has_completion: Whether rows consist of a prompt and its completion.
    """
    if options.last_turn_only_loss:
        return TrainOn.LAST_ASSISTANT
    if options.assistant_only_loss:
        return TrainOn.ASSISTANT
    if has_completion:
        return TrainOn.ALL if options.completion_only_loss is False else TrainOn.COMPLETION
    return None if options.completion_only_loss else TrainOn.ALL


class Span(NamedTuple):
    """Trained characters `start` to `end` (exclusive) of a text, and the weight of their loss."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    """One record as text.

    Args:
        text: The full text.
        spans: Its trained spans, in order, without overlap.
        add_special_tokens: Whether the tokenizer adds its special tokens, such as a beginning-of-sequence token. False
            for chats, since a chat template prints them itself.
        append_eos: Whether the end-of-sequence token is appended to the text.
        not_printed: Description of what the record says and the text does not contain; empty if it contains all.
            Not part of a row.
        thinking_removed: Reasoning that the record says and that is in no text of it, as `ChatRenderer.thinking` says.
            Not part of a row.
        turn: Index of the only message that is trained, if the record became one text per turn. Not part of a row.
    """

    text: str
    spans: list[Span]
    add_special_tokens: bool = False
    append_eos: bool = False
    not_printed: str = ""
    thinking_removed: tuple[str, ...] = ()
    turn: int | None = None

    def to_row(self) -> dict[str, Any]:
        """Convert to a dict of JSON values; `from_row` is the inverse."""
        return {
            "text": self.text,
            "spans": [list(span) for span in self.spans],
            "add_special_tokens": self.add_special_tokens,
            "append_eos": self.append_eos,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Rendered:
        """Create from a dict that `to_row` returned; other keys are ignored."""
        spans = [Span(int(start), int(end), float(weight)) for start, end, weight in row["spans"]]
        return cls(row["text"], spans, row["add_special_tokens"], row["append_eos"])


class LastTurn(NamedTuple):
    """The last answer of a record: the prompt before it, and the answer without its stop token as the reference."""

    prompt: str
    reference: str
    add_special_tokens: bool


class ChatRenderer:
    """Render records with one tokenizer's chat template.

    Args:
        tokenizer: The tokenizer. Its template and special tokens are read once, at the first record that uses them.
        train_on: Part that the spans cover. For prompt and completion, `assistant` and `last_assistant` mean the
            completion if they are text, and only turns of the completion if they are messages.
        not_printed: What to do with a record that says more than its template prints: raise an error, or render it
            and describe in `Rendered.not_printed` what is missing.
        thinking: What to do with the reasoning of the assistant. `keep`: all of it has to be printed, else
            `not_printed` applies. `last`: reasoning of earlier messages that the template does not print is removed;
            these messages are not trained, since the model generates their reasoning. `unroll`: one text for each
            trained message: the prompt as the template prints it for generation, and what the model generates.
            `drop`: all of it is removed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: TrainOn = TrainOn.ASSISTANT,
        not_printed: NotPrintedPolicy = "fail",
        thinking: ThinkingPolicy = "keep",
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on = TrainOn(train_on)
        self.not_printed = not_printed
        self.thinking = thinking
        self._special_tokens = special_token_texts(tokenizer)
        self._templates: dict[tuple[bool, str], ChatTemplate] = {}
        self._thinking: dict[tuple[bool, str], TemplateThinking] = {}
        self._finders: dict[tuple[bool, str], TurnFinder] = {}
        self._ahead: dict[int, tuple[Mapping[str, Any], _Begun, tuple[MarkedChat, str]]] = {}

    def render_ahead(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Render chats in one call of the child process, to make `render` of the same objects faster afterwards.

        Nothing is rendered for records for which this is not possible, or that `render` raises an error for.
        """
        self._ahead.clear()
        if self.thinking == "unroll":
            return
        waiting: dict[tuple[bool, str], list[tuple[Mapping[str, Any], _Begun, MarkedChat]]] = {}
        for record in records:
            if "text" in record or isinstance(record.get("completion"), str):
                continue
            try:
                template = self.template(record)
                if type(template) is not ChatTemplate:
                    continue
                begun = self._begun(record)
                marked = mark_chat(template, begun.messages)
            except (ValueError, LookupError, TypeError):
                continue
            if marked is not None:
                waiting.setdefault(_template_key(record), []).append((record, begun, marked))
        for key, items in waiting.items():
            texts = self._templates[key].render_each([(marked.chat, _tools(record)) for record, _, marked in items])
            for (record, begun, marked), text in zip(items, texts, strict=True):
                if text is not None:
                    self._ahead[id(record)] = (record, begun, (marked, text))

    def render_rows(self, record: Mapping[str, Any]) -> list[Rendered]:
        """Render a record; with `unroll` there is a text for each trained message of a chat, else there is one.

        Raises:
            ValueError: See `render`.
        """
        if self.thinking != "unroll" or "text" in record or isinstance(record.get("completion"), str):
            return [self.render(record)]
        try:
            return self._unrolled(record)
        except ValueError as error:
            raise ValueError(f"{_name(record)}: {error}") from error

    def render(self, record: Mapping[str, Any]) -> Rendered:
        """Render a record as one text, whatever `thinking` is, and find its trained spans.

        Raises:
            ValueError: The template refuses the record, a turn cannot be located or does not begin where generation
                begins, `train_on` does not apply to the record, or the record says what the template does not print
                and `not_printed` is `fail`. The error names the record's id.
        """
        try:
            if "text" in record:
                return self._render_text(record["text"])
            if isinstance(record.get("completion"), str):
                return self._render_pair(record["prompt"], record["completion"])
            return self._render_chat(record)
        except ValueError as error:
            raise ValueError(f"{_name(record)}: {error}") from error

    def last_turn(self, record: Mapping[str, Any]) -> LastTurn | None:
        """Split a record before its last answer, for generation.

        Returns:
            The text up to where generation begins, and the answer without its terminator. None if the record has no
            answer, such as plain text.
        """
        if "text" in record:
            return None
        if isinstance(record.get("completion"), str):
            return LastTurn(record["prompt"], record["completion"], not self._begins_with_bos(record["prompt"]))
        indices = assistant_indices(_messages(record))
        if not indices:
            return None
        try:
            if self.thinking in ("last", "unroll"):
                text, turns, _ = self._generated(record, indices[-1])
            else:
                chat = self._chat(record)
                text, turns = self._find(record, chat, indices[-1:])
        except ValueError as error:
            raise ValueError(f"{_name(record)}: {error}") from error
        last = [turn for turn in turns if turn.message == indices[-1]]
        answer = _without_stop(text[last[0].start : last[-1].end], self.profile(record))
        return LastTurn(text[: last[0].start], answer, False)

    def template(self, record: Mapping[str, Any]) -> ChatTemplate:
        """Return the template of a record; its tools may select another one, and it may define variables."""
        key = _template_key(record)
        if key not in self._templates:
            thinking = self.template_thinking(record)
            self._templates[key] = replace(thinking.template, block=thinking.block)
        return self._templates[key]

    def template_thinking(self, record: Mapping[str, Any]) -> TemplateThinking:
        """Return how the template of a record prints reasoning; every template is probed once."""
        key = _template_key(record)
        if key not in self._thinking:
            self._thinking[key] = TemplateThinking(self._plain_template(record))
        return self._thinking[key]

    def _plain_template(self, record: Mapping[str, Any]) -> ChatTemplate:
        template = chat_template_of(self.tokenizer, _tools(record))
        return replace(template, variables={**template.variables, **json.loads(_template_key(record)[1])})

    def profile(self, record: Mapping[str, Any]) -> TemplateProfile:
        """Return the profile of a record's template; every template is probed once."""
        return self._finder(record).profile

    def _finder(self, record: Mapping[str, Any]) -> TurnFinder:
        key = _template_key(record)
        if key not in self._finders:
            template = self.template(record)
            self._finders[key] = TurnFinder(template, self._special_tokens)
        return self._finders[key]

    def _render_text(self, text: str) -> Rendered:
        if self.train_on is not TrainOn.ALL:
            raise ValueError(
                f"plain text has no {self.train_on.value} part to train on; train on all, or give messages"
            )
        return Rendered(text, [Span(0, len(text))], not self._begins_with_bos(text), append_eos=True)

    def _render_pair(self, prompt: str, completion: str) -> Rendered:
        text = prompt + completion
        start = 0 if self.train_on is TrainOn.ALL else len(prompt)
        return Rendered(text, [Span(start, len(text))], not self._begins_with_bos(text), append_eos=True)

    def _begins_with_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(str(bos))

    def _render_chat(self, record: Mapping[str, Any]) -> Rendered:
        messages = _messages(record)
        _check_flags(messages, self.train_on)
        chat = self._chat(record)
        removed = tuple(chat.removed.values())
        if self.train_on is TrainOn.ALL:
            spans = [Span(0, len(chat.text))]
            return Rendered(chat.text, spans, not_printed=chat.lost, thinking_removed=removed)
        first_trained = len(record["prompt"]) if "prompt" in record else 0
        # a message whose reasoning is removed is not what the model generates
        generated = [dict(message, train=False) if i in chat.removed else message for i, message in enumerate(messages)]
        train_on = self.train_on
        if self.thinking == "drop":
            generated = messages
        elif chat.removed and train_on is TrainOn.COMPLETION and "prompt" in record:
            train_on = TrainOn.ASSISTANT
        text, turns = self._find(record, chat, _wanted(generated, first_trained, train_on))
        turns = [turn for turn in turns if turn.message >= first_trained]
        spans = _spans(text, turns, generated, train_on, is_completion="prompt" in record)
        return Rendered(text, spans, not_printed=chat.lost, thinking_removed=removed)

    def _unrolled(self, record: Mapping[str, Any]) -> list[Rendered]:
        """Render each trained message of a chat as it is generated: after the prompt that the template prints for it.

        Raises:
            ValueError: See `render`; or everything is to be trained, and not only what the model generates.
        """
        if self.train_on is TrainOn.ALL:
            raise ValueError(
                "thinking unroll makes one row of each answer, and train_on all trains the prompts, too; train on "
                "assistant, last_assistant or completion, or state thinking: keep"
            )
        messages = _messages(record)
        _check_flags(messages, self.train_on)
        first_trained = len(record["prompt"]) if "prompt" in record else 0
        if self.train_on is TrainOn.COMPLETION and not first_trained:
            raise ValueError(_NEEDS_COMPLETION)
        part = TrainOn.ASSISTANT if self.train_on is TrainOn.COMPLETION else self.train_on
        wanted = _wanted(messages, first_trained, part)
        if not wanted:
            return [self._render_chat(record)]
        rows = []
        for index in wanted:
            text, turns, chat = self._generated(record, index)
            weight = _weight(messages[index])
            spans = [Span(turn.start, turn.end, weight) for turn in turns if turn.end > turn.start]
            rows.append(Rendered(text, spans, not_printed=chat.lost, turn=index))
        removed = tuple(reasoning for index, reasoning in chat.removed.items() if index not in wanted)
        return [replace(rows[0], thinking_removed=removed), *rows[1:]]

    def _generated(self, record: Mapping[str, Any], index: int) -> tuple[str, list[Turn], _Printed]:
        """Return the prompt before a message with what the model generates, and the places of the latter in it."""
        chat = self._chat(record, index + 1)
        text, turns = self._find(record, chat, [index])
        turns = [turn for turn in turns if turn.message == index]
        try:
            prompt = self.template(record).render([chat.given[:index]], _tools(record), add_generation_prompt=True)[0]
        except ValueError:  # the template refuses the messages before the turn alone, such as none
            prompt = text[: turns[0].start]
        begin = turns[0].start
        anchor = self.profile(record).generation_prompt
        if self.template(record).marks_generation and anchor:
            # the marks of a template may begin before or after the generation prompt ends
            at = text.find(anchor, max(0, begin - len(anchor)), turns[-1].end)
            begin = at + len(anchor) if at >= 0 else begin
        shift = len(prompt) - begin
        moved = [turn._replace(start=max(turn.start, begin) + shift, end=turn.end + shift) for turn in turns]
        return prompt + text[begin : turns[-1].end], moved, chat

    def _find(self, record: Mapping[str, Any], chat: _Printed, wanted: Sequence[int]) -> tuple[str, list[Turn]]:
        text, turns = self._finder(record).find(chat.messages, _tools(record), chat.text, chat.marked, wanted)
        next_tokens = self.profile(record).next_tokens
        if not next_tokens or self.template(record).marks_generation:
            return text, turns
        return _with_next_tokens(text, turns, chat.messages, next_tokens)

    def _chat(self, record: Mapping[str, Any], stop: int | None = None) -> _Printed:
        """Render the first messages of a chat, or all of them, with the reasoning that `thinking` leaves.

        Raises:
            ValueError: The chat says something that its text does not contain, and `not_printed` is `fail`; or the
                template prints a list of parts as Python does, or a tool not at all.
        """
        template, tools, thinking = self.template(record), _tools(record), self.template_thinking(record)
        known = self._ahead.pop(id(record), None) if stop is None else None
        given, messages, removed = self._begun(record, stop) if known is None else known[1]
        text, marked = render_with_marks(template, messages, tools, ahead=None if known is None else known[2])
        _check_parts(record, text)
        _check_tools(record, text)
        lost = unprinted(template, messages, tools, text, marked)
        earlier = _with_lost_reasoning(lost, messages)
        if earlier and self.thinking in ("last", "unroll"):
            messages, removed = without_reasoning(messages, earlier)
            text, marked = render_with_marks(template, messages, tools)
            lost = unprinted(template, messages, tools, text, marked)
        detail = _described(lost, messages) if lost else ""
        if lost and self.not_printed == "fail":
            raise ValueError(f"{detail}; {self._way_out(thinking, is_earlier=bool(earlier))}")
        return _Printed(given, messages, text, marked, detail, removed)

    def _begun(self, record: Mapping[str, Any], stop: int | None = None) -> _Begun:
        """Return the first messages of a chat, or all of them, as the template takes them."""
        template, thinking = self.template(record), self.template_thinking(record)
        given = _prepared(template, record)[:stop]
        removed: dict[int, str] = {}
        if self.thinking == "drop":
            given, removed = without_reasoning(given, assistant_indices(given))
            given = thinking.with_empty_blocks(given)
        given = thinking.prepare(given)
        return _Begun(given, given, removed)

    def _way_out(self, thinking: TemplateThinking, *, is_earlier: bool) -> str:
        """Return what a user can do about a chat that says more than its template prints."""
        rest = (
            f"{_USE_ANOTHER}, set chat_template_kwargs if the template has a variable for it, or state "
            "not_printed: warn (train the row without it) or drop (leave the row out)"
        )
        if not is_earlier or self.thinking != "keep":
            return rest
        keeping = thinking.keeping_variable()
        set_it = f"set chat_template_kwargs to {json.dumps(keeping)}, with which it is printed; or " if keeping else ""
        return (
            f"{set_it}state thinking: unroll (a row for each answer, with its own reasoning) or last (remove it); or "
            f"{rest}"
        )


class _Begun(NamedTuple):
    """A chat before it is rendered; see `_Printed`."""

    given: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    removed: dict[int, str]


class _Printed(NamedTuple):
    """A chat as it is printed.

    Args:
        given: Its messages, in the form that the template reads.
        messages: The same without reasoning that is removed.
        text: The text.
        marked: The same with the places of what it says.
        lost: Description of what it says and its text does not contain.
        removed: Removed reasoning by the index of its message.
    """

    given: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    text: str
    marked: MarkedText | None
    lost: str
    removed: dict[int, str]


def _with_lost_reasoning(lost: list[Unprinted], messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the messages before the last answer whose reasoning, or some of it, is not printed."""
    last = max(assistant_indices(messages), default=0)
    found = {item.said.message for item in lost if item.said.message < last and item.said.path[0] != "tool_calls"}
    return sorted(index for index in found if has_reasoning(messages[index]))


def _with_next_tokens(
    text: str, turns: list[Turn], messages: Sequence[Mapping[str, Any]], next_tokens: Sequence[str]
) -> tuple[str, list[Turn]]:
    """Extend turns by the token that begins the next message, for a template that does not close turns itself.

    The token is appended to a chat that ends with the assistant's turn.
    """
    closed = []
    for turn in turns:
        if turn.end == len(text):
            text += next_tokens[-1 if messages[turn.message].get("tool_calls") else 0]
        token = next((token for token in next_tokens if text.startswith(token, turn.end)), "")
        closed.append(turn._replace(end=turn.end + len(token)))
    return text, closed


def _without_stop(answer: str, profile: TemplateProfile) -> str:
    """Return an answer without the token that ends its generation, and without what the template prints after it."""
    if profile.stop_token is None:
        token = next((token for token in profile.next_tokens if answer.endswith(token)), profile.terminator)
        return answer.removesuffix(token)
    closed = answer.rstrip()
    stop = next((token for token in (profile.stop_token, *profile.call_terminators) if closed.endswith(token)), None)
    return answer if stop is None else closed.removesuffix(stop)


def _wanted(messages: Sequence[Mapping[str, Any]], first_trained: int, train_on: TrainOn) -> list[int]:
    """Return the messages whose turns are trained, and so have to begin where generation begins."""
    indices = [index for index in assistant_indices(messages) if index >= first_trained]
    if train_on is TrainOn.COMPLETION:
        return indices[:1]
    if train_on is TrainOn.LAST_ASSISTANT:
        indices = indices[-1:]
    return [index for index in indices if _weight(messages[index]) > 0]


def _described(lost: list[Unprinted], messages: Sequence[Mapping[str, Any]]) -> str:
    first = lost[0]
    place = f"message {first.said.message} ({messages[first.said.message]['role']})"
    more = f" (the first of {len(lost)} such texts)" if len(lost) > 1 else ""
    if first.said.kind is Kind.NAME:
        return f"{place} calls {first.lost!r:.80}, and the chat template does not print the call{more}"
    return f"{place} says {first.lost!r:.80} ({first.said.place}), which the chat template does not print{more}"


def _spans(
    text: str, turns: list[Turn], messages: Sequence[Mapping[str, Any]], train_on: TrainOn, *, is_completion: bool
) -> list[Span]:
    if train_on is TrainOn.COMPLETION:
        if not is_completion:
            raise ValueError(_NEEDS_COMPLETION)
        return [Span(turns[0].start, len(text))] if turns else []
    if train_on is TrainOn.LAST_ASSISTANT and turns:
        turns = [turn for turn in turns if turn.message == turns[-1].message]
    spans = [Span(turn.start, turn.end, _weight(messages[turn.message])) for turn in turns]
    return [span for span in spans if span.weight > 0 and span.end > span.start]


def _weight(message: Mapping[str, Any]) -> float:
    return float(message.get("weight", 1.0)) if message.get("train", True) else 0.0


def _check_flags(messages: Sequence[Mapping[str, Any]], train_on: TrainOn) -> None:
    """Check that no message has a `train` or `weight` flag that would have no effect."""
    for index, message in enumerate(messages):
        flagged = message.get("train") is False or message.get("weight", 1.0) != 1.0
        if flagged and train_on in (TrainOn.ALL, TrainOn.COMPLETION):
            raise ValueError(
                f"message {index} has a train or weight flag, which train_on {train_on.value} does not look at"
            )
        if message["role"] != "assistant" and (message.get("train") or message.get("weight")):
            raise ValueError(f"message {index} by {message['role']} asks to be trained; only assistant turns can be")


def _prepared(template: ChatTemplate, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages as the template expects them.

    Raises:
        ValueError: The template would not print the tools.
    """
    if record.get("tools") and "tools" not in template.source:
        raise ValueError(f"the record has tools, and the chat template never prints them; {_USE_ANOTHER}")
    messages = _messages(record)
    has_calls = any(message.get("tool_calls") for message in messages)
    return template_messages(messages, arguments_as_text=has_calls and wants_text_arguments(template.source))


def _check_parts(record: Mapping[str, Any], text: str) -> None:
    """Check that the template does not print content in parts as a Python list."""
    for index, message in enumerate(_messages(record)):
        if isinstance(message["content"], list) and str(message["content"]) in text:
            kinds = ", ".join(sorted({str(part["type"]) for part in message["content"]}))
            raise ValueError(
                f"message {index} has content in parts ({kinds}), which the chat template does not know; give text, or "
                f"{_USE_ANOTHER.partition(' ')[2]}"
            )


def _check_tools(record: Mapping[str, Any], text: str) -> None:
    for tool in _tools(record) or ():
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise ValueError(f"the record has a tool {name!r}, which the chat template does not print; {_USE_ANOTHER}")


def _template_key(record: Mapping[str, Any]) -> tuple[bool, str]:
    return bool(record.get("tools")), record.get("chat_template_kwargs") or "{}"


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a record: its conversation, or its prompt and completion; none if it is text."""
    is_chat = "messages" in record or isinstance(record.get("completion"), list)
    return _messages(record) if is_chat else []


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return record["messages"] if "messages" in record else [*record["prompt"], *record["completion"]]


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    tools = record.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else list(tools)) if tools else None


def _name(record: Mapping[str, Any]) -> str:
    return f"row {record['id']}" if "id" in record else f"row {json.dumps(dict(record), default=str)[:80]}"


@functools.lru_cache(maxsize=8)
def _renderer(tokenizer: PreTrainedTokenizerBase, template: str, train_on: TrainOn) -> ChatRenderer:
    """Return a cached renderer; the template is part of the key because users change it on the tokenizer."""
    del template
    return ChatRenderer(tokenizer, train_on)


def render(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = TrainOn.ASSISTANT
) -> Rendered:
    """Render one record; `ChatRenderer` does the same for many.

    Args:
        record: A record, see `sft.data.records`.
        tokenizer: The tokenizer whose chat template is used.
        train_on: Part that the spans cover, see `ChatRenderer`.
    """
    key = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer)])
    return _renderer(tokenizer, key, TrainOn(train_on)).render(record)
