"""Metrics of generated answers: which answers are equal, which text is valid JSON, and which fields are shared."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest

from sft.evaluate.tasks import (
    exact_match,
    find_task,
    json_fields,
    json_valid,
    last_found,
    last_number,
    mean_scores,
    word_f1,
)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ('{"a": 1, "b": [2, 3]}', '{"b":[2,3],"a":1}'),
        ('  {"a": 1}\n', '{"a": 1.0}'),
        ('"\\u00e9"', '"é"'),
        (" plain text\n", "plain text"),
        ("{broken", "{broken "),
        ("null", "null"),
    ],
)
def test_answers_that_are_the_same(prediction: str, reference: str) -> None:
    assert exact_match(prediction, reference)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("[1, 2]", "[2, 1]"),
        ("true", "1"),
        ('{"a": 1}', '{"a": "1"}'),
        ('{"a": 1} and more', '{"a": 1}'),
        ("Plain", "plain"),
        ("", "null"),
    ],
)
def test_answers_that_differ(prediction: str, reference: str) -> None:
    assert not exact_match(prediction, reference)


def test_json_is_valid_only_as_a_whole_and_only_by_the_standard() -> None:
    assert [json_valid(text) for text in ("{}", " [1]\n", '"x"', "3", "null")] == [True] * 5
    assert [json_valid(text) for text in ("", "{}{}", "{'a': 1}", "NaN", '{"a": Infinity}', "{} ok", "[" * 5000)] == [
        False
    ] * 7


def test_fields_are_leaves_with_their_paths() -> None:
    assert sorted(json_fields('{"a": {"b": 1.0, "c": []}, "d": ["x", {"e": null}]}').elements()) == [
        ("a.b", "1"),
        ("a.c", "[]"),
        ("d[0]", '"x"'),
        ("d[1].e", "null"),
    ]
    assert json_fields("not json").total() == 0


def test_field_f1_counts_shared_leaves_over_all_rows_and_row_by_row() -> None:
    references = ['{"a": 1, "b": 2}', '{"a": 1, "b": 2, "c": 3, "d": 4}', '{"a": 1}']
    predictions = ['{"a": 1, "b": 9}', '{"a": 1, "b": 2, "c": 3, "d": 4}', "oops"]
    # rows: 1 right of 2 + 2; 4 right of 4 + 4; 0 right of 0 + 1
    task = find_task("json")
    assert task.summarize(predictions, references)["field_f1_micro"].value == pytest.approx(2 * 5 / 13)
    rows = [task.score(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
    assert mean_scores(rows)["field_f1"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)


def test_field_f1_refuses_lists_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        find_task("json").summarize(["{}"], ["{}", "{}"])


def test_word_f1_is_the_overlap_of_bags_of_words() -> None:
    assert word_f1("The cat sat", "the cat, the cat!") == pytest.approx(2 * 2 / 7)
    assert word_f1("", "x") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs 1,234.50 euros", "1234.5"),
        ("first 3, then 5-4", "4"),
        ("down to −7 degrees", "-7"),
        ("#### 1e3", "1000"),
        ("12kg", "12"),
        ("The answer is 42.", "42"),
        ("1,2", "2"),
        ("x1", None),
        ("none", None),
    ],
)
def test_last_number_is_read_as_people_write_it(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_pattern_gives_its_group_or_all_of_it_and_the_last_find() -> None:
    assert last_found(re.compile(r"#(\d+)"), "#1 #22") == "22"
    assert last_found(re.compile(r"#\d+"), "#1 #22") == "#22"
    assert last_found(re.compile(r"#\d+"), "none") is None
