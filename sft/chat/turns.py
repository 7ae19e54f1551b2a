"""Location of the assistant's turns in a rendered chat, for any chat template.

A turn begins where generation begins: the chat up to it, rendered with the generation prompt, is what stands before it.

1. By marks, in time linear in the number of turns (`sft.chat.said`). A turn begins at the end of the first generation
   prompt after the previous message, and ends with the first terminator after the last mark of its message. All that
   the template prints in between, such as an empty `<think>` block or a second header, belongs to the turn, since the
   model has to generate it.
2. By prefixes, if the template looks at the texts, so that marks change what it prints: the messages up to a turn must
   render to a prefix of the chat. This and the next method are quadratic, but needed for few rows.
3. By replacement, if later messages change how earlier ones are printed: the chat with only that turn's content
   replaced must differ nowhere else.

Each start is then compared with the generation prompt of the chat up to it. That rendering is quadratic, too, so it is
done once for all turns between messages of the same form: for the others, the text before the turn must be the same.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft.chat.said import MarkedText, render_with_marks
from sft.chat.template import PROBE_ANSWER, ChatTemplate, Messages, TemplateProfile
from sft.common_prefix import common_prefix_length


class Turn(NamedTuple):
    """Text that the assistant generates for one message: characters `start` to `end` (exclusive) of the chat."""

    message: int
    start: int
    end: int


class TurnFinder:
    """Find the assistant's turns in chats that one template renders.

    Args:
        template: The template.
        special_tokens: Texts of all added tokens, which the tokenizer never splits.
    """

    def __init__(self, template: ChatTemplate, special_tokens: Sequence[str]) -> None:
        self.template = template
        self.profile = TemplateProfile.probe(template, special_tokens)
        self._special_tokens = special_tokens
        self._leads: dict[tuple[Any, ...], str] = {}

    def find(
        self,
        messages: Messages,
        tools: list[Any] | None,
        text: str,
        marked: MarkedText | None,
        wanted: Collection[int] | None = None,
    ) -> tuple[str, list[Turn]]:
        """Find the assistant's turns in a chat.

        Args:
            messages: Messages as `template_messages` returns them.
            tools: Tool schemas.
            text: The rendered chat.
            marked: The same with the places of what it says, from `sft.chat.said.render_with_marks`.
            wanted: Messages whose turns have to be found, and to begin where generation begins; None for all of the
                assistant.

        Returns:
            The text, and in order the turns of all assistant messages that were found. A message has several if the
            template marks several spans in it, or prints other messages inside it.

        Raises:
            ValueError: A wanted turn could not be found, or does not begin where generation begins.
        """
        chat = _Chat(self.template, self.profile, messages, tools, text)
        wanted = assistant_indices(messages) if wanted is None else wanted
        if self.template.marks_generation:
            return self._by_generation_marks(chat, marked, wanted)
        turns = self._find(chat, marked, wanted)
        try:
            return text, list(self._begun(chat, turns, marked, wanted))
        except _OtherPromptError as error:
            raise ValueError(f"{error} {self._way_out(chat, wanted)}") from None

    def _find(self, chat: _Chat, marked: MarkedText | None, wanted: Collection[int]) -> list[Turn]:
        known = {} if marked is None else {index: _by_marks(chat, index, marked) for index in wanted}
        return turns_by_rendering(chat, {index: turns for index, turns in known.items() if turns}, wanted)

    def _by_generation_marks(
        self, chat: _Chat, marked: MarkedText | None, wanted: Collection[int]
    ) -> tuple[str, list[Turn]]:
        text, ranges = self.template.render_marked(chat.messages, chat.tools)
        indices = assistant_indices(chat.messages)
        if len(ranges) == len(indices):
            return text, [Turn(index, start, end) for index, (start, end) in zip(indices, ranges, strict=True)]
        inside = [
            Turn(turn.message, start, end)
            for turn in self._find(chat, marked, indices)
            for start, end in ranges
            if start < turn.end and turn.start < end
        ]
        if {turn.message for turn in inside} != set(indices):
            raise ValueError(
                f"the chat template marks {len(ranges)} generations in a conversation with {len(indices)} assistant "
                "messages: its generation marks must enclose every one of them"
            )
        return text, inside

    def _begun(
        self, chat: _Chat, turns: list[Turn], marked: MarkedText | None, wanted: Collection[int]
    ) -> Iterator[Turn]:
        """Yield turns, with the first of each wanted message starting where generation starts."""
        begun = set()
        for turn in turns:
            is_first = turn.message in wanted and turn.message not in begun
            begun.add(turn.message)
            yield turn._replace(start=self._start(chat, turn, marked)) if is_first else turn

    def _start(self, chat: _Chat, turn: Turn, marked: MarkedText | None) -> int:
        place = None if marked is None else _place_before(turn.message, marked)
        key = chat.signature(turn.message)
        lead = self._leads.get(key)
        if lead is not None and place is not None and chat.text.startswith(lead, place):
            return place + len(lead)
        start = _generation_start(chat, turn, marked)
        if place is not None and place <= start:
            self._leads[key] = chat.text[place:start]
        return start

    def _way_out(self, chat: _Chat, wanted: Collection[int]) -> str:
        """Return what a user can do about turns that do not begin where generation begins."""
        switches = _switches(self.template.source)
        for name in switches:
            for value in (False, True):
                variables = {**self.template.variables, name: value}
                if self._agrees(replace(self.template, variables=variables), chat, wanted):
                    return f"Set chat_template_kwargs to {json.dumps({name: value})}, with which both agree"
        known = f" (variables: {', '.join(switches)})" if switches else ""
        return (
            f"Set chat_template_kwargs, if a variable of the template{known} decides about it, give the data in the "
            "form that the prompt begins, or use another chat template"
        )

    def _agrees(self, template: ChatTemplate, chat: _Chat, wanted: Collection[int]) -> bool:
        """Return whether wanted turns begin where generation begins with another template."""
        try:
            other = TurnFinder(template, self._special_tokens)
            text, marked = render_with_marks(template, chat.messages, chat.tools)
            again = _Chat(template, other.profile, chat.messages, chat.tools, text)
            list(other._begun(again, other._find(again, marked, wanted), marked, wanted))
        except ValueError:
            return False
        return True


class _OtherPromptError(ValueError):
    """A turn does not begin where generation begins."""


def assistant_indices(messages: Messages) -> list[int]:
    """Return the indices of the assistant's messages."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _form(value: Any) -> str:
    if isinstance(value, str):
        return f"text{'<think>' in value:d}{'</think>' in value:d}"
    return type(value).__name__


def _place_before(message: int, marked: MarkedText) -> int | None:
    """Return the place of the last mark before those of a message, 0 if there is none, None if it has no marks."""
    runs = marked.runs.get(message)
    if not runs:
        return None
    return marked.events[runs[0][0] - 1].at if runs[0][0] else 0


def _by_marks(chat: _Chat, index: int, marked: MarkedText) -> list[Turn]:
    """Return the turns of one assistant message; none if its marks do not determine them."""
    runs = marked.runs.get(index, [])
    numbers = [marked.events[at].number for first, last in runs for at in range(first, last + 1)]
    if len(runs) > 1 and len(numbers) != 2 * len(set(numbers)):
        return []  # something is printed again elsewhere
    turns = []
    for run in runs:
        turn = _of_run(chat, index, marked, run, is_first=run == runs[0])
        if turn is None:
            return []
        turns.append(turn)
    return turns


def _of_run(chat: _Chat, index: int, marked: MarkedText, run: tuple[int, int], *, is_first: bool) -> Turn | None:
    first, last = (marked.events[number] for number in run)
    if not last.is_end:
        return None
    before = marked.events[run[0] - 1].at if run[0] else 0
    after = marked.events[run[1] + 1].at if run[1] + 1 < len(marked.events) else len(chat.text)
    start: int | None
    if not is_first:
        start = first.at
    elif first.is_end:
        start = _start_without_content(chat.text, before, last.at, chat.profile)
    else:
        start = _start_before_content(chat.text, before, first.at, chat.messages[index], chat.profile)
    end = _end_of_turn(chat.text, last.at, after, chat.messages[index], chat.profile)
    if end is None and not is_first:
        end = last.at
    return None if start is None or end is None else Turn(index, start, end)


def _start_before_content(
    text: str, before: int, start: int, message: Mapping[str, Any], profile: TemplateProfile
) -> int:
    for anchor in (profile.generation_prompt, profile.after_question, profile.header):
        at = text.find(anchor, before, start) if anchor else -1
        if at >= 0:
            return at + len(anchor)
    lead = profile.lead + _outer_whitespace(message)[0]
    return start - len(lead) if text.endswith(lead, before, start) else start


def _start_without_content(text: str, before: int, end: int, profile: TemplateProfile) -> int | None:
    """Return the start of a turn if the template printed the beginning of its content elsewhere, such as reasoning."""
    for anchor in (profile.generation_prompt, profile.header):
        at = text.find(anchor, before, end) if anchor else -1
        if at >= 0:
            return at + len(anchor)
    return None


def _end_of_turn(text: str, end: int, after: int, message: Mapping[str, Any], profile: TemplateProfile) -> int | None:
    calls = bool(message.get("tool_calls"))
    terminators = (*profile.terminators, *profile.call_terminators) if calls else profile.terminators
    found = [(at, closing) for closing in terminators if closing and (at := text.find(closing, end, after)) >= 0]
    if found and (profile.stop_token is not None or (calls and profile.call_terminators)):
        at, closing = min(found)
        return at + len(closing)
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
    """A chat and its rendered text."""

    template: ChatTemplate
    profile: TemplateProfile
    messages: Messages
    tools: list[Any] | None
    text: str

    @functools.cached_property
    def _forms(self) -> list[tuple[str, ...]]:
        return [
            (
                message["role"],
                *sorted(f"{key}:{_form(value)}" for key, value in message.items() if value not in ("", [], None)),
            )
            for message in self.messages
        ]

    @functools.cached_property
    def _all_forms(self) -> frozenset[tuple[str, ...]]:
        return frozenset(self._forms)

    @functools.cached_property
    def _last_question(self) -> int:
        return max((index for index, message in enumerate(self.messages) if message["role"] == "user"), default=-1)

    def signature(self, index: int) -> tuple[Any, ...]:
        """Return what usually determines what a template prints before a turn.

        That is the form of the messages around it, whether the last question is before it, and which other forms of
        messages there are. It does not grow with the chat.
        """
        around = tuple(self._forms[max(0, index - 2) : index + 2])
        return min(index, 2), around, index > self._last_question, bool(self.tools), self._all_forms

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str | None:
        """Render a variant of the chat; None if the template refuses it."""
        try:
            return self.template.render([messages], self.tools, add_generation_prompt=add_generation_prompt)[0]
        except ValueError:
            return None


def turns_by_rendering(chat: _Chat, known: Mapping[int, list[Turn]], wanted: Collection[int]) -> list[Turn]:
    """Find assistant turns by rendering variants of the chat; quadratic in the number of turns not known already.

    Args:
        chat: The chat.
        known: Turns that were found by other means, by message index.
        wanted: Messages whose turns have to be found.

    Returns:
        The turns of all wanted messages, in order.

    Raises:
        ValueError: No method finds a turn. The error names the turn and shows where the texts differ.
    """
    turns: list[Turn] = []
    for index in sorted(wanted):
        previous_end = turns[-1].end if turns else 0
        found = known.get(index)
        if not found:
            turn = _turn_by_prefixes(chat, index) or _turn_by_replacement(chat, index, previous_end)
            found = [turn] if turn is not None and turn.start >= previous_end else []
        if not found:
            raise ValueError(_not_found(chat, index))
        turns += found
    turns.sort(key=lambda turn: turn.start)
    for turn, later in itertools.pairwise(turns):
        if later.start < turn.end:
            raise ValueError(_not_found(chat, later.message))
    return turns


def _turn_by_prefixes(chat: _Chat, index: int) -> Turn | None:
    through = chat.render(chat.messages[: index + 1])
    if index == 0 or through is None:
        return None
    start = _end_of_prompt(chat, chat.messages[:index], through)
    if start is None or not chat.text.startswith(through[:start]):
        return None
    if chat.text.startswith(through):
        return Turn(index, start, _cut_tail(through, start, chat.profile))
    # the last turn of a chat may be closed in another way than the others
    end = len(through) - len(chat.profile.tail)
    if through.endswith(chat.profile.tail, start) and chat.text.startswith(through[:end]):
        return Turn(index, start, end + _terminator_length(chat.text[end:], chat.profile))
    return None


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
    closing = [profile.terminator, *profile.call_terminators] if profile.stop_token is not None else []
    ends = [at + len(text) for text in closing if (at := through.rfind(text, start)) >= 0]
    return max(ends, default=len(through))


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


def _generation_start(chat: _Chat, turn: Turn, marked: MarkedText | None) -> int:
    """Return where generation starts for a turn.

    Raises:
        _OtherPromptError: The generation prompt of the messages before the turn is not what stands before the turn.
    """
    try:
        prompt, shown = render_with_marks(
            chat.template, chat.messages[: turn.message], chat.tools, add_generation_prompt=True
        )
    except ValueError:  # the template refuses the messages before the turn alone, such as none
        return turn.start
    if chat.text.startswith(prompt) and len(prompt) <= turn.end:
        return len(prompt)
    if not turn.message:
        return turn.start
    place, local = _local_prompt(chat, turn, marked, prompt, shown)
    if chat.text.startswith(local, place) and place + len(local) <= turn.end:
        return place + len(local)
    same = common_prefix_length(chat.text[place : turn.end], local)
    if _is_printed_otherwise_in_history(chat, turn, prompt):
        return turn.start
    same = min(same, max(0, turn.start - place))
    goes_on = chat.text[place + same : place + same + 40]
    raise _OtherPromptError(
        f"the assistant's turn in message {turn.message} does not begin where generation begins: the chat template's "
        f"generation prompt goes on with {local[same:][:60]!r}, the conversation with {goes_on!r}. The model would be "
        "trained to answer a prompt that it never gets."
    )


def _local_prompt(
    chat: _Chat, turn: Turn, marked: MarkedText | None, prompt: str, shown: MarkedText | None
) -> tuple[int, str]:
    """Return the part of the generation prompt after the last text before the turn, and its place in the chat.

    The template may print earlier messages in another way than in the prompt, so only this part has to be the same.
    """
    if marked is not None and shown is not None and shown.events:
        runs, last = marked.runs.get(turn.message), shown.events[-1]
        before = marked.events[runs[0][0] - 1] if runs and runs[0][0] else None
        if before is not None and marked.said[before.number][:2] == shown.said[last.number][:2]:
            return before.at, prompt[last.at :]
    asked = chat.render(chat.messages[: turn.message])
    added = prompt[len(asked) :] if asked is not None and prompt.startswith(asked) else chat.profile.generation_prompt
    header = chat.profile.header if chat.text.endswith(chat.profile.header, 0, turn.start) else ""
    place = turn.start - len(header)
    if not added.startswith(header) or chat.text.endswith(added, 0, turn.start):
        place = turn.start - len(added)
    return max(place, 0), added


def _is_printed_otherwise_in_history(chat: _Chat, turn: Turn, prompt: str) -> bool:
    """Return whether the chat up to the turn continues the generation prompt with the same text as the whole chat.

    So it is if the template leaves an empty `<think>` block out of all turns but the last.
    """
    through = chat.render(chat.messages[: turn.message + 1])
    if turn.message + 1 == len(chat.messages) or through is None or not through.startswith(prompt):
        return False
    end = turn.end - _closing_length(chat.text[turn.start : turn.end], chat.profile)
    return end > turn.start and through.startswith(chat.text[turn.start : end], len(prompt))


def _closing_length(text: str, profile: TemplateProfile) -> int:
    closing = (*profile.terminators, *profile.call_terminators)
    return max((len(terminator) for terminator in closing if text.endswith(terminator)), default=0)


_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception"}


@functools.lru_cache(maxsize=64)
def _switches(source: str) -> tuple[str, ...]:
    """Return the variables of a template that a user may set."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    try:
        tree = environment.parse(source)
        names = meta.find_undeclared_variables(tree)
    except TemplateSyntaxError:
        return ()
    names -= {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    return tuple(sorted(name for name in names - _GIVEN if not name.endswith("_token") and name != "strftime_now"))


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
