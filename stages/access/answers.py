"""Parts of an answer while it is generated: text, reasoning, and tool calls in the forms that chat templates print.

A tool call that can't be read, because its JSON is cut off or wrong, stays text: a client sees what the model wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
"""An event as `transformers.utils.chat_parsing.ResponseParser` has them, which `transformers serve` reads."""

Properties = Mapping[str, Mapping[str, Any]]
"""Name of each tool that is offered -> the schemas of its parameters."""

Call = tuple[str, str]
"""Name of the tool, and its arguments as JSON."""

_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_NAMED_ARGUMENTS = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*")


@dataclass(frozen=True)
class CallFormat:
    """How a family of models writes tool calls.

    Args:
        opening: Text before a call.
        closing: Text after it; None if it ends with the answer, a special token, or the next `opening`.
        read: Returns the calls of the text between them; None if it has none.
        inside: Special tokens within a call.
        at_start: Whether an answer that begins with `{` is a call, too.
    """

    opening: str
    closing: str | None
    read: Callable[[str, Properties], list[Call] | None]
    inside: tuple[str, ...] = ()
    at_start: bool = False


def _call(value: Any, key: str = "arguments") -> Call | None:
    """Return the call that a JSON object states; None if it does not."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or key not in value:
        return None
    arguments = value[key]
    if isinstance(arguments, str):
        return value["name"], arguments
    return (value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _all_calls(values: Sequence[Any]) -> list[Call] | None:
    calls = [_call(value) for value in values]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _read_hermes(text: str, tools: Properties) -> list[Call] | None:
    return _all_calls([json.loads(text)])


def _read_mistral(text: str, tools: Properties) -> list[Call] | None:
    """Read a list of calls, or names that are followed by their arguments."""
    if text.lstrip().startswith("["):
        return _all_calls(json.loads(text))
    calls, place = [], 0
    while text[place:].strip():
        named = _NAMED_ARGUMENTS.match(text, place)
        if named is None:
            return None
        arguments, place = json.JSONDecoder().raw_decode(text, named.end())
        calls.append({"name": named[1], "arguments": arguments})
    return _all_calls(calls)


def _read_llama3(text: str, tools: Properties) -> list[Call] | None:
    """Read objects with semicolons between them; without a name that is offered, they are an answer in JSON."""
    calls = []
    rest = text.strip("; \n")
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        call = _call(value, "parameters") or _call(value)
        if call is None or call[0] not in tools:
            return None
        calls.append(call)
        rest = rest[end:].lstrip("; \n")
    return calls or None


def _read_qwen3_coder(text: str, tools: Properties) -> list[Call] | None:
    """Read tags, whose values are text or JSON, as the schema of the parameter says."""
    found = _FUNCTION.fullmatch(text)
    if found is None:
        return None
    name, schemas = found[1], tools.get(found[1], {})
    arguments = {key: _typed(value, schemas.get(key)) for key, value in _PARAMETER.findall(found[2])}
    return [(name, json.dumps(arguments, ensure_ascii=False))]


def _typed(text: str, schema: Any) -> Any:
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


CALL_FORMATS: Mapping[str, CallFormat] = {
    "hermes": CallFormat("<tool_call>", "</tool_call>", _read_hermes),
    "qwen3_coder": CallFormat("<tool_call>", "</tool_call>", _read_qwen3_coder),
    "mistral": CallFormat("[TOOL_CALLS]", None, _read_mistral, inside=("[ARGS]", "[CALL_ID]")),
    "llama3_json": CallFormat("<|python_tag|>", None, _read_llama3, at_start=True),
}
"""Tool call formats by the names of vLLM's parsers."""

REASONING_MARKS: Mapping[str, tuple[str, str]] = {
    "qwen3": ("<think>", "</think>"),
    "deepseek_r1": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
}
"""Texts before and after the reasoning, by the names of vLLM's parsers."""

CONTENT, REASONING, CALL = "content", "reasoning_content", "tool_calls"


class AnswerParser:
    """Parser of an answer that arrives in pieces, used as `transformers.utils.chat_parsing.ResponseParser` is.

    Args:
        calls: Format of tool calls; None = they are text.
        reasoning: Texts before and after the reasoning; None = it is text.
        special: Texts of special tokens, which are no part of the text.
        prompt: The prompt, whose end may begin the reasoning.
        tools: Tools of the request, as OpenAI has them.
    """

    def __init__(
        self,
        calls: CallFormat | None,
        reasoning: tuple[str, str] | None,
        special: Collection[str],
        prompt: str = "",
        tools: Sequence[Any] = (),
    ) -> None:
        self.initial_events: list[Event] = []
        self._calls, self._reasoning, self._tools = calls, reasoning, properties_of(tools)
        inside = {*(calls.inside if calls else ()), *(reasoning or ())}
        self._dropped = frozenset(text for text in special if text and text not in inside)
        is_open = reasoning is not None and prompt.rstrip().endswith(reasoning[0])
        self._region = REASONING if is_open else CONTENT
        self._buffer = ""
        self._space, self._is_first, self._has_said = "", True, False
        self._has_moved = is_open  # reasoning or a call came before, and white space separates what follows from it
        self._opened, self._body = "", ""

    def feed(self, text: str) -> list[Event]:
        """Return the events of another piece of the answer."""
        self._buffer += text
        return list(self._read(is_last=False))

    def finalize(self) -> tuple[dict[str, Any], list[Event]]:
        """Return an empty message, as events have all, and the events of what was held back."""
        events = list(self._read(is_last=True))
        if self._region == CALL:
            events += self._end_call("")
        if self._space and self._region == CONTENT and not (self._has_moved and self._is_first):
            events.append(_chunk(CONTENT, self._space))
        return {}, events

    def _read(self, *, is_last: bool) -> Iterator[Event]:
        while self._buffer:
            marks = self._marks()
            place, mark = min(
                ((self._buffer.find(mark), mark) for mark in marks if mark in self._buffer), default=(-1, "")
            )
            if place < 0:
                held = 0 if is_last else _held(self._buffer, marks)
                end = len(self._buffer) - held
                text, self._buffer = self._buffer[:end], self._buffer[end:]
                yield from self._take(text)
                return
            text, self._buffer = self._buffer[:place], self._buffer[place + len(mark) :]
            yield from self._take(text)
            yield from self._pass(mark)

    def _marks(self) -> set[str]:
        """Return the texts that end or begin something where the parser is."""
        if self._region == CALL:
            assert self._calls is not None
            return {self._calls.closing} if self._calls.closing else {*self._dropped, self._calls.opening}
        marks = set(self._dropped)
        if self._reasoning is not None:
            marks.add(self._reasoning[self._region == REASONING])
        if self._calls is not None and self._region == CONTENT:
            marks.add(self._calls.opening)
        return marks

    def _take(self, text: str) -> Iterator[Event]:
        """Add text to the region. White space at its ends is held back, as it may separate it from the next."""
        if self._region == CALL:
            self._body += text
            return
        whole = self._space + text
        if self._is_first and self._has_moved:
            whole = whole.lstrip()
        bare = whole.rstrip()
        self._space = whole[len(bare) :]
        if not bare:
            return
        starts_call = self._calls is not None and self._calls.at_start and not self._has_said
        if starts_call and self._region == CONTENT and bare.lstrip().startswith("{"):
            self._region, self._opened, self._body, self._space = CALL, "", whole, ""
            return
        self._is_first = False
        self._has_said |= self._region == CONTENT
        yield _chunk(self._region, bare)

    def _pass(self, mark: str) -> Iterator[Event]:
        """Go on after a mark."""
        if self._region == CALL:
            yield from self._end_call(mark if mark not in self._dropped else "")
            if self._calls is None or mark != self._calls.opening:
                return
        if self._calls is not None and mark == self._calls.opening:
            self._region, self._opened, self._body = CALL, mark, ""
        elif self._reasoning is not None and mark in self._reasoning:
            self._move(REASONING if mark == self._reasoning[0] else CONTENT)

    def _move(self, region: str) -> None:
        self._region, self._space, self._is_first = region, "", True
        self._has_moved = True

    def _end_call(self, mark: str) -> Iterator[Event]:
        """Yield the calls of the body, or its text as the model wrote it if it can't be read."""
        assert self._calls is not None
        try:
            calls = self._calls.read(self._body, self._tools)
        except (ValueError, RecursionError):
            calls = None
        if calls is not None:
            for name, arguments in calls:
                function = {"name": name, "arguments": arguments}
                yield {"type": "region_close", "field": CALL, "value": {"type": "function", "function": function}}
            self._move(CONTENT)
            return
        text = self._space + self._opened + self._body + (mark if mark == self._calls.closing else "")
        self._region, self._space, self._is_first, self._has_said = CONTENT, "", False, True
        yield _chunk(CONTENT, text)


def _chunk(region: str, text: str) -> Event:
    return {"type": "region_chunk", "field": region, "text": text, "dirty": False}


def _held(text: str, marks: Collection[str]) -> int:
    """Return the length of the longest end of a text with which a mark may begin."""
    longest = max(map(len, marks), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((length for length in lengths if any(mark.startswith(text[-length:]) for mark in marks)), 0)


def properties_of(tools: Sequence[Any]) -> Properties:
    """Return the schemas of the parameters of each tool, by its name."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
    return {
        str(function.get("name")): (function.get("parameters") or {}).get("properties") or {}
        for function in functions
        if isinstance(function, Mapping)
    }
