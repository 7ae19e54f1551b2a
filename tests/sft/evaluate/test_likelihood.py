"""Likelihood: token-weighted figures that do not depend on batching, packing or padding."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from sft.evaluate.likelihood import evaluate_model
from sft.labels import IGNORE_INDEX
from tests.tiny import tiny_model

pytestmark = pytest.mark.numerics


def make_rows(num_rows: int = 7, num_shared: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(0)
    shared = [rng.randrange(4, 300) for _ in range(num_shared)]
    rows = []
    for _ in range(num_rows):
        ids = shared + [rng.randrange(4, 300) for _ in range(rng.randrange(5, 40))]
        start = rng.randrange(num_shared + 1, len(ids))
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * start + ids[start:]})
    return rows


def plain_figures(model: torch.nn.Module, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Compute the figures by their definition: one row at a time, with all logits."""
    loss, hits, count = 0.0, 0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        loss += float(cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX))
        hits += int(((logits.argmax(-1) == targets) & (targets != IGNORE_INDEX)).sum())
        count += int((targets != IGNORE_INDEX).sum())
    return {
        "loss": loss / count,
        "perplexity": math.exp(loss / count),
        "token_accuracy": hits / count,
        "num_tokens": count,
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
def test_figures_equal_the_definition_at_any_batch_size(family: str, tokens_per_batch: int) -> None:
    model, rows = tiny_model(family), make_rows()
    assert evaluate_model(model, rows, tokens_per_batch) == pytest.approx(plain_figures(model, rows), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "qwen3", "gemma2", "phi", "gpt_neox"])
@pytest.mark.parametrize("tokens_per_batch", [1, 100])
def test_what_all_rows_begin_with_is_computed_once_and_changes_nothing(family: str, tokens_per_batch: int) -> None:
    model, rows = tiny_model(family), make_rows(num_shared=20)
    assert evaluate_model(model, rows, tokens_per_batch) == pytest.approx(plain_figures(model, rows), rel=1e-5)


def test_shared_beginning_ends_before_the_first_supervised_token() -> None:
    model = tiny_model()
    ids = list(range(5, 30))
    rows = [{"input_ids": [*ids, last], "labels": [IGNORE_INDEX] * 10 + ids[10:] + [last]} for last in (40, 41)]
    assert evaluate_model(model, rows) == pytest.approx(plain_figures(model, rows), rel=1e-5)


def test_packed_rows_give_the_figures_of_their_documents() -> None:
    model, rows = tiny_model(), make_rows()
    packed = {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [len(row["input_ids"]) for row in rows],
    }
    assert evaluate_model(model, [packed]) == pytest.approx(evaluate_model(model, rows), rel=1e-6)


def test_first_token_of_a_document_is_never_predicted_from_its_neighbour() -> None:
    model = tiny_model()
    packed = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}
    assert evaluate_model(model, [packed])["num_tokens"] == 2


def test_rows_without_labels_do_not_count_and_alone_are_an_error() -> None:
    model, rows = tiny_model(), make_rows()
    silent = {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX] * 3}
    assert evaluate_model(model, [silent, *rows]) == evaluate_model(model, rows)
    with pytest.raises(ValueError, match="none of the 1 rows has a token with a label"):
        evaluate_model(model, [silent])


def test_row_whose_lengths_disagree_is_named() -> None:
    with pytest.raises(ValueError, match="row 1: 3 ids, 3 labels, but seq_lengths add up to 2"):
        evaluate_model(
            tiny_model(), [make_rows(1)[0], {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [2]}]
        )


def test_training_mode_is_left_as_it_was_and_dropout_is_off() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    first, second = evaluate_model(model, make_rows()), evaluate_model(model, make_rows())
    assert first == second
    assert model.training


def test_progress_ends_at_the_number_of_documents() -> None:
    calls: list[tuple[int, int, str]] = []
    evaluate_model(tiny_model(), make_rows(), 50, on_progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (7, 7)
