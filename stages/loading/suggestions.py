"""Lines of params.yaml with which rows can be read whose columns, roles or keys of messages have unknown names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sft.data.messages import ROLES, RowError, role_of
from sft.data.records import Kind, Layout, detect_layout, normalize
from sft.data.source_row import Row
from stages.loading.mapping import RowMapping, messages_in
from stages.params.schema import MappedSection

SAMPLE = 200
"""Rows of a source that are looked at."""

_ROUNDS = 6
"""Names that hide one another: of columns, then of keys, then of roles."""
_NAMES = ("columns", "message_keys", "roles")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}

_QUESTION = re.compile(r"quest|prompt|query|instruct|input|ask|user|human|source|problem|title|frage|pregunta|pergunta")
_ANSWER = re.compile(
    r"answer|respon|output|reply|complet|assist|bot|target|solution|result|body|antwort|respuesta|resposta"
)
_ABOUT = re.compile(r"(^|_)(id|uuid|url|date|time|timestamp|lang|language|split|source|category|topic|score|label)$")

Options = dict[str, dict[str, str]]


def check_readable(rows: Sequence[Row], mapping: RowMapping, layout: Layout) -> None:
    """Check that not all rows lack a key of messages or a role that is known.

    Raises:
        RowError: They do; that of the first row.
    """
    if layout.kind not in (Kind.MESSAGES, Kind.PROMPT_COMPLETION) or layout.is_question_answer:
        return
    first: RowError | None = None
    for row in rows:
        try:
            normalize(mapping.apply(row.columns), layout, prune_nulls=row.has_added_nulls)
        except RowError as error:
            if not error.mapping:
                return
            first = first or error
        else:
            return
    if first is not None:
        raise first


def with_lines(message: str, section: MappedSection, rows: Sequence[Row], key: str) -> str:
    """Return a message with the lines of params.yaml after it with which the rows can be read, if there are any.

    Args:
        message: What is wrong with the rows.
        section: The section of their source.
        rows: The rows, or the first of them.
        key: Key of the source in params.yaml.
    """
    options = suggest_options(section, rows)
    if not options:
        return message
    place = key.removesuffix(".path")
    indent = " " * (6 if "sources" in place else 4)
    lines = "".join(f"\n{indent}{option_line(name, names)}" for name, names in options.items())
    return f"{message}. If that is what the names mean, write under {place} in params.yaml:{lines}"


def option_line(name: str, names: Mapping[str, str]) -> str:
    """Return an option of a source as a line of YAML."""
    return f"{name}: {{{', '.join(f'{_scalar(given)}: {_scalar(known)}' for given, known in names.items())}}}"


def _scalar(text: str) -> str:
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS
    return text if is_plain else json.dumps(text, ensure_ascii=not text.isprintable())


def suggest_options(section: MappedSection, rows: Sequence[Row]) -> Options:
    """Return the options of a source with which its rows can be read, those that are given included.

    Args:
        section: Its section.
        rows: Some of its rows.

    Returns:
        Options by name; empty if nothing can be suggested, or the rows can be read as they are.
    """
    if section.template is not None:
        return {}
    options: Options = {name: dict(getattr(section, name)) for name in _NAMES}
    changed = False
    for _ in range(_ROUNDS):
        try:
            more = _unknown_names(section.model_copy(update=options), rows)
        except ValueError:
            return {}
        if not more:
            return {name: names for name, names in options.items() if names} if changed else {}
        changed = True
        for name, names in more.items():
            options[name] = {**options[name], **names}
    return {}


def _unknown_names(section: MappedSection, rows: Sequence[Row]) -> Options:
    """Return options for names that hinder reading; none if each row can be read, or is wrong in another way.

    Raises:
        ValueError: The names can't be guessed.
    """
    mapping = RowMapping(section)
    for row in rows:
        mapping.observe(row.columns)
    columns = mapping.columns()
    try:
        layout = detect_layout(columns)
    except ValueError:
        return {"columns": _guess_columns([row.columns for row in rows])}
    found: Options = {}
    num_read = 0
    for row in rows:
        mapped = mapping.apply(row.columns)
        try:
            normalize(mapped, layout, prune_nulls=row.has_added_nulls)
            num_read += 1
        except RowError as error:
            for name, names in error.mapping.items():
                found.setdefault(name, {}).update(names)
    if "roles" in found:
        chats = (messages_in(name, value) for row in rows for name, value in mapping.apply(row.columns).items())
        found["roles"] = _guess_roles(chats)
    if not found and not num_read:
        raise ValueError("no row can be read")
    return found


def _guess_roles(chats: Iterator[list[dict[str, Any]]]) -> dict[str, str]:
    """Guess what unknown roles mean: by their names, or by their places, since users begin and take turns."""
    places: dict[str, Counter[int]] = {}
    for chat in chats:
        place = 0
        for message in chat:
            role = role_of(message)[1]
            if not isinstance(role, str) or not role.strip():
                continue
            name = role.strip()
            if _by_name(name) != "system" and ROLES.get(name.lower()) != "system":
                places.setdefault(name, Counter())[place % 2] += 1
                place += 1
            else:
                places.setdefault(name, Counter())
    return {
        name: _by_name(name) or ("user" if counts[0] >= counts[1] else "assistant")
        for name, counts in places.items()
        if name.lower() not in ROLES
    }


def _by_name(role: str) -> str | None:
    for word, known in {"sys": "system", "tool": "tool", "func": "tool", "observ": "tool"}.items():
        if word in role.lower():
            return known
    return None


def _guess_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Guess which columns hold the conversation.

    Raises:
        ValueError: None looks like it.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    small = {name: name.strip().lower() for name in names}
    if len(set(small.values())) == len(names) and _is_known(small.values()):
        return {name: other for name, other in small.items() if name != other}
    if "chosen" in names:  # of pairs of a better and a worse answer
        return {"chosen": "completion" if "prompt" in names else "messages"}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and all(messages_in("messages", value) for value in values):
            return {name: "messages"}
    texts = {
        name: sum(len(row[name]) for row in rows if isinstance(row.get(name), str))
        for name in names
        if any(isinstance(row.get(name), str) for row in rows)
        and all(isinstance(row.get(name), (str, type(None))) for row in rows)
    }
    longest = sorted((name for name in texts if not _ABOUT.search(name.lower())), key=lambda name: -texts[name])[:2]
    if not longest:
        raise ValueError("no column of text")
    if len(longest) == 1:
        return {longest[0]: "text"}
    first, second = sorted(longest, key=names.index)
    is_turned = bool(_ANSWER.search(first.lower())) and not _ANSWER.search(second.lower())
    is_turned = is_turned or bool(_QUESTION.search(second.lower()) and not _QUESTION.search(first.lower()))
    question, answer = (second, first) if is_turned else (first, second)
    renamed = {question: "question", answer: "answer"}
    return {name: other for name, other in renamed.items() if name != other}


def _is_known(columns: Any) -> bool:
    try:
        detect_layout(columns)
    except ValueError:
        return False
    return True
