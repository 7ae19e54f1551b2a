"""Formatting functions that are chosen by the columns of a data set, and the special tokens of ChatML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Value

from sft.chat.formats import FORMATS
from sft.untrusted.templates import chat_templates_in_child

FormattingFunction = Callable[[Any], str | list[str]]

TEXT_TYPES = ("string", "large_string")


@dataclass(frozen=True)
class ChatMlSpecialTokens:
    """Special tokens of the ChatML format, and its template; `setup_chat_format` sets up a model with them.

    `setup_chat_format` does not use this padding token, see docs/coming-from-trl.md.
    """

    bos_token: str = "<|im_start|>"
    eos_token: str = "<|im_end|>"
    pad_token: str = "<|im_end|>"

    @property
    def system(self) -> str:
        """Beginning of a system message."""
        return f"{self.bos_token}system"

    @property
    def user(self) -> str:
        """Beginning of a message of the user."""
        return f"{self.bos_token}user"

    @property
    def assistant(self) -> str:
        """Beginning of a message of the assistant."""
        return f"{self.bos_token}assistant"

    @property
    def chat_template(self) -> str:
        """Jinja template of the named format `chatml`, with these tokens."""
        source = FORMATS["chatml"]
        template = source.template.replace(str(source.bos_token), self.bos_token)
        return template.replace(str(source.eos_token), self.eos_token)


def get_formatting_func_from_dataset(
    dataset: Any, tokenizer: Any, tools: list[Any] | None = None
) -> FormattingFunction | None:
    """Return a function that renders the rows of a data set with a chat template; None for other columns.

    `SFTTrainer` needs no such function: it renders conversations itself, and then can also train their answers alone.

    Args:
        dataset: With a column `messages` or `conversations`, whose messages have exactly `role` and `content`, or with
            exactly the columns `prompt` and `completion` of text.
        tokenizer: Its chat template is applied.
        tools: Schemas of tools, for the template; only for conversations.
    """
    if not isinstance(dataset, Dataset):
        return None
    for column in ("messages", "conversations"):
        if column in dataset.features and _is_chatml(dataset.features[column]):
            return conversations_formatting_function(tokenizer, column, tools)
    if set(dataset.features) == {"prompt", "completion"} and all(map(_is_text, dataset.features.values())):
        return instructions_formatting_function(tokenizer)
    return None


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in TEXT_TYPES


def _is_chatml(feature: Any) -> bool:
    message = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return isinstance(message, Mapping) and set(message) == {"role", "content"} and all(map(_is_text, message.values()))


def conversations_formatting_function(
    tokenizer: Any, messages_field: str = "messages", tools: list[Any] | None = None
) -> FormattingFunction:
    """Return a function that renders a conversation, or a list of texts for a batch.

    Args:
        tokenizer: Its chat template is applied.
        messages_field: Column with the conversations.
        tools: Schemas of tools, for the template.
    """

    def rendered(messages: Any) -> str:
        with chat_templates_in_child():
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)

    def format_conversations(examples: Mapping[str, Any]) -> str | list[str]:
        conversations = examples[messages_field]
        if conversations and isinstance(conversations[0], Mapping):
            return rendered(conversations)
        return [rendered(messages) for messages in conversations]

    return format_conversations


def instructions_formatting_function(tokenizer: Any) -> FormattingFunction:
    """Return a function that renders a prompt and its completion as a conversation, or a list of texts for a batch."""

    def format_pair(prompt: str, completion: str) -> str:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        with chat_templates_in_child():
            return tokenizer.apply_chat_template(messages, tokenize=False)

    def format_instructions(examples: Mapping[str, Any]) -> str | list[str]:
        prompt, completion = examples["prompt"], examples["completion"]
        if isinstance(prompt, str):
            return format_pair(prompt, completion)
        return [format_pair(*pair) for pair in zip(prompt, completion, strict=True)]

    return format_instructions
