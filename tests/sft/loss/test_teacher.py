"""Recorded distributions as targets, against the divergence over the vocabulary in double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sft.batches.collator import DataCollatorForSFT
from sft.batches.layout import batch_layout, document_layout
from sft.labels import TEACHER_ROWS
from sft.loss import cross_entropy
from sft.loss.cross_entropy import Head, LossOptions, cross_entropy_sums, linear_cross_entropy_sums
from sft.loss.supervised import supervised_loss
from sft.loss.teacher import SoftTargets, Teacher
from tests.tiny import tiny_model

ROWS, VOCAB, WIDTH, KEPT = 23, 57, 8, 5
SOFT_ROWS = torch.tensor([2, 3, 11, 22])


@pytest.fixture(autouse=True, params=[10, 1 << 24])
def chunk_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with one row per chunk, and with all rows in one."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", request.param)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def soft_targets(share: float) -> SoftTargets:
    probabilities, tokens = (random(len(SOFT_ROWS), VOCAB, seed=5) * 3).softmax(-1).topk(KEPT)
    return SoftTargets(SOFT_ROWS, tokens, probabilities, share)


def expected_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, soft: SoftTargets
) -> torch.Tensor:
    """Cross entropy towards the recorded tokens and one class of all others, mixed with that of the targets."""
    log_probabilities = logits.log_softmax(-1)
    losses = F.cross_entropy(logits, targets, reduction="none")
    for number, row in enumerate(soft.rows.tolist()):
        known = torch.zeros(VOCAB, dtype=torch.bool)
        known[soft.tokens[number]] = True
        probabilities = soft.probabilities[number].double()
        rest = log_probabilities[row][~known].logsumexp(0)
        towards = (
            -(probabilities * log_probabilities[row][soft.tokens[number]]).sum() - (1 - probabilities.sum()) * rest
        )
        losses = losses.index_put((torch.tensor(row),), (1 - soft.share) * losses[row] + soft.share * towards)
    return (losses * weights).sum()


@pytest.mark.numerics
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_gradient_are_those_of_the_recorded_distribution(share: float, *, fused: bool) -> None:
    hidden, matrix = random(ROWS, WIDTH), random(VOCAB, WIDTH, seed=1) * 2
    targets = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    states = hidden.clone().requires_grad_()
    if fused:
        sums = linear_cross_entropy_sums(states, Head(matrix), targets, weights, LossOptions(), soft_targets(share))
    else:
        sums = cross_entropy_sums(states @ matrix.T, targets, weights, LossOptions(), soft_targets(share))
    sums.loss.backward()
    exact = hidden.double().requires_grad_()
    expected = expected_loss(exact @ matrix.double().T, targets, weights.double(), soft_targets(share))
    expected.backward()
    torch.testing.assert_close(sums.loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert states.grad is not None
    torch.testing.assert_close(states.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_only_targets_with_a_number_have_a_distribution() -> None:
    teacher = Teacher(
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), torch.tensor([[0.5, 0.25], [0.75, 0.125]]), 1.0
    )
    found = teacher.targets(torch.tensor([-1, 1, -1, 0]))
    assert found is not None
    assert (found.rows.tolist(), found.tokens.tolist()) == ([1, 3], [[3, 4], [1, 2]])
    assert found.probabilities.tolist() == [[0.75, 0.125], [0.5, 0.25]]
    assert teacher.targets(torch.tensor([-1, -1])) is None


def test_a_teacher_has_no_more_than_the_complete_loss() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 1, found 1\.5"):
        Teacher(torch.zeros(1, 1), torch.ones(1, 1), 1.5)


@pytest.mark.numerics
@pytest.mark.parametrize("share_tokens", [False, True])
def test_a_model_that_is_drawn_towards_itself_gets_no_gradient(*, share_tokens: bool) -> None:
    model = tiny_model()
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 5, 6, 7, 30, 31, 32], "seq_lengths": [5, 6], TEACHER_ROWS: [-1] * 11},
        {"input_ids": [5, 6, 7, 40, 41], "seq_lengths": [5], TEACHER_ROWS: [-1] * 5},
    ]
    tokens, probabilities = [], []
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            document = torch.tensor([row["input_ids"][start : start + length]])
            likeliest = model(document).logits[0].softmax(-1).topk(20)
            for position in range(1, length):
                row[TEACHER_ROWS][start + position] = len(tokens)
                tokens.append(likeliest.indices[position - 1])
                probabilities.append(likeliest.values[position - 1].detach())
            start += length
    teacher = Teacher(torch.stack(tokens).int(), torch.stack(probabilities), 1.0)
    batch = DataCollatorForSFT(pad_token_id=3, share_tokens=share_tokens)(rows)
    assert ("computed" in batch) == share_tokens
    norms = {}
    for name, given in (("towards itself", teacher), ("its tokens", None)):
        model.zero_grad()
        with document_layout(batch_layout(batch)):
            supervised_loss(model, batch, teacher=given).loss.backward()
        norms[name] = float(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None) ** 0.5)
    assert norms["towards itself"] < 1e-3 * norms["its tokens"]
