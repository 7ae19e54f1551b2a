"""Where the assistant's turns lie in a rendered chat, for any template, in time linear in the number of turns.

A chat is rendered twice: plain, and with a private-use character before and after the content of every message. When
the second text without those characters is the first one, the characters tell where each content landed. A turn then
runs from the end of the generation prompt before its content (so that whatever a template puts between, such as an
empty `<think>` block, is part of the turn: the model has to generate it) through the first terminator after it.

Chats whose template looks into the content, so that the two texts differ, go through `sft.chat.turns_by_rendering` instead:
quadratic, but only for those rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft.chat.template import ChatTemplate, Messages, TemplateProfile
from sft.chat.template_syntax import only_prints_contents
from sft.chat.turns_by_rendering import Turn, assistant_indices, turns_by_rendering

# Plane 15 and 16 of Unicode hold private-use characters only: two for each message of a chat.
_FIRST_MARK, _MAX_MARKED = 0xF0000, 0x7FFE
_MARKS = re.compile("[\U000f0000-\U000ffffd]")


@dataclass(frozen=True)
class Marked:
    """Where the contents of messages landed in a rendered chat.

    Args:
        places: Characters at which marks lie, in order.
        starts: Message index -> which of the places is the start of its content, leading whitespace excluded.
        ends: Message index -> which of the places is its end, trailing whitespace excluded.
    """

    places: list[int]
    starts: dict[int, int]
    ends: dict[int, int]


def assistant_turns(
    template: ChatTemplate, profile: TemplateProfile, messages: Messages, tools: list[Any] | None
) -> tuple[str, list[Turn]]:
    """Render a chat and find all of its assistant turns.

    Args:
        template: The template.
        profile: What `TemplateProfile.probe` found about it.
        messages: Messages as `template_messages` returns them.
        tools: Tool schemas.

    Returns:
        The rendered text and one turn (several where the template's own generation marks are several) for every
        assistant message, in order.

    Raises:
        ValueError: The template refused the chat, or a turn could not be found in it.
    """
    if template.marks_generation:
        return _turns_by_generation_marks(template, profile, messages, tools)
    text, known = _turns_by_content_marks(template, profile, messages, tools)
    return text, turns_by_rendering(template, profile, messages, tools, text, known)


def _turns_by_generation_marks(
    template: ChatTemplate, profile: TemplateProfile, messages: Messages, tools: list[Any] | None
) -> tuple[str, list[Turn]]:
    text, ranges = template.render_marked(messages, tools)
    indices = assistant_indices(messages)
    if len(ranges) == len(indices):
        return text, [Turn(index, start, end) for index, (start, end) in zip(indices, ranges, strict=True)]
    plain, known = _turns_by_content_marks(template, profile, messages, tools)
    turns = turns_by_rendering(template, profile, messages, tools, plain, known)
    marked = [
        Turn(turn.message, start, end)
        for turn in turns
        for start, end in ranges
        if start < turn.end and turn.start < end
    ]
    if {turn.message for turn in marked} != set(indices):
        raise ValueError(
            f"the chat template marks {len(ranges)} generations in a conversation with {len(indices)} assistant "
            "messages: its generation marks must enclose every one of them"
        )
    return text, marked


def _turns_by_content_marks(
    template: ChatTemplate, profile: TemplateProfile, messages: Messages, tools: list[Any] | None
) -> tuple[str, dict[int, Turn]]:
    """The rendered text, and the turns of all messages whose marks the template carries through."""
    chats = [messages, _with_marks(messages)] if len(messages) <= _MAX_MARKED // 2 else [messages]
    if len(chats) == 2 and _is_printed_as_it_is(template, messages):
        marked = template.render(chats[1:], tools)[0]
        marks = _find_marks(marked)
        num_marked = sum(bool(message["content"].strip()) for message in messages)
        if len(marks.places) == 2 * num_marked == len(marks.starts) + len(marks.ends):
            plain = _MARKS.sub("", marked)
            return plain, _turns_of(plain, messages, marks, profile)
    try:
        plain, *others = template.render(chats, tools)
    except ValueError:  # the template may inspect what is marked, and accept the chat itself
        plain, others = template.render([messages], tools)[0], []
    marked = others[0] if others else ""
    marks = _find_marks(marked)
    if _MARKS.search(plain) or _MARKS.sub("", marked) != plain:
        return plain, {}
    return plain, _turns_of(plain, messages, marks, profile)


def _is_printed_as_it_is(template: ChatTemplate, messages: Messages) -> bool:
    """Whether the marked chat shows all there is to see: nothing but texts are marked, and no template reads those."""
    return (
        template.takes_text
        and only_prints_contents(template.source)
        and all(isinstance(message.get("content"), str) and not message.get("tool_calls") for message in messages)
    )


def _turns_of(plain: str, messages: Messages, marks: Marked, profile: TemplateProfile) -> dict[int, Turn]:
    turns = [_turn(plain, index, messages[index], marks, profile) for index in assistant_indices(messages)]
    return {turn.message: turn for turn in turns if turn is not None}


def _with_marks(messages: Messages) -> list[dict[str, Any]]:
    return [
        _mark(message, chr(_FIRST_MARK + 2 * i), chr(_FIRST_MARK + 2 * i + 1)) for i, message in enumerate(messages)
    ]


def _mark(message: Mapping[str, Any], start: str, end: str) -> dict[str, Any]:
    """A message whose content, or the names of the functions it calls, begin and end with marks."""
    result = dict(message)
    content, calls = message.get("content"), message.get("tool_calls")
    has_text = isinstance(content, str) and bool(content.strip())
    if has_text:
        result["content"] = _between(str(content), start, "" if calls else end)
    elif isinstance(content, list):
        result["content"] = _mark_parts(content, start, end)
    if calls:
        calls = [{**call, "function": dict(call["function"])} for call in calls]
        if not has_text:
            calls[0]["function"]["name"] = start + calls[0]["function"]["name"]
        calls[-1]["function"]["name"] += end
        result["tool_calls"] = calls
    return result


def _between(text: str, start: str, end: str) -> str:
    """Text with marks inside its outer whitespace, so that a template that trims it trims the same."""
    inner = text.strip()
    at = text.index(inner)
    return text[:at] + start + inner + end + text[at + len(inner) :]


def _mark_parts(parts: list[Any], start: str, end: str) -> list[Any]:
    texts = [i for i, part in enumerate(parts) if isinstance(part, Mapping) and str(part.get("text") or "").strip()]
    marked = list(parts)
    for at, mark in ((texts[0], (start, "")), (texts[-1], ("", end))) if texts else ():
        marked[at] = {**marked[at], "text": _between(marked[at]["text"], *mark)}
    return marked


def _find_marks(marked: str) -> Marked:
    """All marks of a text; a content that is printed twice has no one place and counts as not found."""
    marks = Marked([], {}, {})
    twice = set()
    for count, match in enumerate(_MARKS.finditer(marked)):
        index, is_end = divmod(ord(match.group()) - _FIRST_MARK, 2)
        known = marks.ends if is_end else marks.starts
        if index in known:
            twice.add(index)
        known[index] = count
        marks.places.append(match.start() - count)
    for index in twice:
        marks.ends.pop(index, None)
    return marks


def _turn(text: str, index: int, message: Mapping[str, Any], marks: Marked, profile: TemplateProfile) -> Turn | None:
    """The turn of one assistant message, or nothing when its marks do not tell where it is."""
    if index not in marks.ends or marks.starts.get(index, -1) > marks.ends[index]:
        return None
    last_mark = marks.ends[index]
    first_mark = marks.starts.get(index, last_mark)
    end = marks.places[last_mark]
    after = marks.places[last_mark + 1] if last_mark + 1 < len(marks.places) else len(text)
    before = marks.places[first_mark - 1] if first_mark else 0
    first: int | None
    if index in marks.starts:
        first = _start_before_content(text, before, marks.places[first_mark], message, profile)
    else:
        first = _start_without_content(text, before, end, profile)
    stop = _end_of_turn(text, end, after, message, profile)
    return None if first is None or stop is None else Turn(index, first, stop)


def _start_before_content(
    text: str, before: int, start: int, message: Mapping[str, Any], profile: TemplateProfile
) -> int:
    for anchor in (profile.generation_prompt, profile.after_question, profile.header):
        at = text.rfind(anchor, before, start) if anchor else -1
        if at >= 0:
            return at + len(anchor)
    lead = profile.lead + _outer_whitespace(message)[0]
    return start - len(lead) if text.endswith(lead, before, start) else start


def _start_without_content(text: str, before: int, end: int, profile: TemplateProfile) -> int | None:
    """The start of a turn whose content's beginning the template removed, as it does with reasoning."""
    at = text.find(profile.generation_prompt, before, end) if profile.generation_prompt else -1
    return at + len(profile.generation_prompt) if at >= 0 else None


def _end_of_turn(text: str, end: int, after: int, message: Mapping[str, Any], profile: TemplateProfile) -> int | None:
    found = [(at, terminator) for terminator in profile.terminators if (at := text.find(terminator, end, after)) >= 0]
    calls = bool(message.get("tool_calls"))
    if profile.stop_token is not None and found:
        at, terminator = min(found)
        stop = at + len(terminator)
        # after the name of a function come arguments, which may spell the terminator out
        return None if calls and terminator in text[stop:after] else stop
    if calls:
        return None
    trailing = _outer_whitespace(message)[1]
    end += len(trailing) if text.startswith(trailing, end) else 0
    closed = profile.stop_token is None and text.startswith(profile.tail, end)
    return end + len(profile.tail) if closed else end


def _outer_whitespace(message: Mapping[str, Any]) -> tuple[str, str]:
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return "", ""
    return content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
