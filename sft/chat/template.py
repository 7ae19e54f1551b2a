"""Chat templates: rendering of chats, and a profile of each template from a few probe conversations.

Templates are programs, so their properties are not derived from their source. Probe conversations show where the
generation prompt ends and which text closes an assistant turn; both are then searched for in every rendered chat.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from sft.common_prefix import common_prefix_length
from sft.untrusted.templates import render_each_in_child, render_in_child

GENERATION_MARK = re.compile(r"\{%-?\+?\s*generation\s*-?%\}")
# Words that occur in no template and that no template treats specially.
PROBE_QUESTION, PROBE_ANSWER = "Zyquestionprobe", "Zyanswerprobe"
_QUESTION, _ANSWER = {"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER}
PROBE_CHAT = [_QUESTION, _ANSWER]
_SECOND_QUESTION = {"role": "user", "content": "Zysecondquestion"}
_SECOND_ANSWER = {"role": "assistant", "content": "Zysecondanswer"}
_CALL_VALUE, _CALL_RESULT = "Zycallvalue", "Zycallresult"
_PROBE_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "zyprobe",
            "description": "A function.",
            "parameters": {"type": "object", "properties": {"zykey": {"type": "string", "description": "A text."}}},
        },
    }
]
_TRAINING_FLAGS = ("train", "weight")

Messages = Sequence[Mapping[str, Any]]


def template_messages(messages: Messages, *, arguments_as_text: bool = False) -> list[dict[str, Any]]:
    """Convert messages to what templates expect: no training flags, no nulls, and tool calls with ids.

    Args:
        messages: Messages as `sft.data.records.normalize` returns them.
        arguments_as_text: Keep tool-call arguments as JSON text; most templates expect an object.
    """
    result = []
    ids: list[str] = []
    for message in messages:
        plain = {key: item for key, item in message.items() if item is not None and key not in _TRAINING_FLAGS}
        if "tool_calls" in plain:
            calls = [_tool_call(call, number, arguments_as_text) for number, call in enumerate(plain["tool_calls"])]
            ids = [call["id"] for call in calls]
            plain["tool_calls"] = calls
        elif plain["role"] == "tool" and ids:
            answered = ids.pop(0)
            plain.setdefault("tool_call_id", answered)
        result.append(plain)
    return result


def _tool_call(call: Mapping[str, Any], number: int, arguments_as_text: bool) -> dict[str, Any]:
    """Add an id to a tool call and convert its arguments; some templates accept only ids of nine letters and digits."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str) and not arguments_as_text:
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            arguments = None
        if isinstance(arguments, dict):
            function["arguments"] = arguments
    return {"id": f"call{number:05d}", **call, "function": function}


class ReasoningBlock(Protocol):
    """Place for the reasoning of the last answer, see `sft.chat.thinking.Block`."""

    def hide(self, chat: Messages) -> tuple[Messages, str | None]:
        """Return the chat with a mark instead of the reasoning, and the reasoning."""

    def show(
        self, text: str, reasoning: str | None, ranges: Sequence[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Replace the mark in the rendered chat by the reasoning, and move ranges of characters with the text."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template with its variables.

    Args:
        source: Jinja source.
        variables: Special tokens by name, and the variables that a row defines.
        takes_text: Whether content may be text. Some templates of vision models print only lists of parts.
        block: Place for the reasoning of the last answer, if the template does not print it.
    """

    source: str
    variables: Mapping[str, Any]
    takes_text: bool = True
    block: ReasoningBlock | None = None

    @property
    def marks_generation(self) -> bool:
        """Whether the template marks what the assistant generates with `{% generation %}`."""
        return GENERATION_MARK.search(self.source) is not None

    def render(
        self, chats: Sequence[Messages], tools: list[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> list[str]:
        """Render several chats in transformers' sandbox, with the same result as `apply_chat_template`.

        Raises:
            ValueError: The template refused a chat, or is not valid Jinja (`TemplateSourceError`).
        """
        return self._render(chats, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, chat: Messages, tools: list[Any] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """Render one chat; return the text and the character ranges inside the template's generation marks."""
        texts, ranges = self._render([chat], tools, return_assistant_tokens_mask=True)
        return texts[0], ranges[0]

    def render_each(self, chats: Sequence[tuple[Messages, list[Any] | None]]) -> list[str | None]:
        """Render chats, each with its own tools, faster than one after the other.

        Returns:
            The texts that `render` returns; None for a chat for which it raises an error.
        """
        hidden = [(chat, None) if self.block is None else self.block.hide(chat) for chat, _ in chats]
        conversations = [
            (chat if self.takes_text else in_parts(chat), tools)
            for (chat, _), (_, tools) in zip(hidden, chats, strict=True)
        ]
        texts = render_each_in_child(self.source, conversations, self.variables)
        if self.block is None:
            return texts
        return [
            None if text is None else self.block.show(text, reasoning, [])[0]
            for text, (_, reasoning) in zip(texts, hidden, strict=True)
        ]

    def _render(
        self, chats: Sequence[Messages], tools: list[Any] | None, **options: bool
    ) -> tuple[list[str], list[Any]]:
        hidden = [(chat, None) if self.block is None else self.block.hide(chat) for chat in chats]
        conversations = [chat if self.takes_text else in_parts(chat) for chat, _ in hidden]
        texts, ranges = render_in_child(self.source, conversations, tools, options, self.variables)
        if self.block is not None:
            spans = ranges if options.get("return_assistant_tokens_mask") else [[]] * len(texts)
            reasoning = [text for _, text in hidden]
            shown = [self.block.show(*item) for item in zip(texts, reasoning, spans, strict=True)]
            texts, ranges = [text for text, _ in shown], [moved for _, moved in shown]
        return texts, ranges


def in_parts(messages: Messages) -> list[dict[str, Any]]:
    """Convert the text of messages to a list with one part, `{"type": "text", "text": ...}`, or none if it is empty."""
    return [{**message, "content": _parts(message.get("content"))} for message in messages]


def _parts(content: Any) -> Any:
    if not isinstance(content, str):
        return content
    return [{"type": "text", "text": content}] if content else []


def prints_probe(template: ChatTemplate, messages: Messages) -> bool:
    """Return whether a template prints the texts of the probe, rather than nothing or the repr of their parts."""
    try:
        text = template.render([messages])[0]
    except ValueError:
        return False
    return PROBE_QUESTION in text and PROBE_ANSWER in text and "'text'" not in text and '"text"' not in text


@functools.lru_cache(maxsize=64)
def wants_text_arguments(source: str) -> bool:
    """Return whether a template accepts tool-call arguments only as text, while most templates expect an object."""
    template = ChatTemplate(source, {"bos_token": "", "eos_token": ""})
    call = {"type": "function", "function": {"name": PROBE_ANSWER, "arguments": '{"x": 1}'}}
    chat: Messages = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    accepted = []
    for as_text in (False, True):
        try:
            template.render([template_messages(chat, arguments_as_text=as_text)])
        except ValueError:
            accepted.append(False)
        else:
            accepted.append(True)
    return accepted == [False, True]


def chat_template_of(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> ChatTemplate:
    """Return the template that a tokenizer uses for chats with or without tools.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so conversations cannot be rendered: name "
            "a format (chatml, llama3, ...) or a Jinja file, or give the data as text"
        )
    template = ChatTemplate(tokenizer.get_chat_template(None, tools), dict(tokenizer.special_tokens_map))
    only_parts = not prints_probe(template, PROBE_CHAT) and prints_probe(template, in_parts(PROBE_CHAT))
    return replace(template, takes_text=not only_parts)


@dataclass(frozen=True)
class TemplateProfile:
    """Properties of a template that a few probe conversations show.

    Args:
        generation_prompt: Text that `add_generation_prompt` adds, e.g. `<|im_start|>assistant\\n`; empty if none.
        after_question: All text between the last question and the point where generation begins.
        header: Part of the generation prompt that a conversation has before an answer. It is shorter than the prompt
            if the prompt also begins the answer, for example with `<think>`.
        lead: Text between the generation prompt and the answer, e.g. the space in `[/INST] answer`.
        tail: All text after a final answer.
        terminators: Texts that close an answer, e.g. `<|im_end|>`: first that of a final answer, then that of an inner
            answer if it differs. In a template without special tokens, the entire tail closes a final answer.
        stop_token: Special token that closes a final answer; None if there is none.
        call_terminators: Special tokens that close a turn with tool calls; empty if the template takes no calls, or
            closes them without a special token.
        next_tokens: For a template that does not close turns, the special tokens that begin the next question and the
            result of a call. Generation ends with them. Empty if turns are closed, or nothing special follows.
    """

    generation_prompt: str
    after_question: str
    header: str
    lead: str
    tail: str
    terminators: tuple[str, ...]
    stop_token: str | None
    call_terminators: tuple[str, ...] = ()
    next_tokens: tuple[str, ...] = ()

    @property
    def terminator(self) -> str:
        """Text that closes a final answer."""
        return self.terminators[0]

    @classmethod
    def probe(cls, template: ChatTemplate, special_tokens: Sequence[str]) -> TemplateProfile:
        """Create the profile of a template from its probe conversations.

        Args:
            template: The template.
            special_tokens: Texts of all added tokens, which the tokenizer never splits.

        Raises:
            ValueError: The template does not render a plain question and answer.
        """
        asked, answered = template.render([[_QUESTION], [_QUESTION, _ANSWER]])
        prompt = template.render([[_QUESTION]], add_generation_prompt=True)[0]
        if PROBE_QUESTION not in prompt or PROBE_ANSWER not in answered:
            raise ValueError(f"the chat template does not print a plain question and its answer, but {answered!r:.200}")
        before, _, tail = answered.partition(PROBE_ANSWER)
        terminators, stop_token = _terminators(tail, _inner_tail(template), special_tokens)
        return cls(
            generation_prompt=prompt[len(asked) :] if prompt.startswith(asked) else "",
            after_question=prompt[prompt.rfind(PROBE_QUESTION) + len(PROBE_QUESTION) :],
            header=before[len(asked) : common_prefix_length(prompt, before)] if prompt.startswith(asked) else "",
            lead=before[len(prompt) :] if before.startswith(prompt) else "",
            tail=tail,
            terminators=terminators,
            stop_token=stop_token,
            call_terminators=_call_terminators(template, stop_token, special_tokens),
            next_tokens=() if tail or stop_token is not None else _next_tokens(template, special_tokens),
        )


def _inner_tail(template: ChatTemplate) -> tuple[str, bool]:
    """Return the text that follows an answer inside a conversation, and whether it is certain to belong to the answer.

    Text that precedes both a question and another answer belongs to the answer before it. If the template refuses two
    answers in a row, only the text before a question is known, and its end may belong to the question.
    """
    try:
        text = template.render([[_QUESTION, _ANSWER, _SECOND_QUESTION, _SECOND_ANSWER]])[0]
    except ValueError:
        return "", False
    before_question = text.partition(PROBE_ANSWER)[2].partition(_SECOND_QUESTION["content"])[0]
    try:
        text = template.render([[_QUESTION, _ANSWER, _SECOND_ANSWER]])[0]
    except ValueError:
        return before_question, False
    before_answer = text.partition(PROBE_ANSWER)[2].partition(_SECOND_ANSWER["content"])[0]
    return before_question[: common_prefix_length(before_question, before_answer)], True


def _terminators(
    tail: str, inner: tuple[str, bool], special_tokens: Sequence[str]
) -> tuple[tuple[str, ...], str | None]:
    """Return the texts that close a final and an inner answer, and the special token that closes a final one.

    Args:
        tail: Text after a final answer.
        inner: Result of `_inner_tail`.
        special_tokens: Texts of all added tokens.
    """
    inner_tail, is_certain = inner
    shared = _special_tokens_in(tail[: common_prefix_length(tail, inner_tail)], special_tokens)
    own = _special_tokens_in(tail, special_tokens)
    if shared:
        # several tokens may close a turn together; those that only a final answer has end the conversation
        end, token = shared[-1]
        return (tail[:end],), token
    inside = _special_tokens_in(inner_tail, special_tokens) if is_certain else []
    inner_terminator = (inner_tail[: inside[0][0]],) if inside else ()
    if own:
        end, token = own[0]
        return (tail[:end], *inner_terminator), token
    return (tail, *inner_terminator), None


def _call_terminators(template: ChatTemplate, stop_token: str | None, special_tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the special tokens that close a turn with a tool call, at the end of a chat and before its result."""
    call = {"type": "function", "function": {"name": "zyprobe", "arguments": json.dumps({"zykey": _CALL_VALUE})}}
    asks: Messages = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "name": "zyprobe", "content": _CALL_RESULT}
    chats = [asks, [*asks, result], [*asks, result, _SECOND_ANSWER]]
    as_text = wants_text_arguments(template.source)
    tails: list[str] = []
    for chat in chats:
        try:
            text = template.render([template_messages(chat, arguments_as_text=as_text)], _PROBE_TOOLS)[0]
        except ValueError:
            continue
        if _CALL_VALUE in text:
            tails.append(text.rpartition(_CALL_VALUE)[2].partition(_CALL_RESULT)[0])
    if not tails:
        return ()
    final, *inner = tails
    shared = final[: min((common_prefix_length(final, tail) for tail in inner), default=len(final))]
    tokens = [token for _, token in _special_tokens_in(shared, special_tokens)]
    if stop_token in tokens:
        return (str(stop_token),)
    if tokens:
        return (tokens[-1],)
    own = [token for _, token in _special_tokens_in(final, special_tokens)]
    if not own:
        return ()
    inside = [token for tail in inner[:1] for _, token in _special_tokens_in(tail, special_tokens)]
    return tuple(dict.fromkeys([str(stop_token) if stop_token in own else own[-1], *inside[:1]]))


def _next_tokens(template: ChatTemplate, special_tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the special tokens that follow an answer before a question, and a call before its result."""
    chat: Messages = [_QUESTION, _ANSWER, _SECOND_QUESTION, _SECOND_ANSWER]
    call = {"type": "function", "function": {"name": "zyprobe", "arguments": json.dumps({"zykey": _CALL_VALUE})}}
    asks: Messages = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "name": "zyprobe", "content": _CALL_RESULT}
    as_text = wants_text_arguments(template.source)
    try:
        after = template.render([chat])[0].partition(PROBE_ANSWER)[2]
    except ValueError:
        return ()
    first = _special_tokens_in(after.partition(_SECOND_QUESTION["content"])[0], special_tokens)
    if not first or first[0][0] != len(first[0][1]):  # something else follows the answer
        return ()
    try:
        chats = [template_messages(chat, arguments_as_text=as_text) for chat in (asks, [*asks, result])]
        called, answered = template.render(chats, _PROBE_TOOLS)
    except ValueError:
        return (first[0][1],)
    second = _special_tokens_in(answered[len(called) :], special_tokens) if answered.startswith(called) else []
    follows = bool(second) and second[0][0] == len(second[0][1])
    return tuple(dict.fromkeys([first[0][1], *([second[0][1]] if follows else [])]))


def _special_tokens_in(text: str, special_tokens: Sequence[str]) -> list[tuple[int, str]]:
    """Return end and text of all special tokens in a text, in order; the longest if several begin at one place."""
    if not special_tokens:
        return []
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return [(match.end(), match.group()) for match in re.finditer("|".join(map(re.escape, longest_first)), text)]


def special_token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of all added and special tokens of a tokenizer, except those of whitespace only."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return sorted(text for text in texts if text.strip())
