"""Whether a model trained on rendered rows will learn to stop.

A model stops because it was trained to print a token at which generation ends. If the trained part of a turn does not
include that token, or if generation waits for another one, the tuned model talks on for ever.

Special tokens spelled out in what people wrote, with which a row could end its own turn or begin another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft.chat.render import Rendered
from sft.chat.template import special_token_texts
from sft.data.contents import Content, contents, with_texts
from sft.data.messages import Problem

NUM_EXAMPLES = 3

BREAK = "\u200b"
"""Put behind the first character of a token's text, so that it is read as text: it shows nothing."""


class TerminatorCheck:
    """Looks at the end of every trained span, row by row.

    Args:
        tokenizer: Its end-of-sequence token ends generation.
        stop_token_ids: Further ids that end it, as the generation config lists them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int] = ()) -> None:
        tokens = tokenizer.convert_ids_to_tokens(sorted(set(stop_token_ids)))
        own = [str(tokenizer.eos_token)] if tokenizer.eos_token is not None else []
        self.stop_texts = tuple(dict.fromkeys([*own, *(token for token in tokens if token)]))
        self._special_tokens = tuple(special_token_texts(tokenizer))
        self.num_spans = 0
        self.num_open = 0
        self._examples: list[str] = []

    def add(self, row_id: str, rendered: Rendered) -> None:
        """Look at one row."""
        for number, span in enumerate(rendered.spans, start=1):
            # an inner turn may be closed by a token of its own, as long as the last one stops generation
            closing = self.stop_texts if number == len(rendered.spans) else self._special_tokens
            closed = rendered.append_eos and span.end == len(rendered.text)
            # a template may print a line break after the stop token, which does no harm
            trained = rendered.text[span.start : span.end].rstrip()
            self.num_spans += 1
            if not closed and not trained.endswith(closing or ("\0",)):
                self.num_open += 1
                if len(self._examples) < NUM_EXAMPLES:
                    self._examples.append(f"{row_id} ends in {trained[-24:]!r}")

    def join(self, other: TerminatorCheck) -> None:
        """Add what a check of the same tokenizer found in the rows after these."""
        self.num_spans += other.num_spans
        self.num_open += other.num_open
        self._examples = [*self._examples, *other._examples][:NUM_EXAMPLES]

    def finish(self) -> None:
        """Raise when a trained turn does not end in a stop token.

        Raises:
            ValueError: Says how many, shows the first ones, and what would stop generation.
        """
        if self.num_open:
            stops = ", ".join(map(repr, self.stop_texts)) or "the tokenizer has none"
            raise ValueError(
                f"{self.num_open} of {self.num_spans} trained turns do not end in a token that stops generation "
                f"({stops}), so the model would never learn to stop: {'; '.join(self._examples)}. Make the chat "
                "template close the assistant's turns with one of them, inside its generation marks if it has any, or "
                "make its closing token the tokenizer's eos_token"
            )


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
