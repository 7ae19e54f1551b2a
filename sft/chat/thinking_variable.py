"""The variable of a chat template that decides about reasoning, set as the policy on reasoning needs it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sft.chat.formats import set_template_variables
from sft.chat.template import Messages, chat_template_of
from sft.chat.thinking import TemplateThinking, has_earlier_reasoning
from sft.options import ThinkingPolicy


def set_thinking_variable(
    tokenizer: Any, thinking: ThinkingPolicy, chats: Iterable[Messages], given: Mapping[str, Any] | None = None
) -> dict[str, bool]:
    """Set the variable of the chat template that a policy on reasoning needs, in the template itself.

    `drop` needs one such as `enable_thinking: false`, with which the generation prompt asks for no reasoning. `keep`
    needs one such as `preserve_thinking: true` if a chat has reasoning before its last question; without such a chat,
    the template stays as it is. The other policies take the template as it is.

    Args:
        tokenizer: Tokenizer or processor.
        thinking: The policy.
        chats: Chats of the data set, read only if it matters what they say.
        given: Variables that the user set.

    Returns:
        The variable and its value; empty if none is set.

    Raises:
        ValueError: The user set the variable to another value.
    """
    if not tokenizer.chat_template or thinking not in ("keep", "drop"):
        return {}
    how = TemplateThinking(chat_template_of(tokenizer))
    variable = how.silencing_variable() if thinking == "drop" else how.keeping_variable()
    for name in variable.keys() & (given or {}).keys():
        if thinking == "drop":
            raise ValueError(
                f"thinking drop needs {name}={json.dumps(variable[name])} of the chat template, and "
                f"chat_template_kwargs sets it to {json.dumps((given or {})[name])}; remove it there, or state "
                "thinking: keep"
            )
        return {}
    if not variable or (thinking == "keep" and not any(map(has_earlier_reasoning, chats))):
        return {}
    set_template_variables(tokenizer, variable)
    return variable
