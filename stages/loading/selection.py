"""Choice of the rows that are taken and held out, by a hash of their content, and of the next source.

The hash of a row does not depend on other rows, so that appending rows changes the choice as little as possible.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Sequence
from functools import partial


class Selection:
    """Choice of rows by a hash of their content.

    Args:
        seed: Part of the hash, so that other seeds choose other rows.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def position(self, key: bytes, purpose: str = "") -> float:
        """Return a number from 0 to 1 that depends only on a row's content, the seed and the purpose.

        Args:
            key: Digest of the row's content.
            purpose: Other purposes give other numbers.
        """
        text = f"{self._seed}:{purpose}{key.hex()}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64

    def choose(self, keys: Collection[bytes], max_rows: int) -> frozenset[bytes]:
        """Return the rows that `max_rows` takes."""
        return frozenset(heapq.nsmallest(max_rows, keys, key=partial(self.position, purpose="max_rows")))

    def hold_out(self, strata: Sequence[Collection[bytes]], count: int) -> frozenset[bytes]:
        """Return the rows to hold out: from every stratum its share, by the method of largest remainders.

        Args:
            strata: The rows of each source.
            count: Number of rows to hold out.

        Raises:
            ValueError: No row would be left for training.
        """
        total = sum(map(len, strata))
        if count >= total:
            raise ValueError(
                f"load.eval.count {count} holds out every row: there are {total} valid ones. State a smaller number"
            )
        exact = [count * len(keys) / total for keys in strata]
        shares = [int(share) for share in exact]
        by_remainder = sorted(range(len(strata)), key=lambda i: shares[i] - exact[i])
        for index in by_remainder[: count - sum(shares)]:
            shares[index] += 1
        picked = [heapq.nsmallest(share, keys, key=self.position) for share, keys in zip(shares, strata, strict=True)]
        return frozenset(key for keys in picked for key in keys)

    def copies(self, key: bytes, weight: float) -> int:
        """Return how many times a row is taken if its source has this weight."""
        return int(weight) + (self.position(key, "weight") < weight % 1)


def interleaved(parts: Sequence[Sequence[int]], shares: Sequence[float] | None, strategy: str, seed: int) -> list[int]:
    """Mix the rows of sources as `datasets.interleave_datasets` does.

    Args:
        parts: Numbers of the rows of each source.
        shares: How often each source comes next, relative to the others; None = in turn.
        strategy: Its `stopping_strategy`.
        seed: Seed of the choice of the next source.

    Returns:
        Numbers of the rows in their order. Some may be missing, and some be there several times.
    """
    from datasets import Dataset, interleave_datasets  # only where rows are mixed

    mixed = interleave_datasets(
        [Dataset.from_dict({"row": list(part)}) for part in parts],
        probabilities=None if shares is None else [share / sum(shares) for share in shares],
        seed=seed,
        stopping_strategy=strategy,
    )
    return list(mixed["row"])
