"""Texts that share most of their word triples are found as pairs; the similarity itself is exact."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from datasketch import MinHash

from sft.data.similarity import (
    NUM_NEIGHBOURS,
    NUM_VALUES,
    NearDuplicateIndex,
    _hashes,
    banding,
    compared_text,
    similarity,
    triples,
)

WORDS = [f"w{number}" for number in range(500)]


def pairs_of(texts: list[str], threshold: float, order: list[int] | None = None) -> list[tuple[int, int]]:
    index = NearDuplicateIndex(threshold)
    for text in texts:
        index.add(text)
    return [
        tuple(pair) for pair in index.pairs(np.array(order if order is not None else range(len(texts)), dtype=np.int64))
    ]


@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_values_are_those_of_datasketch(threshold: float) -> None:
    index = NearDuplicateIndex(threshold)
    text = " ".join(random.Random(0).choices(WORDS, k=1500))
    for hashes in (_hashes(text), _hashes("a b"), _hashes("")):
        expected = MinHash(NUM_VALUES, seed=1, hashfunc=int, scheme="affine32")
        expected.update_batch(hashes.tolist())
        num, size = banding(threshold)
        assert index._values(hashes).tolist() == expected.hashvalues[: num * size].tolist()


def test_similarity_is_shared_triples_of_all_triples() -> None:
    assert triples("One, two three") == {("one", ",", "two"), (",", "two", "three")}
    assert triples("Hi") == {("hi",)}
    assert triples("") == {()}
    assert triples("東京は夜") == {("東", "京", "は"), ("京", "は", "夜")}
    assert similarity(triples("a b c d e"), triples("a b c d f")) == pytest.approx(2 / 4)
    assert similarity(triples("A  b c"), triples("a b\nc")) == 1.0
    assert similarity(triples("3 + 4 = 7"), triples("3 - 4 = 7")) < 1.0


def test_rows_are_compared_without_what_all_share() -> None:
    row = {"messages": [{"role": "system", "content": "Same."}, {"role": "user", "content": "x"}], "tools": "[]"}
    assert compared_text(row) == "x"


def test_alike_texts_become_pairs_and_others_do_not() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(300)]
    for number in range(0, 300, 3):  # one word of sixty is another one
        words = texts[number].split()
        words[30] = "another"
        texts[number + 1] = " ".join(words)
    expected = {
        (b, a)
        for a, b in itertools.combinations(range(300), 2)
        if similarity(triples(texts[a]), triples(texts[b])) >= 0.8
    }
    assert len(expected) == 100
    found = pairs_of(texts, 0.8)
    assert len(expected.intersection(found)) >= 97
    assert len(found) <= 110


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_find_nearly_all_pairs_at_the_threshold(threshold: float) -> None:
    num, size = banding(threshold)
    assert num * size <= 128
    assert 1 - (1 - threshold**size) ** num >= 0.95


def test_many_equal_texts_are_bounded_work_and_keep_their_first_row() -> None:
    found = pairs_of(["a b c d e f"] * 1000, 0.8)
    assert len(found) <= 1000 * (NUM_NEIGHBOURS + 1)
    assert {later for later, _ in found} == set(range(1, 1000))
    assert {later for later, earlier in found if earlier == 0} == set(range(1, 1000))


def test_the_order_says_which_row_of_a_pair_is_the_earlier_one() -> None:
    texts = ["a b c d e", "x y z", "a b c d e"]
    assert pairs_of(texts, 0.8) == [(2, 0)]
    assert pairs_of(texts, 0.8, order=[2, 1, 0]) == [(0, 2)]
    assert pairs_of([], 0.8) == []
