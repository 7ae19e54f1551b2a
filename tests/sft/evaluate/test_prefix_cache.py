"""Prefix cache: the exact shared length, within the limit, and only for models that cache all keys and values."""

from __future__ import annotations

import pytest
import torch

from sft.evaluate.prefix_cache import share_prefix
from tests.tiny import tiny_model

IDS = list(range(5, 25))


@pytest.mark.parametrize(
    ("sequences", "limit", "length"),
    [
        ([[*IDS, 1], [*IDS, 2]], 100, 20),
        ([[*IDS, 1], [*IDS, 2]], 12, 12),
        ([IDS, [*IDS, 2]], 100, 20),
        ([[*IDS[:7], 1], [*IDS[:7], 2]], 100, 0),  # too short to be worth it
        ([[*IDS, 1]], 100, 0),  # nothing to share with
        ([[*IDS, 1], [3, *IDS]], 100, 0),
        ([[*IDS, 1], [*IDS, 2]], -1, 0),
    ],
)
def test_length_is_what_all_sequences_begin_with(sequences: list[list[int]], limit: int, length: int) -> None:
    prefix = share_prefix(tiny_model(), sequences, limit)
    assert prefix.length == length
    assert (prefix.cache is None) == (length == 0)


def test_every_batch_gets_a_cache_of_its_own() -> None:
    model = tiny_model()
    prefix = share_prefix(model, [[*IDS, 1], [*IDS, 2]], 100)
    first, second = prefix.rows(3), prefix.rows(2)
    assert first is not None
    assert second is not None
    model(input_ids=torch.tensor([[1], [2], [3]]), past_key_values=first)
    assert (first.get_seq_length(), second.get_seq_length()) == (21, 20)
    assert prefix.mask(torch.tensor([[0, 1]])).tolist() == [[1] * 20 + [0, 1]]


def test_sliding_window_is_never_shared() -> None:
    assert share_prefix(tiny_model("mistral", sliding_window=8), [[*IDS, 1], [*IDS, 2]], 100).length == 0
