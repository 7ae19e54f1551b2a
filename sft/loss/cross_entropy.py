"""Loss of single tokens from their logits, a chunk of rows at a time: no second copy of all logits is ever made.

Language model head and cross entropy in one: the logits of all tokens never exist together.

Chunk by chunk, logits are formed, scored, turned into their gradient in place, and multiplied back onto the hidden
states (and the head's weight, where it is trained). All of it happens in the forward pass; backward only scales.
This costs the same matrix products as head and loss apart, and saves three passes over memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sft.kernels.products import back_through_linear, linear
from sft.options import LOSS_TYPES

CHUNK_ELEMENTS = {"cpu": 1 << 24}
"""Logits held at a time, in numbers: enough rows to keep matrix products fast, few enough to be cheap to hold."""

DEFAULT_CHUNK_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class LossOptions:
    """What is minimised.

    Attributes:
        loss_type: `nll`, or `dft`: each token's loss times its (detached) probability, arXiv:2508.05629.
        label_smoothing: share of the target spread evenly over the vocabulary (nll only).
        entropy: also sum the entropy of the predictions.
    """

    loss_type: str = "nll"
    label_smoothing: float = 0.0
    entropy: bool = False

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type {self.loss_type!r} is unknown; use one of {', '.join(LOSS_TYPES)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label smoothing must be at least 0 and below 1, found {self.label_smoothing}")
        if self.loss_type == "dft" and self.label_smoothing:
            raise ValueError(
                f"label smoothing of {self.label_smoothing} cannot be combined with loss_type 'dft', which weighs the "
                "target's own probability; set it to 0"
            )


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens, each a tensor without dimensions; only `loss` has a gradient.

    Attributes:
        loss: weighted losses.
        num_correct: tokens whose target has the largest logit.
        entropy: entropies in nats; 0 unless asked for.
    """

    loss: torch.Tensor
    num_correct: torch.Tensor
    entropy: torch.Tensor


@dataclass
class ChunkScores:
    """Figures of a chunk of rows, each `(rows,)`: loss, coefficient of its gradient, and what turns `exp` into it."""

    losses: torch.Tensor
    coefficients: torch.Tensor
    normalizers: torch.Tensor
    log_normalizers: torch.Tensor
    correct: torch.Tensor
    entropies: torch.Tensor | None


def row_chunks(num_rows: int, vocab_size: int, device_type: str) -> Iterator[slice]:
    """Divide rows of logits into equal chunks of bounded size."""
    limit = CHUNK_ELEMENTS.get(device_type, DEFAULT_CHUNK_ELEMENTS)
    num_chunks = -(-num_rows * vocab_size // limit)
    size = -(-num_rows // max(1, num_chunks))
    for start in range(0, num_rows, max(1, size)):
        yield slice(start, min(start + size, num_rows))


def score_chunk(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, options: LossOptions
) -> ChunkScores:
    """Score a chunk, overwriting its logits with `exp(logits - row maximum)`.

    Args:
        logits: `(rows, vocab)` float32, scratch memory of the caller's.
        targets: `(rows,)` int64.
        weights: `(rows,)` float32 factor of each token's loss.
        options: what is minimised.
    """
    largest, places = logits.max(dim=-1, keepdim=True)
    target_logits = logits.gather(-1, targets[:, None])
    spread = logits.mean(dim=-1, keepdim=True) if options.label_smoothing else None
    shifted = logits.sub_(largest)
    weighted = (shifted.exp() * shifted).sum(-1, keepdim=True) if options.entropy else None
    normalizers = shifted.exp_().sum(dim=-1, keepdim=True)
    log_shift = normalizers.log()
    log_normalizers = log_shift + largest
    losses = (log_normalizers - target_logits).squeeze(-1)
    coefficients = weights * torch.exp(-losses) if options.loss_type == "dft" else weights
    if spread is not None:
        smoothing = options.label_smoothing
        losses = (1 - smoothing) * losses + smoothing * (log_normalizers - spread).squeeze(-1)
    return ChunkScores(
        losses=losses * coefficients,
        coefficients=coefficients,
        normalizers=normalizers,
        log_normalizers=log_normalizers,
        correct=places.squeeze(-1) == targets,
        entropies=None if weighted is None else (log_shift - weighted / normalizers).squeeze(-1),
    )


def gradient_of_chunk(
    exponentials: torch.Tensor, targets: torch.Tensor, scores: ChunkScores, options: LossOptions
) -> torch.Tensor:
    """Turn the `exp(logits - maximum)` that `score_chunk` leaves into the gradient of the chunk's loss, in place."""
    smoothing = options.label_smoothing
    gradient = exponentials.mul_(scores.coefficients[:, None] / scores.normalizers)
    if smoothing:
        gradient.sub_(scores.coefficients[:, None] * (smoothing / gradient.shape[-1]))
    gradient.scatter_add_(-1, targets[:, None], -(1 - smoothing) * scores.coefficients[:, None])
    return gradient


class SumOfScores:
    """Adds up chunks."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float32, device=device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=device)
        self.entropy = torch.zeros((), dtype=torch.float32, device=device)

    def add(self, scores: ChunkScores) -> None:
        """Take one chunk in."""
        self.loss += scores.losses.sum()
        self.num_correct += scores.correct.sum()
        if scores.entropies is not None:
            self.entropy += scores.entropies.sum()

    def as_tuple(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, hits, entropy."""
        return self.loss, self.num_correct, self.entropy


class _CrossEntropy(torch.autograd.Function):
    """Loss of given logits; keeps them and one number a row for backward, which forms the gradient chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, options: LossOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sums = SumOfScores(logits.device)
        log_normalizers, coefficients = [weights.new_empty(0)], [weights.new_empty(0)]
        for rows in row_chunks(logits.shape[0], logits.shape[1], logits.device.type):
            scratch = logits[rows].to(torch.float32, copy=True)
            scores = score_chunk(scratch, targets[rows], weights[rows], options)
            sums.add(scores)
            log_normalizers.append(scores.log_normalizers.squeeze(-1))
            coefficients.append(scores.coefficients)
        ctx.save_for_backward(logits, targets, torch.cat(log_normalizers), torch.cat(coefficients))
        ctx.options = options
        outputs = sums.as_tuple()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets, log_normalizers, coefficients = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        coefficients = coefficients * grad_outputs[0]
        for rows in row_chunks(logits.shape[0], logits.shape[1], logits.device.type):
            scratch = logits[rows].to(torch.float32, copy=True).sub_(log_normalizers[rows, None]).exp_()
            one = torch.ones_like(coefficients[rows, None])
            scores = ChunkScores(coefficients, coefficients[rows], one, one, one, None)
            gradient[rows] = gradient_of_chunk(scratch, targets[rows], scores, ctx.options)
        return gradient, None, None, None


def cross_entropy_sums(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, options: LossOptions
) -> TokenSums:
    """Weighted losses of tokens whose logits are at hand.

    Args:
        logits: `(num_targets, vocab)`, any floating type; computed with in float32.
        targets: `(num_targets,)` int64, none ignored.
        weights: `(num_targets,)` float32.
        options: what is minimised.
    """
    return TokenSums(*_CrossEntropy.apply(logits, targets, weights, options))


@dataclass(frozen=True)
class Head:
    """A linear head and what the model does to its output.

    Attributes:
        weight: `(vocab, hidden)`.
        bias: `(vocab,)` or None.
        scale: factor of the logits (Cohere, Granite).
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits `(rows, vocab)` of hidden states `(rows, hidden)`."""
        logits = linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class _Gradients:
    """Buffers for the gradients that are needed; float32 for the head, which is summed over many chunks."""

    def __init__(self, hidden: torch.Tensor, head: Head, needed: tuple[bool, ...]) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=torch.float32) if needed[1] else None
        self.bias = None
        if head.bias is not None and needed[2]:
            self.bias = torch.zeros_like(head.bias, dtype=torch.float32)

    def add(self, rows: slice, hidden: torch.Tensor, gradient: torch.Tensor, head: Head) -> None:
        """Carry a chunk's gradient of the logits `(rows, vocab)` back through the linear map."""
        if self.bias is not None:
            self.bias += gradient.sum(dim=0)
        gradient = gradient.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = back_through_linear(gradient, head.weight)
        if self.weight is not None and self.weight.dtype == hidden.dtype:
            self.weight.addmm_(gradient.T, hidden[rows])
        elif self.weight is not None:
            self.weight += gradient.T @ hidden[rows]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        head: Head,
        options: LossOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        head = Head(weight.detach(), None if bias is None else bias.detach(), head.scale, head.softcap)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:3])
        sums = SumOfScores(hidden.device)
        for rows in row_chunks(hidden.shape[0], weight.shape[0], hidden.device.type):
            logits = head.logits(hidden[rows])
            kept = logits.clone() if head.softcap is not None else None
            scores = score_chunk(logits, targets[rows], weights[rows], options)
            sums.add(scores)
            if any(ctx.needs_input_grad[:3]):
                gradient = gradient_of_chunk(logits, targets[rows], scores, options)
                gradients.add(rows, hidden, _through_head(gradient, kept, head), head)
        ctx.gradients = gradients
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        outputs = sums.as_tuple()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was already taken back once, which used its gradients up; compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(grad_outputs[0])
            for gradient in (gradients.hidden, gradients.weight, gradients.bias)
        ]
        weight = None if scaled[1] is None else scaled[1].to(ctx.dtypes[0])
        bias = None if scaled[2] is None else scaled[2].to(ctx.dtypes[1])
        return scaled[0], weight, bias, None, None, None, None


def _through_head(gradient: torch.Tensor, logits: torch.Tensor | None, head: Head) -> torch.Tensor:
    """Gradient of the linear map's output, given that of the logits; overwrites both."""
    if head.softcap is not None and logits is not None:
        gradient.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0))
    return gradient if head.scale == 1.0 else gradient.mul_(head.scale)


def linear_cross_entropy_sums(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, weights: torch.Tensor, options: LossOptions
) -> TokenSums:
    """Weighted losses of tokens, from the hidden states before the head.

    Args:
        hidden: `(num_targets, hidden)`, the states that the targets are predicted from.
        head: frozen or trained.
        targets: `(num_targets,)` int64, none ignored.
        weights: `(num_targets,)` float32 factor of each token's loss.
        options: what is minimised.
    """
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return TokenSums(*_LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, head, options))
