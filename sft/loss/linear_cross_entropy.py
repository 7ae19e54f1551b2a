"""Language model head and cross entropy in one: the logits of all tokens never exist together.

Chunk by chunk, logits are formed, scored, turned into their gradient in place, and multiplied back onto the hidden
states (and the head's weight, where it is trained). All of it happens in the forward pass; backward only scales.
This costs the same matrix products as head and loss apart, and saves three passes over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sft.kernels.products import back_through_linear, linear
from sft.loss.cross_entropy import LossOptions, SumOfScores, TokenSums, gradient_of_chunk, row_chunks, score_chunk


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
