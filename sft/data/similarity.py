"""Comparison of rows: near duplicates, and outliers in length and language.

Two texts are near duplicates if the Jaccard similarity of their sets of word triples (triples in both, divided by
triples in either) is high. MinHash (Broder 1997) finds candidates; the caller then compares the triples themselves.
Bands of MinHash values (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) are stored as one number
each, 80 to 200 bytes per row, and sorted at the end; an index of Python sets would take thousands of bytes per row.
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
"""MinHash values per text."""

RECALL = 0.95
"""Share of the pairs exactly at the threshold that become candidates; nearly all pairs above the threshold do too."""

NUM_NEIGHBOURS = 4
"""Rows of one band that a row is compared with, which bounds the work if thousands of rows share most of their text."""

FAR_OUT = 3.0
"""Distance of Tukey's outer fences from the quartiles, in interquartile ranges."""

MIN_FACTOR = 2.0
"""A row is an outlier only if its length is more than this factor outside the quartiles, even if they are close."""

MIN_ROWS = 20
"""Minimum number of rows for outlier detection."""

RARE = 0.01
"""A language is rare if a smaller share of the rows than this is in it."""

MIN_LETTERS, MAX_CHARACTERS = 60, 1000
"""Letters that a text needs for its language to be identified, and the length of the beginning that is looked at."""

_SHINGLES_AT_ONCE = 512
"""Triples whose permutations fit into a processor's cache."""

_MAX_REMEMBERED = 500_000

# A word is a run of letters and digits, one letter of a script written without spaces, or one punctuation mark.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"

_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")

_ASCII_WORD = re.compile(r"\w+|[^\w\s]", re.ASCII)
"""The same for a text of ASCII characters, in two thirds of the time."""

_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)

Triples = set[tuple[str, ...]]


class Pair(NamedTuple):
    """Two rows that may be near duplicates; `later` comes after `earlier` in the requested order."""

    later: int
    earlier: int


def compared_text(record: Mapping[str, Any]) -> str:
    """Return the text that rows are compared by: all but system messages and tools, which many rows share."""
    return "\n".join(content.text for content in contents(record) if content.role not in ("system", "tools"))


def triples(text: str) -> Triples:
    """Return the triples of consecutive words of a text, in lower case; a text of fewer words is one tuple.

    Punctuation marks count as words.
    """
    words = _words(text)
    return set(zip(words, words[1:], words[2:], strict=False)) if len(words) >= 3 else {tuple(words)}


def _words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _ASCII_WORD.findall(text.lower()) if text.isascii() else _WORD.findall(text.casefold())


def similarity(one: Triples, other: Triples) -> float:
    """Return the Jaccard similarity of two sets of word triples, from 0 to 1."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def banding(threshold: float) -> tuple[int, int]:
    """Choose numbers of bands and of MinHash values per band that find `RECALL` of the pairs at the threshold.

    Among the choices that reach `RECALL`, the longest bands give the fewest other candidates: two rows of similarity s
    share a band of r values with probability s^r.
    """
    for size in range(NUM_VALUES // 2, 1, -1):
        num = NUM_VALUES // size
        if 1.0 - (1.0 - threshold**size) ** num >= RECALL:
            return num, size
    return NUM_VALUES, 1


class NearDuplicateIndex:
    """Index of texts that are added one by one and yields candidate pairs of near duplicates at the end.

    Args:
        threshold: Similarity from which two texts count as near duplicates, above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash

        self._num_bands, self._band_size = banding(threshold)
        used = self._num_bands * self._band_size
        factors, terms = MinHash(NUM_VALUES, seed=1, hashfunc=int, scheme="affine32").permutations
        self._factors, self._terms = (np.asarray(part, dtype=np.uint32)[:used] for part in (factors, terms))
        self._scratch = np.empty((_SHINGLES_AT_ONCE, used), dtype=np.uint32)
        self._mixer = np.random.default_rng(1).integers(1, 2**64, self._band_size, dtype=np.uint64) | np.uint64(1)
        self._bands = array("Q")

    def __len__(self) -> int:
        return len(self._bands) // self._num_bands

    def add(self, text: str) -> None:
        """Add one text; the first one has number 0."""
        values = self._values(_hashes(text)).astype(np.uint64)
        bands = (values.reshape(self._num_bands, self._band_size) * self._mixer).sum(axis=1, dtype=np.uint64)
        self._bands.frombytes(bands.tobytes())

    def _values(self, hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the MinHash values that the bands need; they equal those of `datasketch` (scheme affine32)."""
        mixed = _mixed(hashes)[:, None]
        values = np.full(len(self._factors), 0xFFFFFFFF, dtype=np.uint32)
        for start in range(0, len(mixed), _SHINGLES_AT_ONCE):
            part = mixed[start : start + _SHINGLES_AT_ONCE]
            permuted = self._scratch[: len(part)]
            np.multiply(part, self._factors, out=permuted)
            permuted += self._terms
            np.minimum(values, permuted.min(axis=0), out=values)
        return values

    def pairs(self, order: np.ndarray[Any, Any]) -> Iterator[Pair]:
        """Yield pairs of rows that may be near duplicates, grouped by their later row.

        In each band, a row is paired with the first row that shares it, and with the `NUM_NEIGHBOURS` rows before it.

        Args:
            order: `(num_rows,)` numbers of all rows; defines which row of a pair is the later one.
        """
        bands = np.frombuffer(self._bands, dtype=np.uint64).reshape(-1, self._num_bands)[order]
        codes = np.zeros(0, dtype=np.int64)
        for number in range(self._num_bands if len(bands) else 0):
            codes = np.union1d(codes, _band_pairs(bands[:, number]))
        for code in codes:
            yield Pair(int(order[code >> 32]), int(order[code & 0xFFFFFFFF]))


class _WordCodes(dict[str, int]):
    """Cache of a hash per word that, unlike Python's own `hash`, is the same in every process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        code = self[word] = zlib.crc32(word.encode("utf-8", "replace"))
        return code


_CODES = _WordCodes()


def _hashes(text: str) -> np.ndarray[Any, Any]:
    """Hash the word triples of a text to 32-bit numbers, `(num_triples,)`."""
    words = _words(text)
    words += [""] * (3 - len(words))
    codes = np.fromiter(map(_CODES.__getitem__, words), np.uint64, len(words))
    mixed = codes[:-2] * _FIRST + codes[1:-1] * _SECOND + codes[2:]
    return (mixed >> np.uint64(32)).astype(np.uint32)


def _mixed(hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Apply the finalizer of MurmurHash3 to 32-bit numbers, so that similar ones differ in all bits."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


def _band_pairs(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return pairs of rows with the same key, each as one number with the later row in the upper 32 bits."""
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
    """Return the shortest and the longest length that are not outliers: Tukey's outer fences (1977) on a log scale.

    Args:
        lengths: Lengths of all rows in characters.

    Returns:
        Lower and upper limit; 0 and infinity if there are fewer than `MIN_ROWS` rows.
    """
    if len(lengths) < MIN_ROWS:
        return 0.0, float("inf")
    low, high = np.quantile(np.log(np.maximum(lengths, 1)), (0.25, 0.75))
    reach = max(FAR_OUT * (high - low), np.log(MIN_FACTOR))
    return float(np.exp(low - reach)), float(np.exp(high + reach))


def language(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language (by py3langid); None if the text is too short or ambiguous."""
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
    """Count the rows of each rare language; empty if there are fewer than `MIN_ROWS` rows with a known language."""
    known = Counter(label for label in languages if label is not None)
    total = sum(known.values())
    if total < MIN_ROWS:
        return Counter()
    return Counter({label: count for label, count in known.items() if count < RARE * total})
