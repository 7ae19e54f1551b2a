"""Location of the assistant's turns in a rendered chat, for any chat template.

1. By marks, in time linear in the number of turns. A chat is rendered twice: plain, and with a private-use character
   before and after the content of every message. If the second text without those characters equals the first one, the
   characters show where each content is. A turn then begins at the end of the generation prompt before its content and
   ends with the first terminator after it. Anything that the template prints between prompt and content, such as an
   empty `<think>` block, belongs to the turn, since the model has to generate it.
2. By prefixes, if the template edits or inspects the content, so that the two texts differ: the messages up to a turn
   must render to a prefix of the chat. This and the next method are quadratic, but needed for few rows.
3. By replacement, if later messages change how earlier ones are printed: the chat with only that turn's content
   replaced must differ nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sft.chat.template import PROBE_ANSWER, ChatTemplate, Messages, TemplateProfile
from sft.chat.template_syntax import only_prints_contents
from sft.common_prefix import common_prefix_length

# Private-use characters of plane 15 of Unicode serve as marks, two for each message. `_MAX_MARKED` is the largest
# number of marks in a chat, so chats of more than half as many messages are not marked.
_FIRST_MARK, _MAX_MARKED = 0xF0000, 0x7FFE

_MARKS = re.compile("[\U000f0000-\U000ffffd]")


class Turn(NamedTuple):
    """Text that the assistant generates for one message: characters `start` to `end` (exclusive) of the chat."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Marked:
    """Positions of the marks, and so of the contents of messages, in a rendered chat.

    Args:
        places: Position of each mark in the text without marks, in order.
        starts: Message index -> index in `places` of the start of its content, without leading whitespace.
        ends: Message index -> index in `places` of the end of its content, without trailing whitespace.
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
        profile: Its profile from `TemplateProfile.probe`.
        messages: Messages as `template_messages` returns them.
        tools: Tool schemas.

    Returns:
        The rendered text and, in order, one turn for every assistant message (several if the template marks
        several spans in one message).

    Raises:
        ValueError: The template refused the chat, or a turn could not be found in it.
    """
    if template.marks_generation:
        return _turns_by_generation_marks(template, profile, messages, tools)
    text, known = _turns_by_content_marks(template, profile, messages, tools)
    return text, turns_by_rendering(template, profile, messages, tools, text, known)


def assistant_indices(messages: Messages) -> list[int]:
    """Return the indices of the assistant's messages."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


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
    """Render a chat; return the text and the turns of all messages whose marks the template printed."""
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
    except ValueError:  # the template may refuse marked content, and still accept the chat itself
        plain, others = template.render([messages], tools)[0], []
    marked = others[0] if others else ""
    marks = _find_marks(marked)
    if _MARKS.search(plain) or _MARKS.sub("", marked) != plain:
        return plain, {}
    return plain, _turns_of(plain, messages, marks, profile)


def _is_printed_as_it_is(template: ChatTemplate, messages: Messages) -> bool:
    """Return whether rendering with marks is enough: only texts are marked, and the template only prints them."""
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
    """Return a message whose content, or the names of the functions that it calls, begin and end with marks."""
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
    """Put marks inside the outer whitespace of a text, so that a template trims the same whitespace."""
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
    """Find all marks of a text; content that is printed more than once has no single place and counts as not found."""
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
    """Return the turn of one assistant message; None if its marks do not determine it."""
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
    """Return the start of a turn if the template removed the beginning of its content, such as reasoning."""
    at = text.find(profile.generation_prompt, before, end) if profile.generation_prompt else -1
    return at + len(profile.generation_prompt) if at >= 0 else None


def _end_of_turn(text: str, end: int, after: int, message: Mapping[str, Any], profile: TemplateProfile) -> int | None:
    found = [(at, terminator) for terminator in profile.terminators if (at := text.find(terminator, end, after)) >= 0]
    calls = bool(message.get("tool_calls"))
    if profile.stop_token is not None and found:
        at, terminator = min(found)
        stop = at + len(terminator)
        # arguments follow the name of a function and may contain the terminator as text
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


@dataclass(frozen=True)
class _Chat:
    template: ChatTemplate
    profile: TemplateProfile
    messages: Messages
    tools: list[Any] | None
    text: str

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str | None:
        """Render a variant of the chat; None if the template refuses it."""
        try:
            return self.template.render([messages], self.tools, add_generation_prompt=add_generation_prompt)[0]
        except ValueError:
            return None


def turns_by_rendering(
    template: ChatTemplate,
    profile: TemplateProfile,
    messages: Messages,
    tools: list[Any] | None,
    text: str,
    known: Mapping[int, Turn],
) -> list[Turn]:
    """Find assistant turns by rendering variants of the chat; quadratic in the number of turns not known already.

    Args:
        template: The template.
        profile: Its profile from `TemplateProfile.probe`.
        messages: Messages as `template_messages` returns them.
        tools: Tool schemas.
        text: The rendered chat.
        known: Turns that were found by other means, by message index.

    Returns:
        The turns of all assistant messages, in order.

    Raises:
        ValueError: No method finds a turn. The error names the turn and shows where the texts differ.
    """
    chat = _Chat(template, profile, messages, tools, text)
    turns: list[Turn] = []
    for index in assistant_indices(messages):
        previous_end = turns[-1].end if turns else 0
        turn = known.get(index) or _turn_by_prefixes(chat, index) or _turn_by_replacement(chat, index, previous_end)
        if turn is None or turn.start < previous_end:
            raise ValueError(_not_found(chat, index))
        turns.append(turn)
    return turns


def _turn_by_prefixes(chat: _Chat, index: int) -> Turn | None:
    through = chat.render(chat.messages[: index + 1])
    if index == 0 or through is None or not chat.text.startswith(through):
        return None
    start = _end_of_prompt(chat, chat.messages[:index], through)
    return None if start is None else Turn(index, start, _cut_tail(through, start, chat.profile))


def _end_of_prompt(chat: _Chat, messages: Messages, through: str) -> int | None:
    """Return where generation begins after some messages: after the generation prompt, or after the header."""
    prompt = chat.render(messages, add_generation_prompt=True)
    if prompt is not None and through.startswith(prompt):
        return len(prompt)
    before = chat.render(messages)
    if before is not None and through.startswith(before + chat.profile.header):
        return len(before) + len(chat.profile.header)
    return None


def _cut_tail(through: str, start: int, profile: TemplateProfile) -> int:
    """Return the end of the terminator in a text that ends with a complete turn."""
    if through.endswith(profile.tail, start):
        return len(through) - len(profile.tail) + len(profile.terminator)
    at = through.rfind(profile.terminator, start) if profile.stop_token is not None else -1
    return at + len(profile.terminator) if at >= 0 else len(through)


def _turn_by_replacement(chat: _Chat, index: int, previous_end: int) -> Turn | None:
    """Find a turn between the texts that stay the same if its content is replaced by another word."""
    replaced = {"role": "assistant", "content": PROBE_ANSWER}
    other = chat.render([*chat.messages[:index], replaced, *chat.messages[index + 1 :]])
    if chat.messages[index].get("tool_calls") or other is None or PROBE_ANSWER not in other:
        return None
    before, _, rest = other.partition(PROBE_ANSWER)
    same, end = common_prefix_length(chat.text, before), len(chat.text) - len(rest)
    anchor = chat.profile.generation_prompt or chat.profile.after_question
    at = chat.text.rfind(anchor, previous_end, same) if anchor else -1
    start = at + len(anchor) if at >= 0 else same
    certain = at >= 0 or same == len(before)
    if not certain or not chat.text.endswith(rest) or end < start:
        return None
    return Turn(index, start, end + _terminator_length(rest, chat.profile))


def _terminator_length(rest: str, profile: TemplateProfile) -> int:
    return max((len(terminator) for terminator in profile.terminators if rest.startswith(terminator)), default=0)


def _not_found(chat: _Chat, index: int) -> str:
    prefix = chat.render(chat.messages[: index + 1]) or ""
    same = common_prefix_length(chat.text, prefix)
    near = slice(max(0, same - 40), same + 40)
    return (
        f"the assistant's turn in message {index} cannot be located: the template prints the messages up to it "
        f"differently at the end of a conversation (...{prefix[near]!r}) than inside this one "
        f"(...{chat.text[near]!r}). In the template, enclose the assistant's text in "
        "{% generation %} ... {% endgeneration %}"
    )
