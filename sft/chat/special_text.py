"""Special tokens spelled out in what people wrote, with which a row could end its own turn or begin another one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft.data.contents import Content, contents, with_texts
from sft.data.messages import Problem

BREAK = "\u200b"
"""Put behind the first character of a token's text, so that it is read as text: it shows nothing."""


class SpecialText:
    """Finds texts of special tokens inside the messages of a record, and makes plain text of them.

    Plain text (`text`, or prompt and completion as text) goes to the model as it is, and may well hold special tokens.

    Args:
        tokenizer: The tokenizer; tokens that are not special, such as `<think>` in many, belong to no one.
        allowed: Special tokens that rows may spell out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, allowed: Iterable[str] = ()) -> None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts = {text for text in special | set(tokenizer.all_special_tokens) if text.strip()} - set(allowed)
        self._tokenizer = tokenizer
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._ids = set(tokenizer.convert_tokens_to_ids(sorted(texts - {str(tokenizer.unk_token)})))

    def find(self, record: Mapping[str, Any]) -> Problem | None:
        """Find the first special token that a message, a call or a tool spells out."""
        for content in _of_people(record):
            match = self._pattern.search(content.text)
            if match:
                around = content.text[max(0, match.start() - 15) : match.end() + 15]
                return Problem("special_text", f"{content.place} spells out {match[0]!r}: {around!r}")
        return None

    def neutralised(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record with such texts broken up; None where this tokenizer would read a special token all the same."""
        broken = {
            content.path: self._pattern.sub(_broken, content.text)
            for content in _of_people(record)
            if self._pattern.search(content.text)
        }
        ids = (self._tokenizer.encode(text, add_special_tokens=False) for text in broken.values())
        return None if any(self._ids.intersection(row) for row in ids) else with_texts(record, broken)


def _broken(match: re.Match[str]) -> str:
    return f"{match[0][:1]}{BREAK}{match[0][1:]}"


def _of_people(record: Mapping[str, Any]) -> Iterator[Content]:
    is_chat = not isinstance(record.get("completion", record.get("text")), str)
    return (content for content in contents(record) if is_chat)
