"""A file is worked on in stretches of whole lines, by any number of processes, with results in its order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.checkout.artifacts import write_jsonl
from stages.shards import shards
from stages.shards.encoding import groups_of_turns
from stages.shards.shards import Shard, run_shards, shards_of


@dataclass(frozen=True)
class Reading:
    """Returns the numbers in a shard; refuses negative ones."""

    factor: int

    def build(self) -> Callable[[Shard], list[int]]:
        return self.read

    def read(self, shard: Shard) -> list[int]:
        numbers = [row["number"] for row in shard.rows()]
        if min(numbers) < 0:
            raise ValueError(f"{min(numbers)} is negative")
        return [self.factor * number for number in numbers]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    write_jsonl(tmp_path / "rows.jsonl", ({"number": number, "text": "\u2028é" * (number % 7)} for number in range(40)))
    return tmp_path / "rows.jsonl"


def test_shards_are_whole_lines_and_leave_nothing_out(file: Path) -> None:
    found = shards_of(file)
    assert len(found) > 8
    assert [shard.start for shard in found] == [0, *(shard.end for shard in found[:-1])]
    assert found[-1].end == file.stat().st_size
    assert [row["number"] for shard in found for row in shard.rows()] == list(range(40))


def test_an_empty_file_has_no_shards(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"")
    assert shards_of(tmp_path / "rows.jsonl") == []
    assert list(run_shards(Reading(2), [], 2)) == []


def test_results_come_in_order_whatever_the_number_of_processes(file: Path) -> None:
    alone = list(run_shards(Reading(2), shards_of(file), 1))
    assert [number for part in alone for number in part] == list(range(0, 80, 2))
    assert list(run_shards(Reading(2), shards_of(file), 2)) == alone


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_first_shard_that_fails_is_the_one_reported(tmp_path: Path, file: Path, num_proc: int) -> None:
    write_jsonl(tmp_path / "bad.jsonl", ({"number": 20 - number} for number in range(60)))
    with pytest.raises(ValueError, match=r"-[1-6] is negative"):
        list(run_shards(Reading(1), shards_of(tmp_path / "bad.jsonl"), num_proc))


def test_documents_of_one_record_are_one_group() -> None:
    groups = groups_of_turns(["a", "a", "a", "b", "c", "d"], [1, 3, 1, 3, -1, -1])
    assert groups is not None
    assert groups.tolist() == [1, 1, 2, 3, 4, 5]
    assert groups_of_turns(["a", "b"], [-1, -1]) is None
