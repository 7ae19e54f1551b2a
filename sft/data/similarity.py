"""Rows that are nearly the same: MinHash (Broder 1997) finds candidates, their word triples decide.

The likeness of two texts is the Jaccard similarity of their sets of word triples: triples in both, divided by triples
in either. Bands of MinHash values (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) are kept as one
number each, 80 to 200 bytes a row, and sorted at the end: an index of Python sets would take thousands of bytes a row.

Rows unlike the rest of a data set: in length, and in language.
"""

from __future__ import annotations

import functools
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sft.data.contents import contents

NUM_VALUES = 128

RECALL = 0.95
"""Part of the pairs exactly at the threshold that become candidates; of more alike ones nearly all."""

NUM_NEIGHBOURS = 4
"""Rows of one band that a row is compared with: bounds the work where thousands of rows share most of their text."""

FAR_OUT = 3.0

MIN_FACTOR = 2.0
"""Rows less than twice as long, or as short, as the middle half are no outliers however alike the others are."""

MIN_ROWS = 20

RARE = 0.01
"""A language is rare when a smaller part of the rows than this is in it."""

MIN_LETTERS, MAX_CHARACTERS = 60, 1000

_SHINGLES_AT_ONCE = 4096

_MAX_REMEMBERED = 500_000

# a word, or one letter of a script that is written without spaces, or one sign
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"

_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")

_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)

Triples = set[tuple[str, ...]]


class Pair(NamedTuple):
    """Two rows that may be alike, `later` behind `earlier` in the order asked for."""

    later: int
    earlier: int


def compared_text(record: Mapping[str, Any]) -> str:
    """What rows are compared by: all their texts but system messages and tools, which many rows share."""
    return "\n".join(content.text for content in contents(record) if content.role not in ("system", "tools"))


def triples(text: str) -> Triples:
    """The triples of neighbouring words of a text, in lower case, signs being words; less is one tuple."""
    words = _WORD.findall(text.casefold())
    return set(zip(words, words[1:], words[2:], strict=False)) if len(words) >= 3 else {tuple(words)}


def similarity(one: Triples, other: Triples) -> float:
    """Jaccard similarity of two sets of word triples, from 0 to 1."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def banding(threshold: float) -> tuple[int, int]:
    """Bands, and values in each, that make `RECALL` of the pairs at the threshold candidates, and few others.

    Two rows of similarity s share a band of r values with probability s^r.
    """
    for size in range(NUM_VALUES // 2, 1, -1):
        num = NUM_VALUES // size
        if 1.0 - (1.0 - threshold**size) ** num >= RECALL:
            return num, size
    return NUM_VALUES, 1


class NearDuplicateIndex:
    """Takes texts one by one and says at the end which may be alike.

    Args:
        threshold: Similarity from which two texts are to be found, above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash

        self._num_bands, self._band_size = banding(threshold)
        self._minhash = MinHash(NUM_VALUES, seed=1, hashfunc=int, scheme="affine32")
        self._mixer = np.random.default_rng(1).integers(1, 2**64, self._band_size, dtype=np.uint64) | np.uint64(1)
        self._bands = array("Q")

    def __len__(self) -> int:
        return len(self._bands) // self._num_bands

    def add(self, text: str) -> None:
        """Take in one text; the first one is number 0."""
        hashes = _hashes(text)
        self._minhash.clear()
        for start in range(0, len(hashes), _SHINGLES_AT_ONCE):
            self._minhash.update_batch(hashes[start : start + _SHINGLES_AT_ONCE].tolist())
        values = self._minhash.hashvalues[: self._num_bands * self._band_size].astype(np.uint64)
        bands = (values.reshape(self._num_bands, self._band_size) * self._mixer).sum(axis=1, dtype=np.uint64)
        self._bands.frombytes(bands.tobytes())

    def pairs(self, order: np.ndarray[Any, Any]) -> Iterator[Pair]:
        """Pairs of rows that may be alike, all pairs of a later row one after the other.

        A row is paired with the first row of every band that it shares, and with `NUM_NEIGHBOURS` rows before it.

        Args:
            order: `(num_rows,)` numbers of all rows in the order in which they are gone through.
        """
        bands = np.frombuffer(self._bands, dtype=np.uint64).reshape(-1, self._num_bands)[order]
        codes = np.zeros(0, dtype=np.int64)
        for number in range(self._num_bands if len(bands) else 0):
            codes = np.union1d(codes, _band_pairs(bands[:, number]))
        for code in codes:
            yield Pair(int(order[code >> 32]), int(order[code & 0xFFFFFFFF]))


class _WordCodes(dict[str, int]):
    """A number for every word, the same in every process, as Python's own hash is not; remembers words it has seen."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        code = self[word] = zlib.crc32(word.encode("utf-8", "replace"))
        return code


_CODES = _WordCodes()


def _hashes(text: str) -> np.ndarray[Any, Any]:
    """The word triples of a text as 32-bit numbers."""
    words = _WORD.findall(text.casefold())
    words += [""] * (3 - len(words))
    codes = np.fromiter(map(_CODES.__getitem__, words), np.uint64, len(words))
    mixed = codes[:-2] * _FIRST + codes[1:-1] * _SECOND + codes[2:]
    return (mixed >> np.uint64(32)).astype(np.uint32)


def _band_pairs(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pairs of rows with the same key, each as one number: the later row in the upper 32 bits."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    found: list[np.ndarray[Any, Any]] = [np.zeros(0, dtype=np.int64)]
    for distance in range(1, NUM_NEIGHBOURS + 1):
        same = ordered[distance:] == ordered[:-distance]
        found.append(order[distance:][same] << 32 | order[:-distance][same])
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    group = np.repeat(first, np.diff(np.r_[first, len(order)]))
    far = np.arange(len(order)) - group > NUM_NEIGHBOURS
    found.append(order[far] << 32 | order[group[far]])
    return np.unique(np.concatenate(found))


def length_limits(lengths: Sequence[int]) -> tuple[float, float]:
    """The shortest and the longest length that is no outlier: far-out fences on a log scale (Tukey 1977).

    Args:
        lengths: Lengths of all rows in characters.

    Returns:
        Lower and upper limit; 0 and infinity where there are too few rows to say.
    """
    if len(lengths) < MIN_ROWS:
        return 0.0, float("inf")
    low, high = np.quantile(np.log(np.maximum(lengths, 1)), (0.25, 0.75))
    reach = max(FAR_OUT * (high - low), np.log(MIN_FACTOR))
    return float(np.exp(low - reach)), float(np.exp(high + reach))


def language(text: str) -> str | None:
    """ISO 639-1 code of a text's language (by py3langid, offline); None where there is too little text to tell."""
    beginning = text[:MAX_CHARACTERS]
    if sum(map(str.isalpha, beginning)) < MIN_LETTERS:
        return None
    label, probability = _identifier().classify(beginning)
    return label if probability >= 1.0 - RARE else None


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def rare_languages(languages: Sequence[str | None]) -> Counter[str]:
    """Languages of which there are so few rows that they hardly belong there, with the number of rows."""
    known = Counter(label for label in languages if label is not None)
    total = sum(known.values())
    if total < MIN_ROWS:
        return Counter()
    return Counter({label: count for label, count in known.items() if count < RARE * total})
