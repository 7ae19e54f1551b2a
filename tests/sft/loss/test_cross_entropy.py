"""The loss from logits and the fused head-and-loss, against torch's own cross entropy in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sft.loss import cross_entropy
from sft.loss.cross_entropy import Head, LossOptions, cross_entropy_sums, linear_cross_entropy_sums, row_chunks

pytestmark = pytest.mark.numerics

ROWS, VOCAB, WIDTH = 23, 57, 8

OPTIONS = [
    LossOptions(),
    LossOptions(label_smoothing=0.2, entropy=True),
    LossOptions("dft", entropy=True),
]


@pytest.fixture(autouse=True, params=[10, 1 << 24])
def chunk_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with one row per chunk, and with all rows in one."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", request.param)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def targets() -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(1))


def weights() -> torch.Tensor:
    return torch.rand(ROWS, generator=torch.Generator().manual_seed(2))


def reference(logits: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Return the sum of weighted losses by the formulas of the papers."""
    losses = F.cross_entropy(logits, targets(), reduction="none", label_smoothing=options.label_smoothing)
    if options.loss_type == "dft":
        losses = losses * logits.softmax(-1).gather(1, targets()[:, None]).squeeze(1).detach()
    return (losses * weights()).sum()


def reference_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, head: Head) -> torch.Tensor:
    logits = (hidden @ weight.T + bias) * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradient_of_logits_are_those_of_the_formula(options: LossOptions) -> None:
    logits = (random(ROWS, VOCAB) * 4).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, options)
    expected.backward()
    sums = cross_entropy_sums(logits, targets(), weights(), options)
    (sums.loss * 1.0).backward()
    torch.testing.assert_close(sums.loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 2.0, "scale": 3.0}], ids=str)
def test_fused_head_gives_loss_and_gradients_of_the_formula(shape: dict[str, Any], options: LossOptions) -> None:
    tensors = [random(ROWS, WIDTH), random(VOCAB, WIDTH, seed=3), random(VOCAB, seed=4)]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    head = Head(weight, bias, **shape)
    expected = reference(reference_head(*exact, head), options)
    (expected * 0.5).backward()
    sums = linear_cross_entropy_sums(hidden, head, targets(), weights(), options)
    (sums.loss * 0.5).backward()
    torch.testing.assert_close(sums.loss.double(), expected, rtol=1e-6, atol=0)
    for found, wanted in zip((hidden, weight, bias), exact, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-6)


def test_frozen_head_gets_no_gradient_and_hidden_states_do() -> None:
    hidden, head = random(ROWS, WIDTH).requires_grad_(), Head(random(VOCAB, WIDTH, seed=3))
    linear_cross_entropy_sums(hidden, head, targets(), weights(), LossOptions()).loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_hits_and_entropy_are_counted() -> None:
    logits = random(ROWS, VOCAB)
    logits[torch.arange(5), targets()[:5]] = 9.0
    sums = cross_entropy_sums(logits, targets(), weights(), LossOptions(entropy=True))
    assert sums.num_correct.item() == (logits.argmax(-1) == targets()).sum().item() >= 5
    expected = torch.distributions.Categorical(logits=logits).entropy().sum()
    torch.testing.assert_close(sums.entropy, expected)
    assert cross_entropy_sums(logits, targets(), weights(), LossOptions()).entropy == 0


def test_a_weight_of_zero_takes_a_token_out_of_the_loss() -> None:
    logits = random(ROWS, VOCAB)
    only_first = torch.zeros(ROWS)
    only_first[0] = 1.0
    sums = cross_entropy_sums(logits, targets(), only_first, LossOptions())
    torch.testing.assert_close(sums.loss, F.cross_entropy(logits[:1], targets()[:1]))


def test_given_logits_are_left_as_they_are() -> None:
    logits = random(ROWS, VOCAB)
    before = logits.clone()
    cross_entropy_sums(logits, targets(), weights(), LossOptions())
    assert torch.equal(logits, before)


def test_half_precision_is_scored_in_single() -> None:
    hidden, weight = random(ROWS, WIDTH, dtype=torch.bfloat16).requires_grad_(), random(VOCAB, WIDTH, seed=3).bfloat16()
    sums = linear_cross_entropy_sums(hidden, Head(weight.requires_grad_()), targets(), weights(), LossOptions())
    sums.loss.backward()
    logits = F.linear(hidden, weight).detach()
    expected = (F.cross_entropy(logits.float(), targets(), reduction="none") * weights()).sum()
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=0)
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    given = logits.requires_grad_()
    cross_entropy_sums(given, targets(), weights(), LossOptions()).loss.backward()
    assert given.grad.dtype == torch.bfloat16


def test_autocast_computes_products_in_its_type_and_keeps_float32_gradients() -> None:
    hidden, weight = random(ROWS, WIDTH).requires_grad_(), random(VOCAB, WIDTH, seed=3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sums = linear_cross_entropy_sums(hidden, Head(weight), targets(), weights(), LossOptions())
    sums.loss.backward()
    exact = (F.cross_entropy(hidden @ weight.T, targets(), reduction="none") * weights()).sum()
    assert sums.loss != exact
    torch.testing.assert_close(sums.loss, exact, rtol=2e-2, atol=0)
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


def test_no_targets_give_a_loss_of_zero_with_a_backward_pass() -> None:
    hidden, weight = random(0, WIDTH).requires_grad_(), random(VOCAB, WIDTH).requires_grad_()
    nothing = torch.empty(0, dtype=torch.long)
    loss = linear_cross_entropy_sums(hidden, Head(weight), nothing, torch.empty(0), LossOptions()).loss
    loss.backward()
    assert loss == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    logits = random(0, VOCAB).requires_grad_()
    cross_entropy_sums(logits, nothing, torch.empty(0), LossOptions()).loss.backward()
    assert logits.grad.shape == (0, VOCAB)


def test_second_backward_through_the_fused_loss_is_refused() -> None:
    hidden = random(ROWS, WIDTH).requires_grad_()
    loss = linear_cross_entropy_sums(hidden, Head(random(VOCAB, WIDTH)), targets(), weights(), LossOptions()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was already called once"):
        loss.backward()


def test_chunks_cover_all_rows_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 400)
    assert list(row_chunks(10, 100, "cpu")) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(row_chunks(0, 100, "cpu")) == []
    assert list(row_chunks(2, 1000, "cpu")) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"loss_type": "mse"}, "'mse' is unknown; use one of nll, dft"),
        ({"label_smoothing": 1.0}, "below 1, found 1.0"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "0.1 cannot be combined with loss_type 'dft'"),
    ],
)
def test_unusable_options_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LossOptions(**arguments)
