"""Cross entropy in chunks of rows, from logits or together with the language model head.

`cross_entropy_sums` takes logits `(num_targets, vocab)` and copies only one chunk of them at a time, forward and
backward.

`linear_cross_entropy_sums` takes the hidden states before the head, so that the logits of all targets never exist at
the same time. Its forward pass does this for each chunk of rows; its backward pass only multiplies the result by the
incoming gradient:

1. Compute the chunk's logits.
2. Score them: losses, hits, entropies. This overwrites the logits with `exp(logits - maximum)`.
3. Turn those into the gradient of the loss with respect to the logits, in place.
4. Multiply it back onto the hidden states, and onto the head's weight and bias if they are trained.

This needs the same matrix products as a separate head and loss, and three passes over memory less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sft.kernels.products import back_through_linear, linear
from sft.loss.teacher import SoftTargets
from sft.options import LOSS_TYPES

CHUNK_ELEMENTS = {"cpu": 1 << 24}
"""Device type -> most logits in a chunk: enough rows for fast matrix products, few enough to take little memory."""

DEFAULT_CHUNK_ELEMENTS = 1 << 27
"""The same for device types that `CHUNK_ELEMENTS` does not list."""


@dataclass(frozen=True)
class LossOptions:
    """What is minimized.

    Attributes:
        loss_type: `nll` (negative log-likelihood), or `dft`: the same times the target's detached probability (Dynamic
            Fine-Tuning, arXiv:2508.05629).
        label_smoothing: Share of the target distribution that is spread evenly over the vocabulary; `nll` only.
        entropy: Whether to sum the entropies of the predictions as well.
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
    """Sums over tokens, scalar tensors; only `loss` has a gradient.

    Attributes:
        loss: Sum of the weighted losses in nats.
        num_correct: Number of tokens whose target has the largest logit.
        entropy: Sum of the entropies in nats; 0 unless asked for.
    """

    loss: torch.Tensor
    num_correct: torch.Tensor
    entropy: torch.Tensor


@dataclass
class ChunkScores:
    """Scores of a chunk of rows, and what the gradient of its loss is computed from.

    Attributes:
        losses: `(rows,)` weighted losses.
        coefficients: `(rows,)` factor of each row's gradient: its weight, for `dft` times the target's probability.
        normalizers: `(rows, 1)` sum of `exp(logits - maximum)` over the vocabulary.
        log_normalizers: `(rows, 1)` log of the sum of `exp(logits)`.
        correct: `(rows,)` bool, whether the target has the largest logit.
        entropies: `(rows,)` in nats; None unless asked for.
    """

    losses: torch.Tensor
    coefficients: torch.Tensor
    normalizers: torch.Tensor
    log_normalizers: torch.Tensor
    correct: torch.Tensor
    entropies: torch.Tensor | None


def row_chunks(num_rows: int, vocab_size: int, device_type: str) -> Iterator[slice]:
    """Divide rows of logits into chunks of about equal size, each within the device's limit or a single row."""
    limit = CHUNK_ELEMENTS.get(device_type, DEFAULT_CHUNK_ELEMENTS)
    num_chunks = -(-num_rows * vocab_size // limit)
    size = -(-num_rows // max(1, num_chunks))
    for start in range(0, num_rows, max(1, size)):
        yield slice(start, min(start + size, num_rows))


def score_chunk(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    options: LossOptions,
    soft: SoftTargets | None = None,
) -> ChunkScores:
    """Score a chunk and overwrite its logits with `exp(logits - row maximum)`.

    With `m` the row's maximum and `S = sum(exp(logits - m))`:

    1. `loss = log(S) + m - logits[target]`.
    2. `dft` multiplies it by the target's probability `exp(-loss)`, which counts as a constant.
    3. Label smoothing mixes in the mean loss over the vocabulary, `log(S) + m - mean(logits)`.
    4. `entropy = log(S) - sum(exp(logits - m) * (logits - m)) / S`.
    5. Rows with a recorded distribution replace a share of their target by it, see `SoftTargets`.

    Args:
        logits: `(rows, vocab)` in the precision of the sums; overwritten.
        targets: `(rows,)` int64.
        weights: `(rows,)` factor of each token's loss, in the same precision.
        options: What is minimized.
        soft: Recorded distributions of some of the rows.
    """
    recorded = None if soft is None else logits[soft.rows].gather(-1, soft.tokens)
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
    if soft is not None and recorded is not None:
        rows = soft.rows
        mixed = soft.losses(recorded - largest[rows], normalizers[rows])
        losses = losses.index_copy(0, rows, torch.lerp(losses[rows], mixed, soft.share))
    return ChunkScores(
        losses=losses * coefficients,
        coefficients=coefficients,
        normalizers=normalizers,
        log_normalizers=log_normalizers,
        correct=places.squeeze(-1) == targets,
        entropies=None if weighted is None else (log_shift - weighted / normalizers).squeeze(-1),
    )


def gradient_of_chunk(
    exponentials: torch.Tensor,
    targets: torch.Tensor,
    scores: ChunkScores,
    options: LossOptions,
    soft: SoftTargets | None = None,
) -> torch.Tensor:
    """Turn `exp(logits - maximum)`, which `score_chunk` leaves, into the gradient of the chunk's loss, in place.

    With `p` the softmax of the logits, a row's gradient is its coefficient times
    `p - (1 - smoothing) * onehot(target) - smoothing / vocab`.

    Args:
        exponentials: `(rows, vocab)` in the precision of the sums; overwritten.
        targets: `(rows,)` int64.
        scores: Of the same chunk.
        options: What is minimized.
        soft: Recorded distributions of some of the rows, which take the place of a share of their targets.

    Returns:
        The gradient `(rows, vocab)` with respect to the logits, in the memory of `exponentials`.
    """
    smoothing = options.label_smoothing
    if soft is not None:
        exponentials[soft.rows] = soft.reweighted(exponentials[soft.rows], scores.normalizers[soft.rows])
    gradient = exponentials.mul_(scores.coefficients[:, None] / scores.normalizers)
    if smoothing:
        gradient.sub_(scores.coefficients[:, None] * (smoothing / gradient.shape[-1]))
    hard = (1 - smoothing) * scores.coefficients
    if soft is not None:
        hard = hard.index_copy(0, soft.rows, (1 - soft.share) * hard[soft.rows])
    gradient.scatter_add_(-1, targets[:, None], -hard[:, None])
    return gradient


def sum_dtype(values: torch.Tensor) -> torch.dtype:
    """Return the precision in which losses of these values are computed and summed: theirs, but at least float32."""
    return torch.promote_types(values.dtype, torch.float32)


class SumOfScores:
    """Sums of the scores of chunks, on one device in one precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.loss = torch.zeros((), dtype=dtype, device=device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=device)
        self.entropy = torch.zeros((), dtype=dtype, device=device)

    def add(self, scores: ChunkScores) -> None:
        """Add the scores of one chunk."""
        self.loss += scores.losses.sum()
        self.num_correct += scores.correct.sum()
        if scores.entropies is not None:
            self.entropy += scores.entropies.sum()

    def as_tuple(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sums of losses, hits and entropies, scalar tensors."""
        return self.loss, self.num_correct, self.entropy


class _CrossEntropy(torch.autograd.Function):
    """Loss from logits.

    Keeps the logits and two numbers per row for the backward pass, which computes the softmax again chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        options: LossOptions,
        soft: SoftTargets | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = sum_dtype(logits)
        sums, weights = SumOfScores(logits.device, dtype), weights.to(dtype)
        log_normalizers, coefficients = [weights.new_empty(0)], [weights.new_empty(0)]
        for rows in row_chunks(logits.shape[0], logits.shape[1], logits.device.type):
            scratch = logits[rows].to(dtype, copy=True)
            scores = score_chunk(scratch, targets[rows], weights[rows], options, within(soft, rows))
            sums.add(scores)
            log_normalizers.append(scores.log_normalizers.squeeze(-1))
            coefficients.append(scores.coefficients)
        ctx.save_for_backward(logits, targets, torch.cat(log_normalizers), torch.cat(coefficients))
        ctx.options, ctx.soft = options, soft
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
            # already the softmax, so the normalizer is 1
            scratch = logits[rows].to(log_normalizers.dtype, copy=True).sub_(log_normalizers[rows, None]).exp_()
            one = torch.ones_like(coefficients[rows, None])
            scores = ChunkScores(coefficients, coefficients[rows], one, one, one, None)
            gradient[rows] = gradient_of_chunk(scratch, targets[rows], scores, ctx.options, within(ctx.soft, rows))
        return gradient, None, None, None, None


def within(soft: SoftTargets | None, rows: slice) -> SoftTargets | None:
    """Return the recorded distributions of a chunk of rows; None if there are none."""
    return None if soft is None else soft.within(rows)


def cross_entropy_sums(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    options: LossOptions,
    soft: SoftTargets | None = None,
) -> TokenSums:
    """Return the sums of weighted losses, hits and entropies of tokens from their logits.

    Args:
        logits: `(num_targets, vocab)` of any floating type; converted to `sum_dtype` in chunks.
        targets: `(num_targets,)` int64, none ignored.
        weights: `(num_targets,)` float32 factor of each token's loss.
        options: What is minimized.
        soft: Recorded distributions of some of the targets.
    """
    return TokenSums(*_CrossEntropy.apply(logits, targets, weights, options, soft))


@dataclass(frozen=True)
class Head:
    """A linear language model head and what the model does to its output.

    Attributes:
        weight: `(vocab, hidden)`.
        bias: `(vocab,)` or None.
        scale: Factor of the logits (Cohere, Granite).
        softcap: If not None, logits become `softcap * tanh(logits / softcap)` after scaling (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits `(rows, vocab)` of hidden states `(rows, hidden)`, in the precision of the sums."""
        logits = linear(hidden, self.weight, self.bias)
        logits = logits.to(sum_dtype(logits))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class _Gradients:
    """Buffers for the needed gradients of hidden states, weight and bias; None if one is not needed.

    Those of the head are float32 at least, since they are sums over many chunks.
    """

    def __init__(self, hidden: torch.Tensor, head: Head, needed: tuple[bool, ...]) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=sum_dtype(head.weight)) if needed[1] else None
        self.bias = None
        if head.bias is not None and needed[2]:
            self.bias = torch.zeros_like(head.bias, dtype=sum_dtype(head.bias))

    def add(self, rows: slice, hidden: torch.Tensor, gradient: torch.Tensor, head: Head) -> None:
        """Propagate a chunk's gradient back through the linear map and add it to the buffers.

        Args:
            rows: The chunk.
            hidden: All hidden states `(num_targets, hidden)`.
            gradient: `(rows, vocab)` with respect to the linear map's output.
            head: The head with detached weights.
        """
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
    """Loss from hidden states; its forward pass computes the gradients as well, see the steps above."""

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
        soft: SoftTargets | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        head = Head(weight.detach(), None if bias is None else bias.detach(), head.scale, head.softcap)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:3])
        sums, weights = SumOfScores(hidden.device, sum_dtype(hidden)), weights.to(sum_dtype(hidden))
        for rows in row_chunks(hidden.shape[0], weight.shape[0], hidden.device.type):
            logits = head.logits(hidden[rows])
            kept = logits.clone() if head.softcap is not None else None
            chosen = within(soft, rows)
            scores = score_chunk(logits, targets[rows], weights[rows], options, chosen)
            sums.add(scores)
            if any(ctx.needs_input_grad[:3]):
                gradient = gradient_of_chunk(logits, targets[rows], scores, options, chosen)
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
            raise RuntimeError(
                "backward was already called once on this loss, which used up its gradients; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(grad_outputs[0])
            for gradient in (gradients.hidden, gradients.weight, gradients.bias)
        ]
        weight = None if scaled[1] is None else scaled[1].to(ctx.dtypes[0])
        bias = None if scaled[2] is None else scaled[2].to(ctx.dtypes[1])
        return scaled[0], weight, bias, None, None, None, None, None


def _through_head(gradient: torch.Tensor, logits: torch.Tensor | None, head: Head) -> torch.Tensor:
    """Turn the gradient with respect to the logits into that with respect to the linear map's output.

    The derivative of a soft cap is `1 - (logits / softcap)^2`.

    Args:
        gradient: `(rows, vocab)`; overwritten.
        logits: `(rows, vocab)` after the soft cap; overwritten. None if the head has no soft cap.
        head: The head.
    """
    if head.softcap is not None and logits is not None:
        gradient.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0))
    return gradient if head.scale == 1.0 else gradient.mul_(head.scale)


def linear_cross_entropy_sums(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    weights: torch.Tensor,
    options: LossOptions,
    soft: SoftTargets | None = None,
) -> TokenSums:
    """Return the sums of weighted losses, hits and entropies of tokens from the hidden states before the head.

    Args:
        hidden: `(num_targets, hidden)`, the states that the targets are predicted from.
        head: Frozen or trained.
        targets: `(num_targets,)` int64, none ignored.
        weights: `(num_targets,)` float32 factor of each token's loss.
        options: What is minimized.
        soft: Recorded distributions of some of the targets.
    """
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return TokenSums(*_LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, head, options, soft))
