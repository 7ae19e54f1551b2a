"""Length of the common prefix of two sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many elements two sequences share from their beginning.

    A binary search that compares slices, so that the comparison itself runs in C.

    Args:
        first: A string, list, tuple or the memoryview of an array: slices must compare with `==` to one truth value.
        second: A sequence of the same type.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
