"""Long documents are divided with their prompts; answers that a limit cuts from their prompts are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from sft.labels import IGNORE_INDEX
from sft.tokens.packing import OverflowReport, apply_overflow, limit_and_pack

X = IGNORE_INDEX


def document(first: int, *runs: int, **columns: Any) -> dict[str, Any]:
    """Tokens counted from `first`, in runs that are untrained and trained by turns."""
    ids = list(range(first, first + sum(runs)))
    trained = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return {"input_ids": ids, "labels": [i if t else X for i, t in zip(ids, trained, strict=True)], **columns}


def limited(
    rows: list[dict[str, Any]], max_length: int, policy: str = "split_with_prompt"
) -> tuple[Any, OverflowReport]:
    kept, report = apply_overflow(Dataset.from_list(rows), max_length, policy)
    return [(row["input_ids"], row["labels"]) for row in kept], report


def test_each_part_of_an_answer_keeps_its_prompt() -> None:
    rows, report = limited([document(0, 3, 10), document(50, 2, 3)], max_length=8)
    assert rows == [
        ([0, 1, 2, 3, 4, 5, 6, 7], [X, X, X, 3, 4, 5, 6, 7]),
        # 8 does not follow the prompt, so it is not trained
        ([0, 1, 2, 8, 9, 10, 11, 12], [X, X, X, X, 9, 10, 11, 12]),
        ([50, 51, 52, 53, 54], [X, X, 52, 53, 54]),
    ]
    assert (report.split, report.source_rows) == ([0], [0, 0, 1])
    assert (report.tokens_lost, report.trained_tokens_lost, report.num_repeated) == ({0: 0}, {0: 1}, 3)
    assert (report.num_answers_cut, report.num_untrained_pieces) == (0, 0)


def test_further_turns_follow_as_long_as_they_fit() -> None:
    rows, report = limited([document(0, 2, 2, 2, 2, 3, 4)], max_length=8)
    assert rows == [
        (list(range(8)), [X, X, 2, 3, X, X, 6, 7]),
        (list(range(8, 15)), [X, X, X, 11, 12, 13, 14]),
    ]
    assert (report.num_tokens_lost, report.num_repeated, report.num_answers_cut) == (0, 0, 0)


def test_a_prompt_longer_than_half_the_limit_keeps_its_end() -> None:
    rows, report = limited([document(0, 10, 6)], max_length=8)
    assert rows == [
        (list(range(6, 14)), [X, X, X, X, 10, 11, 12, 13]),
        ([6, 7, 8, 9, 14, 15], [X, X, X, X, X, 15]),
    ]
    assert (report.tokens_lost, report.trained_tokens_lost) == ({0: 6}, {0: 1})
    assert (report.num_answers_cut, report.num_trained_cut) == (2, 5)


def test_text_without_prompts_is_divided_as_by_split() -> None:
    text = Dataset.from_dict({"input_ids": [list(range(10))]})
    parts, report = apply_overflow(text, 4, "split_with_prompt")
    assert (
        parts["input_ids"][:]
        == apply_overflow(text, 4, "split")[0]["input_ids"][:]
        == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    )
    assert (report.num_answers_cut, report.num_tokens_lost) == (0, 0)


def test_other_columns_follow_their_documents() -> None:
    rows = [
        document(0, 3, 10, id="a", loss_weights=[0.0] * 3 + [0.5] * 10),
        document(50, 2, 3, id="b", loss_weights=[1.0] * 5),
    ]
    kept, _ = apply_overflow(Dataset.from_list(rows), 8, "split_with_prompt")
    assert kept["id"][:] == ["a", "a", "b"]
    assert kept["loss_weights"][1] == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]


def test_parts_are_packed() -> None:
    packed, report = limit_and_pack(
        Dataset.from_list([document(0, 3, 10), document(50, 2, 3)]), 16, overflow="split_with_prompt"
    )
    assert report.touched == []
    packed, report = limit_and_pack(
        Dataset.from_list([document(0, 3, 11), document(50, 1, 2)]), 12, overflow="split_with_prompt"
    )
    assert sorted(map(sorted, packed["seq_lengths"])) == [[3, 5], [12]]
    assert report.num_repeated == 3


@pytest.mark.parametrize(
    ("runs", "policy", "cut"),
    [
        ((3, 10), "split", (1, 5)),  # the second part is in the answer
        ((10, 5), "split", (1, 5)),  # the prompt is divided, and its first part dropped
        ((4, 4, 4, 4), "split", (0, 0)),  # the second part begins with a prompt
        ((1, 12), "split", (0, 0)),  # a text with its first token
        ((3, 10), "truncate", (0, 0)),
    ],
)
def test_answers_without_their_prompts_are_counted(runs: tuple[int, ...], policy: str, cut: tuple[int, int]) -> None:
    _, report = limited([document(0, *runs)], 8, policy)
    assert (report.num_answers_cut, report.num_trained_cut) == cut
    assert report.num_untrained_pieces == (runs == (10, 5))


def test_an_end_that_is_kept_lacks_its_prompt() -> None:
    _, report = apply_overflow(Dataset.from_list([document(0, 3, 10)]), 8, "truncate", keep_end=True)
    assert (report.num_answers_cut, report.num_trained_cut) == (1, 8)
    assert report.summary().endswith("5 tokens lost; 1 answers without their whole prompt")


def test_random_documents_keep_every_trained_token_but_those_that_continue() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = [document(0, *rng.integers(1, 30, size=2 * rng.integers(1, 5))) for _ in range(3)]
        limit = int(rng.integers(4, 40))
        parts, report = limited(rows, limit)
        assert max(len(ids) for ids, _ in parts) <= limit
        for number, row in enumerate(rows):
            own = [part for part, source in zip(parts, report.source_rows, strict=True) if source == number]
            trained = [label for _, labels in own for label in labels if label != X]
            wanted = [label for label in row["labels"] if label != X]
            assert len(set(trained)) == len(trained)
            assert len(wanted) - len(trained) == report.trained_tokens_lost.get(number, 0) < max(2, 2 * len(own))
            for _, labels in own:
                assert labels[0] == X


def test_a_limit_without_room_for_prompt_and_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length 3 has no room for a prompt and its answer; give at least 4"):
        limited([document(0, 3, 10)], 3)
