"""Where the tokens of byte-level tokenizers lie in a text, from their lengths alone.

Such tokens, one after another, are the bytes of the text. So a running sum of their lengths gives every border, and
the tokenizer need not keep a table of characters, which costs it a third of its time. Whatever breaks the rule (a token
that takes whitespace along, a normalizer that changes the text) shows in the sum, and the text goes the longer way.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sft.chat.render import Rendered
from sft.tokens.token_borders import Crossing

Run = tuple[int, int, float]
"""First token that is trained, the token after the last one, and the weight of their loss."""

_PROBE = "a b\n\nc  d é\u4e2d 12 <x>"


@dataclass(frozen=True)
class TokenBytes:
    """Byte lengths of a tokenizer's tokens.

    Args:
        lengths: `(largest id + 1,)` bytes that each token stands for.
        is_normalizing: Whether the tokenizer brings text to Unicode's form NFC.
        adds_tokens: Whether the tokenizer puts tokens of its own around a text when asked for special tokens.
    """

    lengths: npt.NDArray[np.int64]
    is_normalizing: bool
    adds_tokens: bool

    @classmethod
    def of(cls, rules: Tokenizer) -> TokenBytes | None:
        """Byte lengths of a tokenizer whose tokens are bytes; None for any other."""
        state = json.loads(rules.to_str())
        normalizer = (state.get("normalizer") or {}).get("type")
        if "ByteLevel" not in _types(state.get("pre_tokenizer")) or normalizer not in (None, "NFC"):
            return None
        added = {token["id"]: token["content"] for token in state["added_tokens"]}
        vocabulary = rules.get_vocab(with_added_tokens=True)
        lengths = np.zeros(max(vocabulary.values(), default=0) + 1, dtype=np.int64)
        for text, token in vocabulary.items():
            # the byte-level alphabet has one character for each byte; added tokens are spelled as they are
            lengths[token] = len(added[token].encode()) if token in added else len(text)
        found = cls(lengths, normalizer is not None, rules.num_special_tokens_to_add(False) > 0)
        ids = rules.encode(_PROBE, add_special_tokens=False).ids
        return found if int(lengths[ids].sum()) == len(_PROBE.encode()) else None

    def covers(self, item: Rendered) -> bool:
        """Whether the tokens of a text are its bytes, so that its runs can be found here."""
        if item.add_special_tokens and self.adds_tokens:
            return False
        return not self.is_normalizing or unicodedata.is_normalized("NFC", item.text)

    def runs(
        self, rendered: Sequence[Rendered], ids: Sequence[npt.NDArray[np.int32]]
    ) -> tuple[list[list[Run] | None], dict[int, Crossing]]:
        """The trained tokens of every document of a batch.

        Args:
            rendered: Texts with their spans.
            ids: Token ids of each.

        Returns:
            The runs of every document, None for one whose tokens do not add up to its text; and for documents in
            which a token lies across the border of a span the first such token.
        """
        counts = np.array([len(tokens) for tokens in ids], dtype=np.int64)
        flat = np.concatenate([np.zeros(0, dtype=np.int32), *ids])
        borders = np.concatenate([[0], np.cumsum(self.lengths[flat])])
        first_tokens = np.cumsum(counts) - counts
        bases = borders[first_tokens]
        expected = np.array([_num_bytes(item.text, len(item.text)) for item in rendered], dtype=np.int64)
        fits = (borders[first_tokens + counts] - bases == expected).tolist()
        spans = [(number, item.text, span) for number, item in enumerate(rendered) for span in item.spans]
        documents = np.array([number for number, _, _ in spans], dtype=np.int64)
        starts = np.array([_num_bytes(text, span.start) for _, text, span in spans], dtype=np.int64)
        ends = np.array([_num_bytes(text, span.end) for _, text, span in spans], dtype=np.int64)
        # the first token that ends behind a span's start, and the first that begins at or behind its end
        first = np.searchsorted(borders[1:], bases[documents] + starts, side="right") - first_tokens[documents]
        last = np.searchsorted(borders[:-1], bases[documents] + ends, side="left") - first_tokens[documents]
        # both index borders: the one before a run's first token, and the one behind its last
        early = borders[first_tokens[documents] + np.minimum(first, counts[documents])] < bases[documents] + starts
        late = borders[first_tokens[documents] + last] > bases[documents] + ends
        crossings: dict[int, Crossing] = {}
        for place in np.flatnonzero(early | late).tolist():
            number, _, span = spans[place]
            if span.start < span.end:
                at_start = bool(early[place])
                token = int(first[place] if at_start else last[place] - 1)
                crossings.setdefault(number, Crossing(token, span.start if at_start else span.end))
        runs: list[list[Run]] = [[] for _ in rendered]
        for (number, _, span), begin, stop in zip(spans, first.tolist(), last.tolist(), strict=True):
            runs[number].append((begin, stop, span.weight) if span.start < span.end else (0, 0, span.weight))
        return [found if fit else None for found, fit in zip(runs, fits, strict=True)], crossings


def _num_bytes(text: str, num_characters: int) -> int:
    return num_characters if text.isascii() else len(text[:num_characters].encode("utf-8", "surrogatepass"))


def _types(part: dict[str, Any] | None) -> set[str]:
    """Types of a tokenizer's part and of the parts that it consists of."""
    if part is None:
        return set()
    return {str(part.get("type"))}.union(*map(_types, part.get("pretokenizers", [])))
