"""Functions on examples of data sets: tell conversations from text, and apply a chat template to them.

`SFTTrainer` needs none of these: it reads all these forms of rows itself, and finds what is trained in the rendered
text. They are for scripts that prepare their rows, and take rows with preferences, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft.common_prefix import common_prefix_length
from sft.untrusted.templates import chat_templates_in_child

MESSAGE_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages")
"""Columns of an example that may be conversations."""

ANSWERS = ("completion", "chosen", "rejected")
"""Columns that continue a prompt."""

FORMS = (
    {"messages"},
    {"prompt"},
    {"prompt", "completion"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
    {"prompt", "completion", "label"},
)
"""Columns that examples have together: the known forms of language modelling and preference data."""

Example = Mapping[str, Any]


def is_conversational(example: Example) -> bool:
    """Return whether an example has conversations, as lists of messages with a role, instead of text."""
    return any(_begins_with(example.get(column), "role") for column in MESSAGE_COLUMNS)


def is_conversational_from_value(example: Example) -> bool:
    """Return whether an example has a column `conversations` of turns with the keys `from` and `value`."""
    return _begins_with(example.get("conversations"), "from", "value")


def _begins_with(messages: Any, *keys: str) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    return isinstance(messages[0], Mapping) and all(key in messages[0] for key in keys)


def maybe_convert_to_chatml(example: Example) -> dict[str, Any]:
    """Return an example whose turns have `role` and `content` instead of `from` and `value`, in a column `messages`.

    Roles keep their names. An example that has them already is returned with the same content.
    """
    renamed = {"from": "role", "value": "content"}
    result = dict(example)
    for column in (*MESSAGE_COLUMNS, "conversations"):
        turns = result.get(column)
        if isinstance(turns, list):
            result[column] = [
                {renamed.get(key, key): value for key, value in turn.items()} if isinstance(turn, Mapping) else turn
                for turn in turns
            ]
    if "conversations" in result:
        result["messages"] = result.pop("conversations")
    return result


def apply_chat_template(
    example: Example,
    processing_class: Any = None,
    tools: Sequence[dict[str, Any] | Callable] | None = None,
    *,
    tokenizer: Any = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Render the conversations of an example as text.

    A prompt ends where generation starts: with the generation prompt, or inside the assistant message that it ends
    with. An answer is what the template prints after the prompt, to the end of the text. Where the template prints the
    prompt otherwise once an answer follows, the prompt is cut to what both texts begin with.

    Args:
        example: Columns of one of `FORMS`, each a list of messages, and perhaps `chat_template_kwargs` with variables
            of the template, as an object or its JSON text. Other columns are not read.
        processing_class: Tokenizer or processor whose chat template is applied.
        tools: Schemas of tools, or Python functions that describe themselves, for the template.
        tokenizer: Former name of `processing_class`; give one of the two.
        template_kwargs: Further variables of the template.

    Returns:
        The same columns as text; `text` instead of `messages`. A `label` is kept.

    Raises:
        KeyError: The columns are none of the known forms.
        ValueError: There is no tokenizer, the template refuses a conversation, or the prompt ends with a message that
            neither asks nor answers.
    """
    processing_class = processing_class if processing_class is not None else tokenizer
    if processing_class is None:
        raise ValueError("apply_chat_template needs a tokenizer: apply_chat_template(example, tokenizer)")
    found = {column for column in (*MESSAGE_COLUMNS, "label") if column in example}
    if found not in FORMS:
        known = "; ".join(", ".join(sorted(form)) for form in FORMS)
        raise KeyError(f"Invalid keys in the example: {sorted(found)}. Known are {known}")
    variables = example.get("chat_template_kwargs") or {}
    variables = json.loads(variables) if isinstance(variables, str) else variables

    def rendered(messages: list[Any], **how: Any) -> str:
        # an empty list of tools would make some templates print an empty tool section
        arguments = {**variables, **template_kwargs, **how}
        with chat_templates_in_child():
            return processing_class.apply_chat_template(messages, tools=tools or None, tokenize=False, **arguments)

    if "messages" in example:
        return {"text": rendered(example["messages"])}
    if "prompt" not in example:
        return {column: rendered(example[column]) for column in ANSWERS if column in example}
    prompt = rendered(example["prompt"], **_how_prompt_ends(example["prompt"]))
    texts = {column: rendered([*example["prompt"], *example[column]]) for column in ANSWERS if column in example}
    shared = min((common_prefix_length(prompt, text) for text in texts.values()), default=len(prompt))
    result = {"prompt": prompt[:shared], **{column: text[shared:] for column, text in texts.items()}}
    return {**result, "label": example["label"]} if "label" in example else result


def _how_prompt_ends(prompt: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    role = prompt[-1]["role"] if prompt else None
    if role == "assistant":
        return {"add_generation_prompt": False, "continue_final_message": True}
    if role in ("user", "tool"):
        return {"add_generation_prompt": True, "continue_final_message": False}
    raise ValueError(
        f"Invalid role in the last message: {role!r}. A prompt ends with a message of user or tool, which is answered, "
        "or of assistant, which is continued"
    )


def maybe_apply_chat_template(
    example: Example,
    processing_class: Any = None,
    tools: Sequence[dict[str, Any] | Callable] | None = None,
    *,
    tokenizer: Any = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Render the conversations of an example as text; return an example of text as it is.

    See `apply_chat_template` for the arguments, the result and the errors.
    """
    if not is_conversational(example):
        return dict(example)
    return apply_chat_template(example, processing_class, tools, tokenizer=tokenizer, **template_kwargs)
