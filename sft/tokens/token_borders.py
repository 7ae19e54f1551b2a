"""Tokens that lie across a border of what is trained: half in the prompt, half in the answer.

Such a token is trained, and with it the end of the prompt. When the model generates, its prompt ends at the border, in
other tokens than those it was trained behind. A template whose generation prompt ends in a space is the usual cause.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from sft.chat.render import Span

_SHOWN = 16


class Crossing(NamedTuple):
    """A token across a border.

    Args:
        token: Its index in the document.
        border: The character at which the border lies.
    """

    token: int
    border: int


def crossing_of(encoding: Encoding, span: Span, first: int, stop: int) -> Crossing | None:
    """The token across the start or the end of a span; None when tokens begin and end with it.

    Args:
        encoding: Tokens of the whole text.
        span: Characters that are trained.
        first: First token of the span.
        stop: The token after its last one.
    """
    if first >= stop:
        return None
    begin, end = encoding.token_to_chars(first), encoding.token_to_chars(stop - 1)
    if begin is not None and begin[0] < span.start < begin[1]:
        return Crossing(first, span.start)
    if end is not None and end[0] < span.end < end[1]:
        return Crossing(stop - 1, span.end)
    return None


def describe(crossing: Crossing, text: str, token_id: int, rules: Tokenizer) -> str:
    """What is wrong, in a sentence that shows the place.

    Args:
        crossing: The token and the border.
        text: The document.
        token_id: The token's id.
        rules: The tokenizer.
    """
    at = crossing.border
    before, behind = text[max(0, at - _SHOWN) : at], text[at : at + _SHOWN]
    token = rules.decode([token_id], skip_special_tokens=False)
    return f"the token {token!r} lies across the border of what is trained: {before!r} | {behind!r}"
