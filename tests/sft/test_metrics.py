"""Generation metrics: what counts as equal, valid and shared is stated here to the last field."""

from __future__ import annotations

import pytest

from sft.metrics import (
    TASKS,
    exact_match,
    json_field_f1,
    json_fields,
    json_valid,
    mean_interval,
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
    scores = json_field_f1(predictions, references)
    assert scores["micro"] == pytest.approx(2 * 5 / 13)
    assert scores["macro"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)


def test_field_f1_refuses_lists_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        json_field_f1(["{}"], ["{}", "{}"])


def test_word_f1_is_the_overlap_of_bags_of_words() -> None:
    assert word_f1("The cat sat", "the cat, the cat!") == pytest.approx(2 * 2 / 7)
    assert word_f1("", "x") == 0.0


def test_json_task_scores_rows_and_their_mean() -> None:
    rows = [TASKS["json"].score('{"a":1}', '{"a": 1}'), TASKS["json"].score("{", '{"a": 1}')]
    assert rows == [
        {"exact_match": 1.0, "json_valid": 1.0, "field_f1": 1.0},
        {"exact_match": 0.0, "json_valid": 0.0, "field_f1": 0.0},
    ]
    assert mean_scores(rows) == {"exact_match": 0.5, "json_valid": 0.5, "field_f1": 0.5}


def test_reference_that_is_not_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"not JSON.*'Dear customer'"):
        TASKS["json"].check_reference("Dear customer")


def test_interval_of_a_share_is_wilsons_and_honest_at_its_ends() -> None:
    assert mean_interval([1.0] * 10) == (pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0))
    assert mean_interval([0.0] * 100) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0370, abs=1e-4))
    assert mean_interval([1.0] * 81 + [0.0] * 19) == (pytest.approx(0.7222, abs=1e-4), pytest.approx(0.8749, abs=1e-4))


def test_interval_of_other_scores_is_bootstrapped_and_repeats_itself() -> None:
    few, many = [0.2, 0.8] * 10, [0.2, 0.8] * 200
    low, high = mean_interval(few)
    assert (low, high) == mean_interval(few)
    assert low < 0.5 < high
    assert mean_interval(many)[1] - mean_interval(many)[0] < (high - low) / 2
    assert mean_interval([0.3] * 5) == (pytest.approx(0.3), pytest.approx(0.3))


def test_interval_needs_a_score() -> None:
    with pytest.raises(ValueError, match="at least one score"):
        mean_interval([])
