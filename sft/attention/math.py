"""Attention within documents: torch's own kernel, or written out where that lacks something."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sft.batches.layout import DocumentLayout
from sft.hardware import HALF_PRECISIONS


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of its attention besides query, key and value.

    Attributes:
        scaling: factor of the scores.
        dropout: probability to leave a weight out; 0 outside of training.
        is_causal: whether a token sees only itself and what is before it.
        sliding_window: number of tokens that a token sees at most, itself among them.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `(num_heads,)` scores of a key that is always there and has no value (gpt-oss).
    """

    scaling: float
    dropout: float = 0.0
    is_causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def plain_for(self, length: int) -> bool:
        """Whether `scaled_dot_product_attention` alone gives the answer for documents up to this length."""
        windowed = self.sliding_window is not None and self.sliding_window < length
        return self.softcap is None and self.sinks is None and not windowed

    def beyond_flash(self) -> str:
        """What is asked for that torch's kernel does not have."""
        found = {
            f"a soft cap of {self.softcap} on its scores": self.softcap is not None,
            f"a sliding window of {self.sliding_window} tokens": self.sliding_window is not None,
            "attention sinks": self.sinks is not None,
        }
        return " and ".join(name for name, is_asked in found.items() if is_asked)


def flash_is_forced() -> bool:
    """Whether `flash_sdp_only` is in force: torch may use its flash kernel, and not the plain one beside it."""
    return torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()


def attend_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: DocumentLayout, options: AttentionOptions
) -> torch.Tensor:
    """One call a document (or run of equally long ones); `split` so that backward joins the pieces only once.

    Args:
        query: `(1, num_heads, num_tokens, head_dim)`.
        key: `(1, num_key_value_heads, num_tokens, head_dim)`.
        value: `(1, num_key_value_heads, num_tokens, value_dim)`.
        layout: where documents end.
        options: what the layer asks for.

    Returns:
        `(1, num_tokens, num_heads, value_dim)`.
    """
    sizes = [count * length for count, length in layout.runs]
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = []
    for (count, length), piece in zip(layout.runs, pieces, strict=True):
        batch = [_as_batch(states, count, length) for states in piece]
        if flash_is_forced() and not options.plain_for(length):
            raise ValueError(
                f"force_flash_sdp=True, but this layer asks for {options.beyond_flash()}, which torch's flash kernel "
                "lacks: set force_flash_sdp=False"
            )
        attend = scaled_dot_product if options.plain_for(length) else explicit_attention
        outputs.append(attend(batch[0], batch[1], batch[2], options).reshape(1, count * length, query.shape[1], -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _as_batch(states: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`(1, heads, count * length, dim)` to `(count, heads, length, dim)`."""
    if count == 1:
        return states
    return states.squeeze(0).unflatten(1, (count, length)).transpose(0, 1)


def scaled_dot_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """torch's kernel, from documents `(documents, heads, length, dim)` to `(documents, length, heads, dim)`."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _grouped_kernel(query):
        groups = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    try:
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=options.dropout,
            scale=options.scaling,
            is_causal=options.is_causal,
            enable_gqa=grouped,
        )
    except RuntimeError as error:
        if not flash_is_forced() or "kernel" not in str(error):
            raise
        raise ValueError(
            f"force_flash_sdp=True, but torch's flash kernel does not take this layer's attention on {query.device}: "
            f"{query.dtype}, heads of width {query.shape[-1]}, dropout {options.dropout:g} (a CPU knows none). Set "
            "force_flash_sdp=False, or the model's attention dropout to 0"
        ) from error
    return output.transpose(1, 2)


def _grouped_kernel(query: torch.Tensor) -> bool:
    """Whether a fused kernel takes fewer key than query heads: on CUDA only the half-precision flash kernel does."""
    return not query.is_cuda or (query.dtype in HALF_PRECISIONS and query.shape[-1] <= 256)


def explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention written out, for what `scaled_dot_product_attention` lacks: soft caps, windows and attention sinks.

    Args:
        query: `(batch, num_heads, length, head_dim)`.
        key: `(batch, num_key_value_heads, key_length, head_dim)`.
        value: `(batch, num_key_value_heads, key_length, value_dim)`.
        options: what the layer asks for; its causality and window count where there is no mask.
        attention_mask: `(batch, 1, length, key_length)`, boolean (True may be seen) or added to the scores.

    Returns:
        `(batch, length, num_heads, value_dim)`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = _masked(scores, options, attention_mask).float()
    if options.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = options.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks.to(scores.dtype)], dim=-1).softmax(-1)[..., :-1]
    weights = F.dropout(weights.to(value.dtype), options.dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def _masked(scores: torch.Tensor, options: AttentionOptions, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Hide what a query may not see: by the mask, or by causality and window, last query facing last key."""
    lowest = torch.finfo(scores.dtype).min
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            return scores.masked_fill(~attention_mask, lowest)
        return scores + attention_mask
    num_queries, num_keys = scores.shape[-2:]
    places = torch.arange(num_keys, device=scores.device)
    distance = places[num_keys - num_queries :, None] - places[None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if options.is_causal:
        hidden |= distance < 0
    if options.sliding_window is not None:
        hidden |= distance.abs() >= options.sliding_window
    return scores.masked_fill(hidden, lowest)
