"""Numbers are converted to the text that JSON writes for them, but only where text is required."""

from __future__ import annotations

from sft.data.records import detect_layout, numbers_as_text


def test_numbers_of_plain_columns_and_of_messages_become_text() -> None:
    row = {"question": "6 x 7?", "answer": 42, "context": 0.5, "score": 3}
    changed, found = numbers_as_text(row, detect_layout(row))
    assert changed == {"question": "6 x 7?", "answer": "42", "context": "0.5", "score": 3}
    assert found == ["column 'answer' holds the number 42", "column 'context' holds the number 0.5"]
    turns = {"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "one"}, "odd"]}
    changed, found = numbers_as_text(turns, detect_layout(turns))
    assert changed["conversations"] == [{"from": "human", "value": "1"}, {"from": "gpt", "value": "one"}, "odd"]
    assert found == ["message 0 has the number 1 as value"]


def test_other_values_than_numbers_stay() -> None:
    row = {"question": True, "answer": float("nan")}
    assert numbers_as_text(row, detect_layout(row)) == (row, [])
