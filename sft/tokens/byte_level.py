"""Where the tokens of byte-level tokenizers lie in a text, from their lengths alone.

Such tokens, one after another, are the bytes of the text. So a running sum of their lengths gives every border, and
the tokenizer need not keep a table of characters, which costs it a third of its time. Whatever breaks the rule (a token
that takes whitespace along, a normalizer that changes the text) shows in the sum, and the text goes the longer way.

Token ids of texts, put together from those of their words: what occurs again and again is tokenized once.

Byte-level tokenizers divide a text before they look for tokens, and before a single space between two signs they
always do. So a text may be cut there, and each part be looked up. Whether a tokenizer is of this kind is read off its
rules and tried out on every sign at which texts are cut here; one that is not gives None, and is used as it is.
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
"""First token that is trained, the token after the last one, and the weight of their loss."""

Ids = npt.NDArray[np.int32]

MAX_CHARACTERS = 8_000_000
"""Characters of words remembered: some 100 MB with their ids and what Python needs."""

MAX_NEW_SHARE = 0.4

NUM_BATCHES_WITHOUT = 8
"""Where more than this share of the characters of a batch is in new words, looking up does not pay for a while."""

_PROBE = "a b\n\nc  d é\u4e2d 12 <x>"

# printable ASCII, letters of Latin, Greek and Cyrillic, dashes and quotation marks: signs at which texts are cut
_SIGNS = "!-~\u00a1-\u00ac\u00ae-\u024f\u0370-\u03ff\u0400-\u04ff\u2010-\u2027"

_PART = re.compile(rf"[\s\S][^ ]*(?:(?:(?<![{_SIGNS}]) | (?![{_SIGNS}]))[^ ]*)*")

_TYPICAL = "aZ0.'(<-_\"#)>"

_PRE_TOKENIZERS = {"Sequence", "ByteLevel", "Split", "Digits"}


class Crossing(NamedTuple):
    """A token across a border.

    Args:
        token: Its index in the document.
        border: The character at which the border lies.
    """

    token: int
    border: int


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


class WordCache:
    """Tokenizes texts by their words.

    Args:
        rules: A tokenizer's rules; `WordCache.of` makes sure that they are of the right kind.
    """

    def __init__(self, rules: Tokenizer) -> None:
        self._rules = rules
        self._known: dict[str, bytes] = {}
        self._num_characters = 0
        self._num_without = 0

    @classmethod
    def of(cls, rules: Tokenizer) -> WordCache | None:
        """A cache for a tokenizer whose texts may be cut at single spaces; None for any other."""
        state = json.loads(rules.to_str())
        model, steps = state["model"], list(_steps(state.get("pre_tokenizer")))
        if model.get("type") != "BPE" or model.get("dropout") or not steps:
            return None
        if not all(_is_plain(step) for step in steps) or any(map(_reaches_over, state["added_tokens"])):
            return None
        return cls(rules) if _divides_before_spaces(rules) else None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of every text, `(num_tokens,)` each, as the tokenizer gives them without special tokens."""
        if self._num_without:
            self._num_without -= 1
            return self._plain(texts)
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
        for word, ids in zip(new, self._plain(new), strict=True):
            self._known[word] = ids.tobytes()
        num_new = sum(map(len, new))
        self._num_characters += num_new
        self._num_without = NUM_BATCHES_WITHOUT if num_new > MAX_NEW_SHARE * num_all else 0

    def _plain(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._rules.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _steps(part: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    """The steps in which a tokenizer divides a text."""
    if part is not None:
        yield part
        yield from itertools.chain.from_iterable(map(_steps, part.get("pretokenizers", [])))


def _is_plain(step: dict[str, Any]) -> bool:
    """Whether a step divides a text by its signs alone, and puts nothing before it."""
    if step["type"] not in _PRE_TOKENIZERS or step.get("add_prefix_space"):
        return False
    return step["type"] != "Split" or step["behavior"] == "Isolated"


def _reaches_over(token: dict[str, Any]) -> bool:
    """Whether an added token may take a space between two signs, or looks at what stands beside it."""
    if token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"]:
        return True
    content = token["content"]
    return " " in content and (content == " " or bool(content.strip()))


def _divides_before_spaces(rules: Tokenizer) -> bool:
    pre_tokenize = rules.pre_tokenizer.pre_tokenize_str
    signs = [sign for sign in map(chr, range(0x2028)) if re.match(f"[{_SIGNS}]", sign)]
    pairs = [*itertools.product(signs, _TYPICAL), *itertools.product(_TYPICAL, signs)]
    return all(any(start == 1 for _, (start, _) in pre_tokenize(f"{left} {right}")) for left, right in pairs)
