"""Characters of token ids: which part of a document's text each token has.

Comparing characters instead of ids finds a text however its beginning and its end were tokenized. Special tokens are
one character each, which no text can contain: text that only spells a special token is not taken for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FIRST_SYMBOL = 0xF0000
"""Code point of the first special token; those after it are for private use, too."""

SYMBOLS = re.compile("[\U000f0000-\U0010ffff]")

INCOMPLETE = "\ufffd"
"""What decoders print for bytes that are not yet a character."""

MAX_GROUP = 64
"""Tokens that are decoded together at most, while the bytes of a character are incomplete."""

MAX_CACHED_GROUPS = 100_000


Offsets = npt.NDArray[np.int64]


class TokenText:
    """Convert token ids to characters, and texts to the same characters.

    Args:
        tokenizer: Tokenizer of the ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {int(token): added[token] for token in added if added[token].special}
        special |= {int(token): special.get(token) for token in tokenizer.all_special_ids}
        self._tokenizer = tokenizer
        self._symbols = {token: chr(FIRST_SYMBOL + number) for number, token in enumerate(sorted(special))}
        self._texts = {
            tokenizer.convert_ids_to_tokens(token): (self._symbols[token], details)
            for token, details in special.items()
        }
        longest_first = sorted(filter(None, self._texts), key=lambda text: (-len(text), text))
        patterns = [_with_stripped_space(re.escape(text), self._texts[text][1]) for text in longest_first]
        self._special_texts = re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)")
        self._replacements = [self._texts[text][0] for text in longest_first]
        self._anchor = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._anchor_text = self._decode(self._anchor)
        self._pieces: dict[int, str] = dict(self._symbols)
        self._groups: dict[tuple[int, ...], str] = {}
        first = self.characters(list(tokenizer.encode("a", add_special_tokens=False)))[0]
        self.adds_space = first.startswith(" ")

    def characters(self, ids: Sequence[int]) -> tuple[str, Offsets, Offsets]:
        """Return the text of token ids, and the characters of each token.

        Args:
            ids: Token ids `(length,)`.

        Returns:
            The text, and two arrays `(length,)`: the first character of which each token has bytes, and the character
            after the last one. If the bytes of a character are divided among tokens, each of them has the character.
        """
        pieces = [self._piece(token) for token in ids]
        lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
        begun = np.zeros(len(pieces), dtype=np.int64)
        start = 0
        while start < len(ids):
            if pieces[start] and INCOMPLETE not in pieces[start]:
                start += 1
                continue
            text, complete = self._group(ids, start)
            stop = start + len(complete)
            pieces[start] = text
            pieces[start + 1 : stop] = [""] * (len(complete) - 1)
            lengths[start:stop] = np.diff(complete, prepend=0)
            begun[start : stop - 1] = np.array(complete[:-1]) < len(text)
            start = stop
        ends = lengths.cumsum()
        return "".join(pieces), ends - lengths, ends + begun

    def spellings(self, template: str | Sequence[int]) -> list[str]:
        """Return the characters that a template may have in a document, the longest first.

        A text appears as it is, or as the tokenizer normalizes it. The space that some tokenizers put before a text is
        none of its characters.

        Args:
            template: Text or token ids.
        """
        if isinstance(template, str):
            raw = self._special_texts.sub(lambda match: self._replacements[match.lastindex - 1], template)  # type: ignore[operator]
            ids = list(self._tokenizer.encode(template, add_special_tokens=False))
            tokenized = self.characters(ids)[0]
            if not raw.startswith(" ") and tokenized.startswith(" "):
                tokenized = tokenized[1:]
            found = {raw, tokenized}
        else:
            tokenized = self.characters([int(token) for token in template])[0]
            found = {tokenized[1:] if self.adds_space and tokenized.startswith(" ") else tokenized}
        return sorted(filter(str.strip, found), key=lambda text: (-len(text), text))

    def readable(self, text: str) -> str:
        """Return characters with special tokens spelled out, for messages."""
        names = {symbol: name for name, (symbol, _) in self._texts.items()}
        return SYMBOLS.sub(lambda match: names.get(match[0], match[0]), text)

    def _piece(self, token: int) -> str:
        """Return the text that a token adds to a text before it."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._after_anchor([token])
        return piece

    def _after_anchor(self, ids: Sequence[int]) -> str:
        """Decode ids after another token: many decoders treat the first token of a text differently."""
        text = self._decode([*self._anchor, *ids])
        has_anchor = bool(self._anchor) and text.startswith(self._anchor_text)
        text = text[len(self._anchor_text) :] if has_anchor else self._decode(ids)
        return SYMBOLS.sub(INCOMPLETE, text)

    def _group(self, ids: Sequence[int], start: int) -> tuple[str, list[int]]:
        """Decode tokens from `start` on together until their bytes are complete characters.

        Returns:
            Their text, and the number of characters that are complete after each of them.
        """
        complete: list[int] = []
        text = ""
        for stop in range(start + 1, min(len(ids), start + MAX_GROUP) + 1):
            if ids[stop - 1] in self._symbols:
                break
            key = tuple(ids[start:stop])
            cached = self._groups.get(key)
            if cached is None:
                if len(self._groups) >= MAX_CACHED_GROUPS:
                    self._groups.clear()
                cached = self._groups[key] = self._after_anchor(key)
            text = cached
            complete.append(max(len(text.rstrip(INCOMPLETE)), complete[-1] if complete else 0))
            if text and not text.endswith(INCOMPLETE):
                break
        complete[-1] = len(text)
        return text, complete

    def _decode(self, ids: Sequence[int]) -> str:
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return decoded


def _with_stripped_space(pattern: str, details: Any) -> str:
    """Return the pattern of a special token's text with the white space that the token removes beside it."""
    before = r"\s*" if getattr(details, "lstrip", False) else ""
    after = r"\s*" if getattr(details, "rstrip", False) else ""
    return f"{before}{pattern}{after}"
