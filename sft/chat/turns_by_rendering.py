"""Assistant turns of chats whose template edits or inspects the content: found by rendering variants of the chat.

Two methods, both verified against the text: the messages up to a turn must render to a prefix of it; or, where later
messages change how earlier ones are printed, the chat with only that turn's content replaced must differ nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sft.chat.template import PROBE_ANSWER, ChatTemplate, Messages, TemplateProfile, common_length


class Turn(NamedTuple):
    """What the assistant generates for one message: characters `start` to `end` of the rendered chat."""

    message: int
    start: int
    end: int


def assistant_indices(messages: Messages) -> list[int]:
    """Positions of the assistant's messages."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class _Chat:
    template: ChatTemplate
    profile: TemplateProfile
    messages: Messages
    tools: list[Any] | None
    text: str

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str | None:
        """Render a variant of the chat, which the template may refuse although it accepts the chat itself."""
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
    """Find assistant turns of a rendered chat; quadratic in the number of turns that are not known already.

    Args:
        template: The template.
        profile: What `TemplateProfile.probe` found about it.
        messages: Messages as `template_messages` returns them.
        tools: Tool schemas.
        text: The rendered chat.
        known: Message index -> its turn, where it was found by other means.

    Returns:
        The turns of all assistant messages, in order.

    Raises:
        ValueError: Neither method explains the text; names the turn and shows where the texts part.
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
    """Where generation begins after some messages: after the generation prompt, or what the history has of it."""
    prompt = chat.render(messages, add_generation_prompt=True)
    if prompt is not None and through.startswith(prompt):
        return len(prompt)
    before = chat.render(messages)
    if before is not None and through.startswith(before + chat.profile.header):
        return len(before) + len(chat.profile.header)
    return None


def _cut_tail(through: str, start: int, profile: TemplateProfile) -> int:
    """Where the terminator ends in a text that ends with a whole turn."""
    if through.endswith(profile.tail, start):
        return len(through) - len(profile.tail) + len(profile.terminator)
    at = through.rfind(profile.terminator, start) if profile.stop_token is not None else -1
    return at + len(profile.terminator) if at >= 0 else len(through)


def _turn_by_replacement(chat: _Chat, index: int, previous_end: int) -> Turn | None:
    """The turn between the texts that stay the same when its content is another word."""
    replaced = {"role": "assistant", "content": PROBE_ANSWER}
    other = chat.render([*chat.messages[:index], replaced, *chat.messages[index + 1 :]])
    if chat.messages[index].get("tool_calls") or other is None or PROBE_ANSWER not in other:
        return None
    before, _, rest = other.partition(PROBE_ANSWER)
    same, end = common_length(chat.text, before), len(chat.text) - len(rest)
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
    same = common_length(chat.text, prefix)
    near = slice(max(0, same - 40), same + 40)
    return (
        f"the assistant's turn in message {index} cannot be located: the template prints the messages up to it "
        f"differently at the end of a conversation (...{prefix[near]!r}) than inside this one "
        f"(...{chat.text[near]!r}). Mark what the assistant generates in the template with "
        "{% generation %} ... {% endgeneration %}"
    )
