"""Conversations and tools in the forms of other projects, converted to OpenAI's messages and tools.

| form | what is converted |
|---|---|
| Anthropic | parts `tool_use`, `tool_result`, `thinking`, images with a `source`; tools with an `input_schema` |
| Gemini | `parts` with `text`, `thought`, `functionCall`, `functionResponse`, `inlineData`; `functionDeclarations` |
| LLaMA-Factory v1 | parts with a `value`: `text`, `reasoning`, `tool_call`, `tools`, images |
| OpenAI Responses | items `function_call`, `function_call_output`, `reasoning`; parts `input_text`, `output_text` |
| Vercel AI SDK | parts `tool-call`, `tool-result`, `reasoning` |
| pairs | `{"human": ..., "assistant": ...}`, turns such as `{"user": ...}` or `["user", ...]`, texts by turns |

Sources: the API references of Anthropic (Messages), Google (Content of the Gemini API) and OpenAI (Responses), and the
data documentation of LLaMA-Factory, ms-swift and the Vercel AI SDK.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sft.data.messages import (
    MEDIA,
    REASONING_KEY,
    ROLES,
    TEXT_KEYS,
    TRAIN_KEYS,
    WEIGHT_KEYS,
    RowError,
    described,
    first_of,
    is_messages,
    role_of,
)

_TEXT = ("text", "input_text", "output_text", "refusal")
_REASONING = ("reasoning", "thinking", "thought", "reasoning_text")
_UNREADABLE = ("redacted_thinking",)
"""Types of encrypted parts, which say nothing that could be trained."""
_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use", "tool_call", "tool-call", "function_call", "functionCall")
_RESULTS = (
    "tool_result",
    "mcp_tool_result",
    "web_search_tool_result",
    "tool-result",
    "function_call_output",
    "functionResponse",
    "function_response",
)
_SCHEMA_TYPES = ("STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL")
_ORDER = ("system", "user", "assistant", "function_call", "tool")


class Conversation(NamedTuple):
    """A conversation in OpenAI's form.

    Args:
        messages: The messages, or the given value if it is not a list of messages.
        tools: Tools that were given as a part of a message; None if there are none.
    """

    messages: Any
    tools: Any = None


def openai_messages(value: Any) -> Conversation:
    """Convert a conversation to OpenAI's messages, as far as it has another form.

    Args:
        value: A list of messages, or its JSON text. Anything else is returned as it is.

    Raises:
        RowError: A part of a message has an unknown type, or no text.
    """
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return Conversation(value)
        read = openai_messages(parsed) if isinstance(parsed, list) else Conversation(parsed)
        return Conversation(json.dumps(read.messages, ensure_ascii=False), read.tools)
    value = _from_lists(value)
    if not is_messages(value) or not all(isinstance(message, Mapping) for message in value):
        return Conversation(value)
    tools: list[Any] = []
    result: list[Mapping[str, Any]] = []
    reasoning: list[str] = []
    for index, message in enumerate(value):
        for converted in _converted(message, index, tools):
            role = str(role_of(converted)[1]).strip().lower()
            if converted.keys() == {"reasoning_content"}:
                reasoning.append(converted["reasoning_content"])
            elif reasoning and ROLES.get(role) in ("assistant", "function_call"):
                result.append({**converted, "reasoning_content": "\n\n".join(reasoning)})
                reasoning.clear()
            else:
                result.append(converted)
    return Conversation(result, tools[0] if len(tools) == 1 else tools or None)


def _from_lists(value: Any) -> Any:
    """Return turns that are texts by turns, or pairs of role and text, as messages; any other value as it is."""
    if not is_messages(value) or not value:
        return value
    if len(value) % 2 == 0 and all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(value)]
    are_pairs = all(
        is_messages(turn) and len(turn) == 2 and all(isinstance(part, str) for part in turn) for turn in value
    )
    if are_pairs and all(role.strip().lower() in ROLES for role, _ in value):
        return [{"role": role, "content": text} for role, text in value]
    return value


def _converted(message: Mapping[str, Any], index: int, tools: list[Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the messages of OpenAI that a message is converted to; append tools that it offers to `tools`."""
    key, role = role_of(message)
    if message.get("type") == "message":  # an item of OpenAI's Responses
        message = {other: item for other, item in message.items() if other not in ("type", "status")}
    if role is None and message.get("parts") is not None:
        role = "user"  # as Gemini reads contents without a role
    if role is None:
        yield from _without_role(message)
        return
    name, content = first_of(message, TEXT_KEYS)
    if isinstance(content, str):
        yield message
        return
    if content is None and isinstance(message.get("refusal"), str):
        yield {**{key: item for key, item in message.items() if key != "refusal"}, "content": message["refusal"]}
        return
    parts = [content] if name == "parts" and isinstance(content, Mapping) else content
    if name == "parts" and is_messages(parts):
        parts = [{"text": part} if isinstance(part, str) else part for part in parts]
    if not _has_parts(parts, role):
        yield message
        return
    extras = {other: item for other, item in message.items() if other not in (key, name, "tool_calls")}
    calls = message.get("tool_calls") or []
    if not is_messages(calls):
        raise RowError("bad_tool_call", f"tool_calls of message {index} are {described(calls)}, a list is needed")
    yield from _of_parts(parts, extras, role, index, calls, tools)


def _has_parts(content: Any, role: Any) -> bool:
    """Return whether a content is a list of parts, rather than data that a tool returned."""
    if not is_messages(content) or not content or not all(isinstance(part, Mapping) for part in content):
        return False
    kinds = [_kind(part) for part in content]
    if ROLES.get(str(role).strip().lower()) == "tool":
        return all(kind in (*_TEXT, *_RESULTS, *MEDIA) for kind in kinds)
    return all(kind is not None for kind in kinds)


def _kind(part: Mapping[str, Any]) -> str | None:
    """Return the type of a part; Gemini's have none, and are told by their keys."""
    if isinstance(part.get("type"), str):
        return str(part["type"])
    for key in ("functionCall", "function_call", "functionResponse", "function_response"):
        if part.get(key) is not None:
            return key
    if part.get("inlineData", part.get("inline_data")) or part.get("fileData", part.get("file_data")):
        return "inlineData"
    if isinstance(part.get("text"), str):
        return "thought" if part.get("thought") is True else "text"
    return None


class _Segment:
    """What a message says between two results of tools."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self.calls: list[Any] = []
        self.reasoning: list[str] = []

    def messages(self, role: Any, extras: Mapping[str, Any], *, is_only: bool) -> Iterator[dict[str, Any]]:
        """Yield the segment as a message; nothing if it is empty and there are others."""
        if not (self.parts or self.calls or self.reasoning or is_only):
            return
        are_texts = all(part["type"] == "text" for part in self.parts)
        content: Any = "".join(part["text"] for part in self.parts) if are_texts else self.parts
        reasoning = {"reasoning_content": "\n\n".join(self.reasoning)} if self.reasoning else {}
        calls = {"tool_calls": self.calls} if self.calls else {}
        yield {"role": role, "content": content, **extras, **reasoning, **calls}


def _of_parts(
    parts: Sequence[Mapping[str, Any]],
    extras: Mapping[str, Any],
    role: Any,
    index: int,
    calls: Sequence[Any],
    tools: list[Any],
) -> Iterator[dict[str, Any]]:
    """Yield the messages of a message with parts: results of tools are messages of their own."""
    segment, num_results, has_tools = _Segment(), 0, False
    flags = {key: extras[key] for key in (*TRAIN_KEYS, *WEIGHT_KEYS) if extras.get(key) is not None}
    for given in parts:
        part = {key: item for key, item in given.items() if item is not None}
        kind = _kind(part) or ""
        if kind in _RESULTS:
            yield from segment.messages(role, extras, is_only=False)
            segment, num_results = _Segment(), num_results + 1
            yield {"role": "tool", **flags, **_result(part, kind)}
        elif kind in _CALLS:
            segment.calls += _calls_of(part, kind, index)
        elif kind == "tools":
            has_tools = True
            tools.append(part.get("value", part.get("tools")))
        elif kind in _TEXT:
            segment.parts.append({"type": "text", "text": _text_of(part, kind, index)})
        elif kind in _REASONING and isinstance(_reasoning_of(part), str):
            if segment.parts or segment.calls:
                segment.parts.append({"type": "thinking", "thinking": _reasoning_of(part)})
            else:
                segment.reasoning.append(_reasoning_of(part))
        elif kind not in _UNREADABLE:
            segment.parts.append(_media(part, kind, index))
    segment.calls = [*calls, *segment.calls]
    if not (has_tools and not segment.parts):  # a system message that only lists the tools says nothing
        yield from segment.messages(role, extras, is_only=num_results == 0)


def _text_of(part: Mapping[str, Any], kind: str, index: int) -> str:
    key, text = first_of(part, ("text", "value", "content", "refusal"))
    if isinstance(text, str):
        return text
    others = sorted(set(part) - {"type", "cache_control", "annotations", "citations", "logprobs"})
    if not others:
        return ""
    what = f"{key} {text!r:.60}" if key else f"{', '.join(map(repr, others))} and no text"
    raise RowError(
        "content_not_text", f"message {index} has a part of type {kind!r} with {what}; write its text as text"
    )


def _reasoning_of(part: Mapping[str, Any]) -> Any:
    value = first_of(part, ("thinking", "reasoning", "text", "value", "content", "summary"))[1]
    return value if isinstance(value, str) else None


def _calls_of(part: Mapping[str, Any], kind: str, index: int) -> list[Any]:
    """Return the calls of a part, as OpenAI writes them."""
    if kind in ("functionCall", "function_call") and isinstance(part.get(kind), Mapping):
        part = part[kind]
    if "value" in part:  # LLaMA-Factory: JSON text of a call, or of a list of them
        value = part["value"]
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise RowError(
                "bad_tool_call", f"the function call in message {index} is text, but not JSON ({error}): {value!r:.80}"
            ) from error
        return list(value) if isinstance(value, list) else [value]
    name = first_of(part, ("name", "toolName"))[1]
    arguments = first_of(part, ("arguments", "input", "args", "parameters"))[1]
    call = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    number = first_of(part, ("call_id", "id", "toolCallId", "tool_call_id"))[1]
    return [call if number is None else {"id": number, **call}]


def _result(part: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the content, and as far as they are given id and name, of a tool's result."""
    if kind in ("functionResponse", "function_response"):
        part = part.get(kind) or {}
    number = first_of(part, ("tool_use_id", "call_id", "toolCallId", "tool_call_id", "id"))[1]
    name = first_of(part, ("name", "toolName"))[1]
    content = first_of(part, ("content", "output", "result", "response", "value", "text"))[1]
    result: dict[str, Any] = {"content": _result_text(content)}
    return {
        **result,
        **({} if number is None else {"tool_call_id": number}),
        **({} if name is None else {"name": name}),
    }


def _result_text(content: Any) -> Any:
    """Return the content of a tool's result as text, or as parts if it has images."""
    if isinstance(content, Mapping) and content.keys() == {"type", "value"}:  # of the Vercel AI SDK
        content = content["value"]
    if content is None or isinstance(content, str):
        return content or ""
    if _has_parts(content, "tool"):
        parts = [
            {"type": "text", "text": part.get("text", "")}
            if _kind(part) in _TEXT
            else _media(part, str(_kind(part)), 0)
            for part in content
        ]
        are_texts = all(part["type"] == "text" and isinstance(part["text"], str) for part in parts)
        return "".join(part["text"] for part in parts) if are_texts else parts
    return json.dumps(content, ensure_ascii=False)


def _media(part: dict[str, Any], kind: str, index: int) -> dict[str, Any]:
    """Return an image or other media as a part that `sft.vision` reads.

    Raises:
        RowError: The type of the part is unknown.
    """
    if kind == "inlineData":
        data = first_of(part, ("inlineData", "inline_data", "fileData", "file_data"))[1]
        mime = str(first_of(data, ("mimeType", "mime_type"))[1] or "") if isinstance(data, Mapping) else ""
        kind, source = mime.partition("/")[0], data if isinstance(data, Mapping) else {}
        url = first_of(source, ("fileUri", "file_uri"))[1] or f"data:{mime};base64,{source.get('data', '')}"
        part = {"type": kind, kind: url}
    elif kind == "image" and isinstance(part.get("source"), Mapping):
        source = part["source"]
        url = source.get("url") or f"data:{source.get('media_type', '')};base64,{source.get('data', '')}"
        part = {"type": "image", "image": url}
    elif kind in MEDIA and "value" in part:
        part = {"type": kind, kind: part["value"]}
    if kind not in MEDIA and not REASONING_KEY.search(kind):
        raise RowError(
            "content_not_text",
            f"message {index} has a part of type {kind!r} with {sorted(set(part) - {'type'})}; known are text, "
            "reasoning, tool_call, tool_use, tool_result, tools and image",
        )
    return part


def _without_role(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the messages of an item of OpenAI's Responses, or of turns whose keys are the roles."""
    kind = message.get("type")
    if kind == "function_call" and "name" in message:
        (call,) = _calls_of({key: item for key, item in message.items() if key != "id"}, "", 0)
        yield {"role": "function_call", "content": [call]}
    elif kind == "function_call_output":
        yield {"role": "tool", **_result({key: item for key, item in message.items() if key != "id"}, "")}
    elif kind == "reasoning":
        texts = [part.get("text") for part in message.get("content") or message.get("summary") or ()]
        yield {"reasoning_content": "\n\n".join(text for text in texts if isinstance(text, str))}
    else:
        roles = {key: ROLES.get(key.strip().lower()) for key, item in message.items() if item is not None}
        if not roles or not all(roles.values()):
            yield message
            return
        for key in sorted(roles, key=lambda key: _ORDER.index(str(roles[key]))):
            yield {"role": key, "content": message[key]}


def openai_tools(value: Any) -> Any:
    """Convert tools of Anthropic, Gemini and OpenAI's Responses to OpenAI's, as far as they have another form.

    Args:
        value: A list of tools or of their JSON texts, or the JSON text of the list. Anything else is returned as
            it is.
    """
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if parsed is None:
            return []
        return json.dumps(openai_tools(parsed), ensure_ascii=False) if isinstance(parsed, (list, dict)) else value
    if isinstance(value, Mapping):
        value = [value]
    return [tool for given in value for tool in _tools(given)] if is_messages(value) else value


def _tools(tool: Any) -> list[Any]:
    if isinstance(tool, str):
        converted = openai_tools(tool)
        try:
            return [json.dumps(each, ensure_ascii=False) for each in json.loads(converted)]
        except (ValueError, RecursionError, TypeError):
            return [tool]
    if not isinstance(tool, Mapping):
        return [tool]
    declared = first_of(tool, ("functionDeclarations", "function_declarations"))[1]
    if is_messages(declared):
        return [_declared(each) for each in declared]
    if isinstance(tool.get("input_schema"), Mapping) and "function" not in tool:
        kept = {key: item for key, item in tool.items() if key not in ("input_schema", "type", "cache_control")}
        return [{**kept, "parameters": tool["input_schema"]}]
    if tool.get("type") == "function" and "name" in tool and "function" not in tool:
        return [{key: item for key, item in tool.items() if key != "type"}]
    return [tool]


def _declared(tool: Any) -> Any:
    """Return a declaration of Gemini as a function; its schemas write types in capitals."""
    if not isinstance(tool, Mapping):
        return tool
    schema = first_of(tool, ("parameters", "parametersJsonSchema", "parameters_json_schema"))[1]
    kept = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return kept if schema is None else {**kept, "parameters": _with_small_types(schema)}


def _with_small_types(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {
            key: item.lower() if key == "type" and item in _SCHEMA_TYPES else _with_small_types(item)
            for key, item in schema.items()
        }
    return [_with_small_types(item) for item in schema] if isinstance(schema, list) else schema


def plain_text(value: Any) -> Any:
    """Return the text of a system message that is given as parts; any other value as it is."""
    if isinstance(value, Mapping):
        value = first_of(value, TEXT_KEYS)[1]
    if isinstance(value, Mapping):
        value = [value]
    if is_messages(value) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    return value
