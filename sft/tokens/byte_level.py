"""Faster encoding with byte-level tokenizers: token positions from token lengths, and a cache of words.

The tokens of a byte-level tokenizer, one after another, are the bytes of the text. A running sum of their lengths gives
the position of every token (`TokenBytes`), so the tokenizer does not have to compute character offsets, which takes a
third of its time. If a tokenizer breaks this rule (a token that includes adjacent whitespace, a normalizer that changes
the text), the sum differs from the length of the text, and the offsets are used instead.

Byte-level tokenizers split a text into words first, and always before a single space between two visible characters. So
a text may be cut there, and frequent words are tokenized once (`WordCache`). Whether a tokenizer allows this is checked
on its configuration and tried for every character at which texts are cut.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sft.chat.render import Rendered

Run = tuple[int, int, float]
"""First trained token, the token after the last trained one, and the weight of their loss."""

Ids = npt.NDArray[np.int32]

MAX_CHARACTERS = 8_000_000
"""Characters of cached words, which take about 100 MB with their ids and Python's overhead."""

MAX_NEW_SHARE = 0.4
"""Share of a batch's characters in new words above which the cache does not pay."""

NUM_BATCHES_WITHOUT = 8
"""Batches for which the cache is then skipped."""

_PROBE = "a b\n\nc  d é\u4e2d 12 <x>"

# Characters at which texts may be cut: printable ASCII, Latin, Greek and Cyrillic letters, dashes, quotation marks.
_CUT_AT = "!-~\u00a1-\u00ac\u00ae-\u024f\u0370-\u03ff\u0400-\u04ff\u2010-\u2027"

_PART = re.compile(rf"[\s\S][^ ]*(?:(?:(?<![{_CUT_AT}]) | (?![{_CUT_AT}]))[^ ]*)*")

_TYPICAL = "aZ0.'(<-_\"#)>"

_PRE_TOKENIZERS = {"Sequence", "ByteLevel", "Split", "Digits"}


class Crossing(NamedTuple):
    """A token that crosses the border of a trained span.

    Args:
        token: Index of the token in the document.
        border: Character index of the border.
    """

    token: int
    border: int


@dataclass(frozen=True)
class TokenBytes:
    """Byte lengths of a tokenizer's tokens.

    Args:
        lengths: `(largest id + 1,)` number of bytes of each token.
        is_normalizing: Whether the tokenizer normalizes text to Unicode's NFC.
        adds_tokens: Whether the tokenizer adds tokens to a text with `add_special_tokens=True`.
    """

    lengths: npt.NDArray[np.int64]
    is_normalizing: bool
    adds_tokens: bool

    @classmethod
    def of(cls, rules: Tokenizer) -> TokenBytes | None:
        """Return the byte lengths of a byte-level tokenizer; None for any other."""
        state = json.loads(rules.to_str())
        normalizer = (state.get("normalizer") or {}).get("type")
        if "ByteLevel" not in _types(state.get("pre_tokenizer")) or normalizer not in (None, "NFC"):
            return None
        added = {token["id"]: token["content"] for token in state["added_tokens"]}
        vocabulary = rules.get_vocab(with_added_tokens=True)
        lengths = np.zeros(max(vocabulary.values(), default=0) + 1, dtype=np.int64)
        for text, token in vocabulary.items():
            # the byte-level alphabet has one character per byte; added tokens are stored as plain text
            lengths[token] = len(added[token].encode()) if token in added else len(text)
        found = cls(lengths, normalizer is not None, rules.num_special_tokens_to_add(False) > 0)
        ids = rules.encode(_PROBE, add_special_tokens=False).ids
        return found if int(lengths[ids].sum()) == len(_PROBE.encode()) else None

    def covers(self, item: Rendered) -> bool:
        """Return whether the tokens of a text should add up to its bytes, so that `runs` can locate them."""
        if item.add_special_tokens and self.adds_tokens:
            return False
        return not self.is_normalizing or unicodedata.is_normalized("NFC", item.text)

    def runs(
        self, rendered: Sequence[Rendered], ids: Sequence[npt.NDArray[np.int32]]
    ) -> tuple[list[list[Run] | None], dict[int, Crossing]]:
        """Find the trained tokens of every document of a batch.

        Args:
            rendered: Texts with their spans.
            ids: Token ids of each document, `(num_tokens,)`.

        Returns:
            The runs of every document (None if its tokens do not add up to its text); and the first token that crosses
            the border of a span, by the index of the document.
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
        # the first token that ends after a span's start, and the first that begins at or after its end
        first = np.searchsorted(borders[1:], bases[documents] + starts, side="right") - first_tokens[documents]
        last = np.searchsorted(borders[:-1], bases[documents] + ends, side="left") - first_tokens[documents]
        # whether the borders before a run's first token and after its last token lie outside of the span
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
    """Return the types of a tokenizer component and of its subcomponents."""
    if part is None:
        return set()
    return {str(part.get("type"))}.union(*map(_types, part.get("pretokenizers", [])))


class WordCache:
    """Tokenize texts word by word, and cache the ids of words.

    Args:
        rules: A tokenizer; `WordCache.of` checks that its texts may be cut at spaces.
    """

    def __init__(self, rules: Tokenizer) -> None:
        self._rules = rules
        self._known: dict[str, bytes] = {}
        self._num_characters = 0
        self._num_without = 0

    @classmethod
    def of(cls, rules: Tokenizer) -> WordCache | None:
        """Return a cache for a tokenizer whose texts may be cut at single spaces; None for any other."""
        state = json.loads(rules.to_str())
        model, steps = state["model"], list(_steps(state.get("pre_tokenizer")))
        if model.get("type") != "BPE" or model.get("dropout") or not steps:
            return None
        if not all(_is_tokenize(step) for step in steps) or any(map(_crosses_spaces, state["added_tokens"])):
            return None
        return cls(rules) if _divides_before_spaces(rules) else None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of every text, `(num_tokens,)` each, as the tokenizer does without special tokens."""
        if self._num_without:
            self._num_without -= 1
            return self._tokenize(texts)
        parts = [_PART.findall(text) for text in texts]
        self._learn(set().union(*parts).difference(self._known), sum(map(len, texts)))
        look_up = self._known.__getitem__
        ids = [np.frombuffer(b"".join(map(look_up, words)), dtype=np.int32) for words in parts]
        if self._num_characters > MAX_CHARACTERS:
            self._known.clear()
            self._num_characters = 0
        return ids

    def _learn(self, words: Iterable[str], num_all: int) -> None:
        new = sorted(words)
        for word, ids in zip(new, self._tokenize(new), strict=True):
            self._known[word] = ids.tobytes()
        num_new = sum(map(len, new))
        self._num_characters += num_new
        self._num_without = NUM_BATCHES_WITHOUT if num_new > MAX_NEW_SHARE * num_all else 0

    def _tokenize(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._rules.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _steps(part: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    """Yield the pre-tokenizers of a tokenizer, including nested ones."""
    if part is not None:
        yield part
        yield from itertools.chain.from_iterable(map(_steps, part.get("pretokenizers", [])))


def _is_tokenize(step: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer splits a text by its characters only, and adds no space in front."""
    if step["type"] not in _PRE_TOKENIZERS or step.get("add_prefix_space"):
        return False
    return step["type"] != "Split" or step["behavior"] == "Isolated"


def _crosses_spaces(token: dict[str, Any]) -> bool:
    """Return whether an added token may match a space between two words, or depends on the text around it."""
    if token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"]:
        return True
    content = token["content"]
    return " " in content and (content == " " or bool(content.strip()))


def _divides_before_spaces(rules: Tokenizer) -> bool:
    pre_tokenize = rules.pre_tokenizer.pre_tokenize_str
    characters = [character for character in map(chr, range(0x2028)) if re.match(f"[{_CUT_AT}]", character)]
    pairs = [*itertools.product(characters, _TYPICAL), *itertools.product(_TYPICAL, characters)]
    return all(any(start == 1 for _, (start, _) in pre_tokenize(f"{left} {right}")) for left, right in pairs)
