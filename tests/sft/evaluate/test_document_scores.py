"""Figures per document, and the divergence of two models, compared with torch over the complete vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from sft.evaluate.likelihood import NUM_KEPT, DocumentScores, divergence, evaluate_model, keep_likeliest
from sft.labels import IGNORE_INDEX
from tests.tiny import tiny_model

pytestmark = pytest.mark.numerics

ROWS = [
    {"input_ids": [1, 2, 3, 4], "labels": [IGNORE_INDEX, 2, 3, 4]},
    {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, IGNORE_INDEX, 7]},
]


def logits(scale: float, seed: int, vocabulary: int = 1000) -> torch.Tensor:
    return scale * torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(seed))


def exact(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return kl_div(q, p, log_target=True, reduction="none").sum(-1)


def test_divergence_is_the_whole_vocabularys_where_the_model_is_sure() -> None:
    tuned, other = logits(8.0, 1), logits(8.0, 1) + logits(0.5, 2)
    torch.testing.assert_close(divergence(keep_likeliest(tuned), other), exact(tuned, other), rtol=2e-2, atol=1e-6)


def test_divergence_never_exceeds_the_exact_one_and_a_small_vocabulary_is_exact() -> None:
    tuned, other = logits(1.0, 1), logits(1.0, 2)
    bounded = divergence(keep_likeliest(tuned), other)
    assert (bounded > 0).all()
    assert (bounded <= exact(tuned, other) + 1e-6).all()
    few, others = logits(1.0, 1, NUM_KEPT), logits(1.0, 2, NUM_KEPT)
    torch.testing.assert_close(divergence(keep_likeliest(few), others), exact(few, others))


def test_divergence_of_a_model_from_itself_is_nothing_even_when_it_is_very_sure() -> None:
    sure = logits(1.0, 1)
    sure[:, 0] = 40.0
    assert divergence(keep_likeliest(sure), sure).abs().max() < 1e-12


def test_divergence_needs_the_same_positions() -> None:
    with pytest.raises(ValueError, match="same positions of both models, got 20 and 19"):
        divergence(keep_likeliest(logits(1.0, 1)), logits(1.0, 1)[1:])


@pytest.mark.parametrize("tokens_per_batch", [1, 100])
def test_documents_add_up_to_the_figures_whatever_the_batches(tokens_per_batch: int) -> None:
    model = tiny_model()
    scores = DocumentScores(keep=True)
    figures = evaluate_model(model, ROWS, tokens_per_batch, on_logits=scores.add)
    assert scores.column("num_tokens") == [3.0, 1.0]
    assert sum(scores.column("loss")) / 4 == pytest.approx(figures["loss"], rel=1e-6)
    assert sum(scores.column("token_accuracy")) / 4 == figures["token_accuracy"]
    with torch.inference_mode():
        alone = model(torch.tensor([[5, 6]])).logits[0, -1]
    assert scores.column("loss")[1] == pytest.approx(float(cross_entropy(alone, torch.tensor(7))), rel=1e-5)
    again = DocumentScores(scores.kept)
    evaluate_model(model, ROWS, 100, on_logits=again.add)
    assert again.column("kl") == pytest.approx([0.0, 0.0], abs=1e-9)
