"""Token ids of texts, put together from those of their words: what occurs again and again is tokenized once.

Byte-level tokenizers divide a text before they look for tokens, and before a single space between two signs they
always do. So a text may be cut there, and each part be looked up. Whether a tokenizer is of this kind is read off its
rules and tried out on every sign at which texts are cut here; one that is not gives None, and is used as it is.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Ids = npt.NDArray[np.int32]

# printable ASCII, letters of Latin, Greek and Cyrillic, dashes and quotation marks: signs at which texts are cut
_SIGNS = "!-~\u00a1-\u00ac\u00ae-\u024f\u0370-\u03ff\u0400-\u04ff\u2010-\u2027"
_PART = re.compile(rf"[\s\S][^ ]*(?:(?:(?<![{_SIGNS}]) | (?![{_SIGNS}]))[^ ]*)*")
_TYPICAL = "aZ0.'(<-_\"#)>"
_PRE_TOKENIZERS = {"Sequence", "ByteLevel", "Split", "Digits"}
MAX_CHARACTERS = 8_000_000
"""Characters of words remembered: some 100 MB with their ids and what Python needs."""
MAX_NEW_SHARE = 0.4
NUM_BATCHES_WITHOUT = 8
"""Where more than this share of the characters of a batch is in new words, looking up does not pay for a while."""


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
