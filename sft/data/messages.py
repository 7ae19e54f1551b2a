"""Conversations: convert roles and tool calls of several conventions to one, and validate the result.

The input may be OpenAI messages (`role`, `content`, `tool_calls`) or ShareGPT turns (`from`, `value`; tool use as the
roles `function_call` and `observation`). Content may be a list of parts (`[{"type": "text", "text": ...}]`). Forms of
other projects are converted to these before (`sft.data.dialects`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}

ROLE_KEYS = ("role", "from", "author")
"""Keys of a message that say who speaks."""
TEXT_KEYS = ("content", "value", "parts", "text")
"""Keys of a message that hold what is said."""
REASONING_KEY = re.compile(r"reason|think|thought|rationale|^analysis$|chain_of|^cot$")
"""Keys of a message, types of a part, and keys of a part that hold reasoning."""

TRAIN_KEYS = ("train", "loss", "train_on", "trainable", "training")
"""Keys of a message that say whether it is trained: ours, and those of other projects."""
WEIGHT_KEYS = ("weight", "loss_weight", "loss_scale")
"""Keys of a message that weight its loss: ours, and those of other projects."""

IMAGE_COLUMNS = ("images", "image")
"""Columns that contain the images of a row."""

IMAGE_PARTS = ("image", "image_url", "input_image")
"""Types of content parts that are images."""

MEDIA = (*IMAGE_PARTS, "video", "video_url", "input_video", "audio", "audio_url", "input_audio")
"""Types of content parts that are not text."""

# The roles that the error for an unknown role suggests; the other keys of ROLES are accepted too.
MAIN_ROLES = "system, user, assistant or tool"


class RowError(ValueError):
    """A row that cannot be converted to a record.

    Args:
        reason: Short code, the same for all rows with this fault.
        detail: What was found and what is required.
        mapping: Names in the data and what they are here, if the row could be read with them: keys of a message under
            `message_keys`, roles under `roles`.
    """

    def __init__(self, reason: str, detail: str, mapping: Mapping[str, Mapping[str, str]] | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.mapping = mapping or {}


class Problem(NamedTuple):
    """A fault of a record: a short code, and a text with the place and the value."""

    reason: str
    detail: str


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages rather than text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def normalize_messages(value: Any, *, prune_nulls: bool = False) -> list[dict[str, Any]]:
    """Convert a conversation to messages with the roles system, user, assistant and tool.

    Args:
        value: A list of messages or turns, or its JSON text (CSV cells hold text).
        prune_nulls: Remove keys with null values from tool-call arguments.

    Raises:
        RowError: The value is not a conversation, a role or the key of a text is unknown, content is not text, or a
            tool call has no name.
    """
    if isinstance(value, str):
        value = _parse(value, "bad_messages", "the conversation")
        prune_nulls = False  # Arrow adds no null to a text
    if not is_messages(value) or not all(isinstance(message, Mapping) for message in value):
        raise RowError("bad_messages", f"a list of messages is needed, not {described(value)}")
    if not value:
        raise RowError("no_messages", "the conversation has no message")
    result: list[dict[str, Any]] = []
    for index, given in enumerate(value):
        message = _message(given, index, prune_nulls)
        if not (result and _is_call(given) and _join_calls(result[-1], message)):
            result.append(message)
    return result


def _is_call(message: Mapping[str, Any]) -> bool:
    return ROLES.get(str(role_of(message)[1]).strip().lower()) == "function_call"


def _join_calls(message: dict[str, Any], following: Mapping[str, Any]) -> bool:
    """Add the calls of a message of the role `function_call` to the answer or the calls before it, if they fit."""
    extras = {key: item for key, item in following.items() if key not in ("role", "content", "tool_calls")}
    if message["role"] != "assistant" or any(message.get(key) != item for key, item in extras.items()):
        return False
    if any(message.get(flag) != following.get(flag) for flag in ("train", "weight")):
        return False
    message["tool_calls"] = [*message.get("tool_calls", ()), *following["tool_calls"]]
    return True


def first_of(values: Any, keys: Sequence[str]) -> tuple[str | None, Any]:
    """Return the first of some keys that has a value other than null, and the value; texts that are empty come last."""
    given = [(key, values[key]) for key in keys if values.get(key) is not None]
    return next((pair for pair in given if pair[1] not in ("", [])), given[0] if given else (None, None))


def role_of(message: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return the key of a message that says who speaks, and its value."""
    return first_of(message, ROLE_KEYS)


def _parse(text: str, reason: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise RowError(reason, f"{what} is text, and its JSON is nested too deeply: {text!r:.80}") from None
    except ValueError as error:  # also a number of thousands of digits
        raise RowError(reason, f"{what} is text, but not JSON ({error}): {text!r:.80}") from error


def _message(message: Mapping[str, Any], index: int, prune_nulls: bool) -> dict[str, Any]:
    role_key, given = role_of(message)
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise _unknown_role(message, given, index)
    text_key, content = first_of(message, TEXT_KEYS)
    calls = message.get("tool_calls") or _former_call(message, index)
    thought = None
    if role == "function_call":
        thought, content = _thought_before(content)
        role, calls, content = "assistant", _calls_of_text(content, index), None
    if not calls:
        _check_text_key(message, role, content, index)
        if content is None and any(REASONING_KEY.search(key) and item for key, item in message.items()):
            content = ""
    spans = next((key for key in _SPAN_KEYS if message.get(key)), None)
    if spans is not None:
        raise RowError(
            "bad_flag",
            f"message {index}: {spans} trains a part of a message, and messages are trained as a whole; divide it, or "
            "remove the key",
        )
    result: dict[str, Any] = {"role": role, "content": _content(content, role, index, has_calls=bool(calls))}
    known = (role_key, text_key, "tool_calls", "function_call", *_MAIN_KEYS, *TRAIN_KEYS, *WEIGHT_KEYS)
    result.update({key: item for key, item in message.items() if key not in known and item is not None})
    if thought:
        result.setdefault("reasoning_content", thought)
    result.update(_flags(message, index))
    if calls and not isinstance(calls, Sequence):
        raise RowError("bad_tool_call", f"tool_calls of message {index} are {described(calls)}, a list is needed")
    if calls:
        result["tool_calls"] = [_tool_call(call, index, prune_nulls) for call in calls]
    return result


_MAIN_KEYS = ("role", "from", "content", "value")
_SPAN_KEYS = ("training_detail", "train_detail")
"""Keys of Axolotl that say which characters of a message are trained."""
_NOT_TEXT = frozenset({"id", "name", "type", "tool_call_id", "timestamp", "date", "time", "index", "lang", "language"})
"""Keys of a message whose values are about it, besides those that are known."""


def _unknown_role(message: Mapping[str, Any], given: Any, index: int) -> RowError:
    detail = f"message {index} has {_role_shown(given)}; use {MAIN_ROLES}"
    if given is not None:
        return RowError("unknown_role", detail, {"roles": {given: ""}} if isinstance(given, str) else None)
    texts = {key: item for key, item in message.items() if isinstance(item, str) and key not in TEXT_KEYS}
    tags = [key for key, item in texts.items() if item.strip().lower() in ROLES]
    # who speaks is stated in a word, what is said usually in several
    tags = tags or [key for key, item in texts.items() if key not in _NOT_TEXT and 0 < len(item.split()) <= 2]
    if not tags:
        return RowError("unknown_role", detail)
    return RowError(
        "unknown_role", f"{detail}; its key {tags[0]!r} may be the role", {"message_keys": {tags[0]: "role"}}
    )


def _check_text_key(message: Mapping[str, Any], role: str, content: Any, index: int) -> None:
    """Check that a message without content does not have its text under a key that is not known.

    Raises:
        RowError: It has.
    """
    if content is not None and not (isinstance(content, str) and not content.strip()):
        return
    known = {*ROLE_KEYS, *TEXT_KEYS, *TRAIN_KEYS, *WEIGHT_KEYS, *_NOT_TEXT, "tool_calls", "function_call"}
    others = [
        key
        for key, item in message.items()
        if key not in known and not REASONING_KEY.search(key) and isinstance(item, str) and item.strip()
    ]
    if others:
        key = max(others, key=lambda other: len(message[other]))
        raise RowError(
            "unknown_key",
            f"message {index} ({role}) has no text under content, but it has {message[key]!r:.60} under {key!r}, a key "
            f"that is not known",
            {"message_keys": {key: "content"}},
        )


_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def _thought_before(content: Any) -> tuple[str | None, Any]:
    """Return the reasoning before the JSON text of a call, and the rest."""
    match = _THOUGHT.match(content) if isinstance(content, str) else None
    return (match[1].strip(), content[match.end() :]) if match else (None, content)


def _former_call(message: Mapping[str, Any], index: int) -> list[Any] | None:
    """Return the call of OpenAI's former key `function_call` as a list, or None."""
    call = message.get("function_call")
    if call in (None, "", {}):
        return None
    return _calls_of_text(call, index)


def _flags(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return `train` and `weight` of a message, under whichever of their names it has them.

    Raises:
        RowError: A value is neither a truth value nor a number, or two names say different things.
    """
    flags: dict[str, Any] = {}
    for name, keys in (("train", TRAIN_KEYS), ("weight", WEIGHT_KEYS)):
        given = {key: message[key] for key in keys if message.get(key) is not None}
        for key, value in given.items():
            if name == "train" and key != name and value in (0, 1):
                given[key] = bool(value)
            elif key != name and not (isinstance(value, (int, float)) and name == "weight"):
                raise RowError(
                    "bad_flag", f"message {index}: {key} is {value!r:.60}; write {name}: {_FLAG_FORMS[name]}"
                )
        if len(set(map(str, given.values()))) > 1:
            raise RowError(
                "bad_flag", f"message {index}: {given} are names of one flag and disagree; give {name} alone"
            )
        if given:
            flags[name] = next(iter(given.values()))
    return flags


_FLAG_FORMS = {"train": "true or false", "weight": "a number from 0"}


def _role_shown(given: Any) -> str:
    return "no role" if given is None else f"role {given!r:.80}"


def described(value: Any) -> str:
    """Describe a value by its type and beginning, for error messages; None is called null, as in JSON."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.80}"


def _content(content: Any, role: str, index: int, *, has_calls: bool) -> str | list[Any]:
    if content is None and has_calls:
        return ""
    if isinstance(content, str):
        return content
    are_parts = is_messages(content) and all(isinstance(part, Mapping) and "type" in part for part in content)
    are_known = bool(content) and are_parts and all(part["type"] in ("text", *MEDIA) for part in content)
    if role == "tool" and isinstance(content, (Mapping, list)) and not are_known:
        return json.dumps(content, ensure_ascii=False)
    if are_parts:
        parts = [{key: item for key, item in part.items() if item is not None} for part in content]
        if any(part["type"] != "text" for part in parts):
            return parts
        texts = [part.get("text", "") for part in parts]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise RowError(
        "content_not_text",
        f"message {index} ({role}) has content {'null' if content is None else repr(content)[:80]}, text is needed",
    )


def _calls_of_text(content: Any, index: int) -> list[Any]:
    calls = (
        _parse(content, "bad_tool_call", f"the function call in message {index}")
        if isinstance(content, str)
        else content
    )
    return calls if isinstance(calls, list) else [calls]


def _tool_call(call: Any, index: int, prune_nulls: bool) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("bad_tool_call", f"a tool call of message {index} names no function: {call!r:.80}")
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(arguments, str):
        arguments = json.dumps(_pruned(arguments or {}, prune_nulls), ensure_ascii=False)
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **result} if call.get("id") is not None else result


def _pruned(value: Any, prune_nulls: bool) -> Any:
    if not prune_nulls:
        return value
    if isinstance(value, Mapping):
        return {key: _pruned(item, True) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_pruned(item, True) for item in value]
    return value


def tools_text(tools: Any, *, prune_nulls: bool = False) -> str:
    """Return tool schemas as the JSON text of a list of `{"type": "function", "function": {...}}`.

    Args:
        tools: A list of schemas or of their JSON texts, or the JSON text of the list; bare functions are wrapped.
        prune_nulls: Remove keys with null values from the schemas.

    Raises:
        RowError: A text is not JSON, or a schema does not name a function.
    """
    if isinstance(tools, str):
        tools = _parse(tools, "bad_tools", "the tools column")
        prune_nulls = False  # Arrow adds no null to a text
    if isinstance(tools, Mapping):
        tools = [tools]
    if not is_messages(tools):
        raise RowError("bad_tools", f"tools must be a list of schemas, not {described(tools)}")
    return json.dumps([_tool(tool, prune_nulls) for tool in tools], ensure_ascii=False)


def _tool(tool: Any, prune_nulls: bool) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _parse(tool, "bad_tools", "a tool schema")
        prune_nulls = False
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("bad_tools", f"a tool schema names no function: {tool!r:.80}")
    return {"type": "function", "function": _pruned(dict(function), prune_nulls)}


def validate_messages(
    messages: Sequence[Mapping[str, Any]], *, require_alternation: bool = True, with_images: bool = False
) -> list[Problem]:
    """List the faults that make a normalized conversation unfit for training.

    Args:
        messages: Messages as `normalize_messages` returns them.
        require_alternation: After an optional system message, user and assistant must take turns, beginning with the
            user and ending with the assistant; tool results follow the call that asked for them.
        with_images: Whether messages may have images.

    Returns:
        All problems; empty if there are none.
    """
    problems = [problem for index, message in enumerate(messages) for problem in _message_problems(message, index)]
    problems += media_problems(messages, with_images=with_images)
    if not any(message["role"] == "assistant" for message in messages):
        problems.append(Problem("no_answer", f"{len(messages)} messages, none by the assistant"))
    elif require_alternation:
        problems += _order_problems([(message["role"], _calls_tools(message)) for message in messages])
    return problems


def media_problems(messages: Sequence[Mapping[str, Any]], *, with_images: bool = False) -> list[Problem]:
    """List the parts of normalized messages that a model cannot process.

    Args:
        messages: Messages as `normalize_messages` returns them.
        with_images: Whether the model processes images besides text.
    """
    trained = "only text and images are" if with_images else "only text is"
    return [
        Problem("has_media", f"message {index} has a part of type {part['type']!r}, and {trained} trained here")
        for index, message in enumerate(messages)
        if is_messages(message["content"])
        for part in message["content"]
        if part["type"] in MEDIA and not (with_images and part["type"] in IMAGE_PARTS)
    ]


def check_text_alone(record: Mapping[str, Any]) -> None:
    """Check that a conversation contains only text, because a chat template renders images and audio as placeholder
    text at most.

    Raises:
        ValueError: A message has another part; the error names the message and the type of the part.
    """
    chats = [record[name] for name in ("messages", "prompt", "completion") if is_messages(record.get(name))]
    problems = [problem for chat in chats for problem in media_problems(chat)]
    if problems:
        raise ValueError(
            f"{problems[0].detail}; remove such parts, or give processing_class=AutoProcessor.from_pretrained(...) and "
            "a data set whose first row has an image, or that has a column `images`"
        )


def _message_problems(message: Mapping[str, Any], index: int) -> list[Problem]:
    problems = []
    role, content = message["role"], message["content"]
    if not (content.strip() if isinstance(content, str) else content) and not message.get("tool_calls"):
        reason = "empty_answer" if role == "assistant" else "empty_content"
        if role != "tool":
            has_reasoning = any(REASONING_KEY.search(key) and item for key, item in message.items())
            found = "has reasoning, but no answer" if has_reasoning else "is empty"
            problems.append(Problem(reason, f"message {index} ({role}) {found}"))
    if not isinstance(message.get("train", True), bool):
        problems.append(Problem("bad_flag", f"message {index}: train is {message['train']!r}, true or false is needed"))
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        problems.append(Problem("bad_flag", f"message {index}: weight is {weight!r}, a number from 0 is needed"))
    return problems


# (role, whether it calls tools) of a message -> roles that may follow
_AFTER = {
    ("start", False): ("system", "user"),
    ("system", False): ("user",),
    ("user", False): ("assistant",),
    ("assistant", False): ("user",),
    ("assistant", True): ("tool",),
    ("tool", False): ("tool", "assistant", "user"),
}


def _calls_tools(message: Mapping[str, Any]) -> bool:
    """Return whether a message calls tools, by a key or, as in data of Hermes, in its text."""
    content = message["content"]
    return bool(message.get("tool_calls")) or (
        message["role"] == "assistant" and isinstance(content, str) and "<tool_call>" in content
    )


def _order_problems(turns: list[tuple[str, bool]]) -> list[Problem]:
    previous = ("start", False)
    for index, turn in enumerate(turns):
        allowed = _AFTER[previous]
        if turn[0] not in allowed:
            after = "at the start" if index == 0 else f"after {previous[0]}"
            return [Problem("wrong_order", f"message {index} is by {turn[0]} {after}, expected {' or '.join(allowed)}")]
        previous = turn
    if previous[0] != "assistant":
        return [Problem("no_final_answer", f"the last message is by {previous[0]}, expected assistant")]
    return []


def validate_record(record: Mapping[str, Any], *, require_alternation: bool = True) -> list[Problem]:
    """List the faults that make a record of any kind unfit for training; see `validate_messages`.

    A record with the key `images` may have images in its messages.
    """
    with_images = "images" in record
    if "messages" in record:
        return validate_messages(record["messages"], require_alternation=require_alternation, with_images=with_images)
    if "completion" in record:
        return _pair_problems(record["prompt"], record["completion"], require_alternation, with_images)
    if "text" in record:
        return [] if record["text"].strip() else [Problem("empty_text", "the text is empty")]
    return [] if len(record["input_ids"]) else [Problem("empty_text", "input_ids is empty")]


def _pair_problems(prompt: Any, completion: Any, require_alternation: bool, with_images: bool) -> list[Problem]:
    if isinstance(completion, str):
        return [] if completion.strip() else [Problem("empty_answer", "the completion is empty")]
    problems = validate_messages(
        [*prompt, *completion], require_alternation=require_alternation, with_images=with_images
    )
    if completion[0]["role"] != "assistant":
        problems.append(
            Problem("wrong_order", f"the completion begins with {completion[0]['role']}, expected assistant")
        )
    return problems
