"""The ledger counts what it lists, and rows of a JSONL file can be read and removed while it is written."""

from __future__ import annotations

from pathlib import Path

from stages.checkout.artifacts import JsonlWriter, read_jsonl
from stages.checkout.ledger import Action, Ledger


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
