"""Checks of chats before training: every trained turn ends in a stop token, and no message spells out a special token.

A model stops because it was trained to generate a token at which generation ends. If the trained part of a turn does
not include that token, or if generation ends at a different one, the tuned model never stops. If a message contains the
text of a special token, it could end its own turn or begin another one.
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
"""Number of rows that an error shows."""

BREAK = "\u200b"
"""Zero-width space, inserted after the first character of a special token so that it is tokenized as text."""


class TerminatorCheck:
    """Check that trained spans end in a token that stops generation, row by row.

    Args:
        tokenizer: Tokenizer whose end-of-sequence token stops generation.
        stop_token_ids: Further ids that stop generation, as listed in the generation config.
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
        """Check one row."""
        for number, span in enumerate(rendered.spans, start=1):
            # an inner turn may end in any special token, as long as the last turn ends in one that stops generation
            closing = self.stop_texts if number == len(rendered.spans) else self._special_tokens
            closed = rendered.append_eos and span.end == len(rendered.text)
            # a line break that the template prints after the stop token is harmless
            trained = rendered.text[span.start : span.end].rstrip()
            self.num_spans += 1
            if not closed and not trained.endswith(closing or ("\0",)):
                self.num_open += 1
                if len(self._examples) < NUM_EXAMPLES:
                    self._examples.append(f"{row_id} ends in {trained[-24:]!r}")

    def join(self, other: TerminatorCheck) -> None:
        """Add the results of another check, with the same tokenizer, of the rows after these."""
        self.num_spans += other.num_spans
        self.num_open += other.num_open
        self._examples = [*self._examples, *other._examples][:NUM_EXAMPLES]

    def finish(self) -> None:
        """Raise an error if a trained turn does not end in a stop token.

        Raises:
            ValueError: States how many do not, shows the first ones, and names the stop tokens.
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
    """Find texts of special tokens inside the messages of a record, and make plain text of them.

    Records of plain text (`text`, or prompt and completion as text) are not checked: they may contain special tokens.

    Args:
        tokenizer: The tokenizer. Only its special tokens are looked for; `<think>`, for example, often is not one.
        allowed: Special tokens that messages may contain.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, allowed: Iterable[str] = ()) -> None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts = {text for text in special | set(tokenizer.all_special_tokens) if text.strip()} - set(allowed)
        self._tokenizer = tokenizer
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._ids = set(tokenizer.convert_tokens_to_ids(sorted(texts - {str(tokenizer.unk_token)})))

    def find(self, record: Mapping[str, Any]) -> Problem | None:
        """Return the first special token that a message, a tool call or a tool contains as text."""
        for content in _chat_contents(record):
            match = self._pattern.search(content.text)
            if match:
                around = content.text[max(0, match.start() - 15) : match.end() + 15]
                return Problem("special_text", f"{content.place} spells out {match[0]!r}: {around!r}")
        return None

    def neutralised(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the record with special tokens turned into plain text.

        Returns:
            None if the tokenizer still produces a special token for one of the texts.
        """
        broken = {
            content.path: self._pattern.sub(_break_up, content.text)
            for content in _chat_contents(record)
            if self._pattern.search(content.text)
        }
        ids = (self._tokenizer.encode(text, add_special_tokens=False) for text in broken.values())
        return None if any(self._ids.intersection(row) for row in ids) else with_texts(record, broken)


def _break_up(match: re.Match[str]) -> str:
    return f"{match[0][:1]}{BREAK}{match[0][1:]}"


def _chat_contents(record: Mapping[str, Any]) -> Iterator[Content]:
    is_chat = not isinstance(record.get("completion", record.get("text")), str)
    return (content for content in contents(record) if is_chat)
