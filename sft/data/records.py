"""Records: training rows of any common layout, converted to one of four kinds.

A record is a dict of plain JSON values with an optional `"id"` and one of

    {"messages": [{"role", "content", "train"?, "weight"?, "tool_calls"?, ...}], "tools"?: JSON text}
    {"prompt": str | messages, "completion": str | messages, "tools"?: JSON text}
    {"text": str}
    {"input_ids": [...], "labels"?, "completion_mask"?, "assistant_masks"?}      unchanged

Tool schemas and tool-call arguments are kept as JSON text: Arrow unifies the structs of a column and would write a null
for every key that only another row has, and the chat template would print those nulls.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sft.data.dialects import openai_messages, openai_tools, plain_text
from sft.data.messages import TEXT_KEYS, RowError, described, is_messages, normalize_messages, tools_text
from sft.labels import TOKEN_MASKS

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")

QUESTION_ANSWER_COLUMNS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("input", "output"),
    ("text_input", "output"),
)

SYSTEM_COLUMNS = ("system", "system_prompt", "systemInstruction", "system_instruction")

PARTS_COLUMN = "contents"
"""Column of conversations in the form of Gemini."""

CONTEXT_COLUMNS = ("input", "context")

OPTIONAL_COLUMNS = ("tools", "functions", "chat_template_kwargs")

TOKENIZED_COLUMNS = ("input_ids", "labels", *TOKEN_MASKS)


class Kind(StrEnum):
    """Kind of content that a record has."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    TEXT = "text"
    TOKENIZED = "tokenized"


@dataclass(frozen=True)
class Layout:
    """Roles of the columns of a data set.

    Args:
        kind: The kind of record that the rows are converted to.
        content: The columns with the conversation: one for messages and text, two for question and answer.
        context: Column with a text that is appended to the question.
        system: Column with a system message.
        history: Column with earlier (question, answer) pairs.
    """

    kind: Kind
    content: tuple[str, ...]
    context: str | None = None
    system: str | None = None
    history: str | None = None

    @property
    def is_question_answer(self) -> bool:
        """Whether two columns of text are converted to a user and an assistant message."""
        return self.kind is Kind.MESSAGES and len(self.content) == 2


def detect_layout(columns: Iterable[str]) -> Layout:
    """Detect the layout of a data set from its columns.

    Args:
        columns: The columns of all rows together, since a single row may lack some.

    Raises:
        ValueError: The columns contain no known combination.
    """
    return _layout(tuple(sorted(set(columns))))


@functools.lru_cache(maxsize=1024)
def _layout(columns: tuple[str, ...]) -> Layout:
    system = next((name for name in SYSTEM_COLUMNS if name in columns), None)
    if "input_ids" in columns:
        return Layout(Kind.TOKENIZED, tuple(name for name in TOKENIZED_COLUMNS if name in columns))
    for name in CONVERSATION_COLUMNS:
        if name in columns:
            return Layout(Kind.MESSAGES, (name,), system=system)
    if "prompt" in columns and "completion" in columns:
        return Layout(Kind.PROMPT_COMPLETION, ("prompt", "completion"), system=system)
    for question, answer in QUESTION_ANSWER_COLUMNS:
        if question in columns and answer in columns:
            context = next((name for name in CONTEXT_COLUMNS if name in columns and name != question), None)
            history = "history" if "history" in columns else None
            return Layout(Kind.MESSAGES, (question, answer), context, system, history)
    if "text" in columns:
        return Layout(Kind.TEXT, ("text",))
    if PARTS_COLUMN in columns:
        return Layout(Kind.MESSAGES, (PARTS_COLUMN,), system=system)
    lowered = tuple(sorted({name.strip().lower() for name in columns}))
    if lowered != columns:
        try:
            _layout(lowered)
        except ValueError:
            pass
        else:
            other = [name for name in columns if name != name.strip().lower()]
            raise ValueError(
                f"columns {list(columns)} are known only in lower case and without spaces around them: rename "
                f"{', '.join(f'{name!r} to {name.strip().lower()!r}' for name in other)}"
            )
    raise ValueError(
        f"columns {list(columns)} are none of: messages (or conversations); prompt and completion; instruction and "
        "output (or question and answer, query and response); text; input_ids. Rename the columns of the data"
    )


def normalize(row: Mapping[str, Any], layout: Layout | Kind, *, prune_nulls: bool = False) -> dict[str, Any]:
    """Convert one row to a record.

    Args:
        row: Values by column name.
        layout: Result of `detect_layout` for the data set. With a `Kind`, the layout is detected from the row's own
            columns and must be of that kind.
        prune_nulls: Remove keys with null values from tool schemas and arguments; right for rows of Arrow tables,
            which fill structs with nulls for keys that only other rows have.

    Raises:
        RowError: The row does not fit the layout; `.reason` is a short code, and the message states what was found.
    """
    if isinstance(layout, Kind):
        layout = _layout_of_row(row, layout)
    missing = [name for name in layout.content if row.get(name) is None]
    if missing and not (layout.kind is Kind.TOKENIZED and row.get("input_ids") is not None):
        raise RowError("missing_column", f"no value in {missing}; the row has {sorted(row)}")
    match layout.kind:
        case Kind.MESSAGES:
            record = _messages_record(row, layout, prune_nulls)
        case Kind.PROMPT_COMPLETION:
            record = _pair_record(row, layout, prune_nulls)
        case Kind.TEXT:
            record = {"text": _text(row, "text")}
        case Kind.TOKENIZED:
            return _tokenized_record(row)
    extras = _extras(row, layout.kind, prune_nulls)
    if record.get("tools", extras.get("tools")) != extras.get("tools", record.get("tools")):
        raise RowError("bad_tools", "the row has tools in a column and others in a message; give one of them alone")
    return {**record, **extras}


def _layout_of_row(row: Mapping[str, Any], kind: Kind) -> Layout:
    layout = detect_layout(row)
    if layout.kind is not kind:
        raise RowError(
            "other_kind", f"the data set is of kind {kind.value}, this row of kind {layout.kind.value}: {sorted(row)}"
        )
    return layout


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RowError("not_text", f"column {column!r} holds {described(value)}, text is needed")
    return value


def _messages_record(row: Mapping[str, Any], layout: Layout, prune_nulls: bool) -> dict[str, Any]:
    if layout.is_question_answer:
        return {"messages": _with_system(_question_answer(row, layout), row, layout)}
    messages, tools = _conversation(row[layout.content[0]], prune_nulls)
    return {"messages": _with_system(messages, row, layout), **_offered(tools, prune_nulls)}


def _conversation(value: Any, prune_nulls: bool) -> tuple[list[dict[str, Any]], Any]:
    """Return a conversation as messages, and the tools that are given in it, if any."""
    converted = openai_messages(value)
    if converted.tools is not None and not converted.messages:
        raise RowError("no_messages", "the conversation has no message, only tools")
    return normalize_messages(converted.messages, prune_nulls=prune_nulls), converted.tools


def _offered(tools: Any, prune_nulls: bool) -> dict[str, str]:
    """Return tools as a part of a record: JSON text, or nothing if there are none."""
    if not tools:
        return {}
    text = tools_text(openai_tools(tools), prune_nulls=prune_nulls and not isinstance(tools, str))
    return {} if text == "[]" else {"tools": text}


def _question_answer(row: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    question, answer = (_text(row, name) for name in layout.content)
    context = _text(row, layout.context) if layout.context and row.get(layout.context) is not None else ""
    messages = []
    history = (row.get(layout.history) if layout.history else None) or []
    for pair in history if is_messages(history) else [history]:
        if not is_messages(pair) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("bad_history", f"history holds {pair!r:.80}, pairs of question and answer are needed")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    user = "\n\n".join(part for part in (question, context) if part.strip())
    return [*messages, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def _with_system(messages: list[dict[str, Any]], row: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    column = layout.system
    system = plain_text(row.get(column)) if column else None
    if column is None or not system:
        return messages
    if messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise RowError(
                "two_system_messages", f"the conversation has one, and column {column!r} holds {system!r:.80}"
            )
        return messages
    return [{"role": "system", "content": _text({column: system}, column)}, *messages]


def _pair_record(row: Mapping[str, Any], layout: Layout, prune_nulls: bool) -> dict[str, Any]:
    prompt, completion = row["prompt"], row["completion"]
    if not is_messages(prompt) and not is_messages(completion):
        if layout.system and row.get(layout.system):
            raise RowError("system_of_text", "a system column needs prompt and completion as messages, not as text")
        return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    asked, tools = _conversation(prompt, prune_nulls)
    answered, _ = _conversation(completion, prune_nulls)
    return {"prompt": _with_system(asked, row, layout), "completion": answered, **_offered(tools, prune_nulls)}


def _tokenized_record(row: Mapping[str, Any]) -> dict[str, Any]:
    record = {name: row[name] for name in TOKENIZED_COLUMNS if row.get(name) is not None}
    for name, value in record.items():
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
            raise RowError("token_type", f"{name} must be a list of numbers, not {type(value).__name__} {value!r:.60}")
    lengths = {name: len(value) for name, value in record.items()}
    if len(set(lengths.values())) > 1:
        raise RowError("token_lengths", f"columns of one row differ in length: {lengths}")
    return record


def _extras(row: Mapping[str, Any], kind: Kind, prune_nulls: bool) -> dict[str, Any]:
    """Return, as JSON text, the columns that a chat template reads in addition to the conversation."""
    extras: dict[str, Any] = {}
    if kind in (Kind.MESSAGES, Kind.PROMPT_COMPLETION):
        given = [name for name in ("tools", "functions") if row.get(name)]
        if len(given) > 1:
            raise RowError("bad_tools", "the row has tools and functions, two names of one column; give tools alone")
        extras |= _offered(row[given[0]] if given else None, prune_nulls)
        if row.get("chat_template_kwargs"):
            extras["chat_template_kwargs"] = _template_variables(row["chat_template_kwargs"])
    return extras


def _template_variables(value: Any) -> str:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = value
    if not isinstance(parsed, Mapping):
        raise RowError("bad_template_kwargs", f"chat_template_kwargs holds {described(value)}, an object is needed")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def record_digest(record: Mapping[str, Any]) -> str:
    """Return a hash of a record's content, without its id, as 32 hexadecimal digits.

    Raises:
        RowError: The content cannot be encoded as UTF-8, since it contains half of a surrogate pair.
    """
    content = {name: value for name, value in record.items() if name != "id"}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    try:
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:32]
    except UnicodeEncodeError as error:
        around = canonical[max(0, error.start - 20) : error.start + 20]
        raise RowError("bad_unicode", f"half a surrogate pair, which is not text, in {around!r}") from error


def numbers_as_text(row: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Convert the numbers of a row to text, as JSON writes them, where its layout expects text.

    Booleans, NaN and infinity are not converted.

    Args:
        row: Values by column name.
        layout: Layout of the row.

    Returns:
        The converted row, and a description of each number that was converted.
    """
    result, found = dict(row), []
    for column in (*layout.content, layout.context, layout.system):
        value = row.get(column) if column else None
        if column and _is_number(value):
            result[column] = json.dumps(value)
            found.append(f"column {column!r} holds the number {value}")
        elif column and is_messages(value):
            result[column] = [_message(message, index, found) for index, message in enumerate(value or ())]
    return result, found


def _message(message: Any, index: int, found: list[str]) -> Any:
    if not isinstance(message, Mapping):
        return message
    numbers = {key: message[key] for key in TEXT_KEYS if _is_number(message.get(key))}
    found += [f"message {index} has the number {number} as {key}" for key, number in numbers.items()]
    return {**message, **{key: json.dumps(number) for key, number in numbers.items()}}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
