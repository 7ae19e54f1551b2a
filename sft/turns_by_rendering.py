"""Assistant turns of chats whose template edits or inspects the content: found by rendering variants of the chat.

Two methods, both verified against the text: the messages up to a turn must render to a prefix of it; or, where later
messages change how earlier ones are printed, the chat with only that turn's content replaced must differ nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sft.chat_template import PROBE_ANSWER, ChatTemplate, Messages, TemplateProfile, common_length


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

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        return self.template.render([messages], self.tools, add_generation_prompt=add_generation_prompt)[0]


def turns_by_rendering(
    template: ChatTemplate, profile: TemplateProfile, messages: Messages, tools: list[Any] | None, text: str
) -> list[Turn]:
    """Find the assistant turns of a rendered chat; quadratic in the number of turns.

    Raises:
        ValueError: Neither method explains the text; names the turn and shows where the texts part.
    """
    chat = _Chat(template, profile, messages, tools, text)
    turns: list[Turn] = []
    for index in assistant_indices(messages):
        turn = _turn_by_prefixes(chat, index) or _turn_by_replacement(chat, index, turns[-1].end if turns else 0)
        if turn is None:
            raise ValueError(_not_found(chat, index))
        turns.append(turn)
    return turns


def _turn_by_prefixes(chat: _Chat, index: int) -> Turn | None:
    if index == 0:
        return None
    before = chat.render(chat.messages[:index], add_generation_prompt=True)
    through = chat.render(chat.messages[: index + 1])
    if not (chat.text.startswith(through) and through.startswith(before)):
        return None
    return Turn(index, len(before), _cut_tail(through, len(before), chat.profile))


def _cut_tail(through: str, start: int, profile: TemplateProfile) -> int:
    """Where the terminator ends in a text that ends with a whole turn."""
    if through.endswith(profile.tail, start):
        return len(through) - len(profile.tail) + len(profile.terminator)
    at = through.rfind(profile.terminator, start) if profile.stop_token is not None else -1
    return at + len(profile.terminator) if at >= 0 else len(through)


def _turn_by_replacement(chat: _Chat, index: int, previous_end: int) -> Turn | None:
    """The turn between the texts that stay the same when its content is another word."""
    if chat.messages[index].get("tool_calls"):
        return None
    replaced = {"role": "assistant", "content": PROBE_ANSWER}
    other = chat.render([*chat.messages[:index], replaced, *chat.messages[index + 1 :]])
    at = other.find(PROBE_ANSWER)
    rest = other[at + len(PROBE_ANSWER) :]
    same = common_length(chat.text, other[: max(at, 0)])
    end = len(chat.text) - len(rest)
    anchor = chat.profile.generation_prompt or chat.profile.after_question
    start = (
        chat.text.rfind(anchor, previous_end, same) + len(anchor) if anchor in chat.text[previous_end:same] else same
    )
    if at < 0 or not chat.text.endswith(rest) or not (anchor or same == at) or end < start:
        return None
    return Turn(index, start, end + _terminator_length(rest, chat.profile))


def _terminator_length(rest: str, profile: TemplateProfile) -> int:
    return max((len(terminator) for terminator in profile.terminators if rest.startswith(terminator)), default=0)


def _not_found(chat: _Chat, index: int) -> str:
    prefix = chat.render(chat.messages[: index + 1])
    same = common_length(chat.text, prefix)
    near = slice(max(0, same - 40), same + 40)
    return (
        f"the assistant's turn in message {index} cannot be located: the template prints the messages up to it "
        f"differently at the end of a conversation (...{prefix[near]!r}) than inside this one "
        f"(...{chat.text[near]!r}). Mark what the assistant generates in the template with "
        "{% generation %} ... {% endgeneration %}"
    )
