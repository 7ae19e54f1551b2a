"""Which rows are taken and which are held out: chosen by their content, so that rows appended later move no other."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Sequence
from functools import partial


class Selection:
    """Chooses rows by a hash of their content.

    Args:
        seed: Other seeds choose other rows.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def position(self, key: bytes, purpose: str = "") -> float:
        """A number from 0 to 1 that depends on a row's content alone."""
        text = f"{self._seed}:{purpose}{key.hex()}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64

    def choose(self, keys: Collection[bytes], max_rows: int) -> frozenset[bytes]:
        """The rows that `max_rows` takes."""
        return frozenset(heapq.nsmallest(max_rows, keys, key=partial(self.position, purpose="max_rows")))

    def hold_out(self, strata: Sequence[Collection[bytes]], count: int) -> frozenset[bytes]:
        """The `count` rows that are held out, from every stratum its share (largest remainders).

        Raises:
            ValueError: No row would be left.
        """
        total = sum(map(len, strata))
        if count >= total:
            raise ValueError(
                f"load.eval.count {count} holds out every row: there are {total} good ones. State a smaller number"
            )
        exact = [count * len(keys) / total for keys in strata]
        shares = [int(share) for share in exact]
        by_remainder = sorted(range(len(strata)), key=lambda i: shares[i] - exact[i])
        for index in by_remainder[: count - sum(shares)]:
            shares[index] += 1
        picked = [heapq.nsmallest(share, keys, key=self.position) for share, keys in zip(shares, strata, strict=True)]
        return frozenset(key for keys in picked for key in keys)

    def copies(self, key: bytes, weight: float) -> int:
        """How many times a row of a source with this weight is taken."""
        return int(weight) + (self.position(key, "weight") < weight % 1)
