"""An output folder is replaced as a whole or not at all, and the ledger counts what it lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.checkout.artifacts import JsonlWriter, read_jsonl, replacing_folder
from stages.checkout.ledger import Action, Ledger


def test_a_finished_folder_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with replacing_folder(tmp_path / "out") as folder:
        (folder / "new.txt").write_text("new")
        assert (tmp_path / "out" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_run_leaves_the_earlier_folder(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(error), replacing_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "new.txt").write_text("new")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old.txt").read_text() == "old"


def test_the_ledger_counts_by_reason_and_shows_the_first_rows(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl", "load") as ledger:
        for number in range(1, 6):
            ledger.enter(f"a.jsonl:{number}", "empty_answer", "é is empty")
        ledger.enter("a.jsonl:9", "duplicate", "the same as a.jsonl:8")
        ledger.enter("a.jsonl:8", "weight", "not among the rows", Action.OMIT)
        ledger.enter("a.jsonl:7", "mojibake", "reads so", Action.WARN)
    assert ledger.counts[Action.DROP] == {"empty_answer": 5, "duplicate": 1}
    assert ledger.num_rows == len(list(read_jsonl(tmp_path / "ledger.jsonl"))) == 8
    assert ledger.num_removed == 7
    assert next(read_jsonl(tmp_path / "ledger.jsonl")) == {
        "id": "a.jsonl:1", "stage": "load", "reason": "empty_answer", "action": "drop", "detail": "é is empty"
    }  # fmt: skip
    assert ledger.summary(Action.WARN) == "mojibake 1 times, first a.jsonl:7 (reads so)"
    assert ledger.summary(Action.DROP) == (
        "empty_answer 5 times, first a.jsonl:1 (é is empty), a.jsonl:2 (é is empty), a.jsonl:3 (é is empty); "
        "duplicate 1 times, first a.jsonl:9 (the same as a.jsonl:8)"
    )


def test_rows_can_be_read_again_and_taken_out_while_more_are_written(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "rows.jsonl") as writer:
        offsets = []
        for number in range(4):
            offsets.append(writer.num_bytes)
            writer.write({"n": number, "text": "é" * number})
        assert [writer.read(offset)["n"] for offset in (offsets[2], offsets[0])] == [2, 0]
        writer.remove({0, 2})
        writer.write({"n": 4})
        assert writer.num_rows == 3
    assert [row["n"] for row in read_jsonl(tmp_path / "rows.jsonl")] == [1, 3, 4]
    assert (tmp_path / "rows.jsonl").stat().st_size == writer.num_bytes
