"""Attention document by document: torch's kernel, or plain matrix products for options that the kernel lacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sft.batches.layout import DocumentLayout
from sft.hardware import HALF_PRECISIONS


@dataclass(frozen=True)
class AttentionOptions:
    """Attention options of a layer besides query, key and value.

    Attributes:
        scaling: Factor of the scores.
        dropout: Probability of dropping an attention weight; 0 outside training.
        is_causal: Whether a token attends to itself and earlier tokens only.
        sliding_window: Most tokens that a token attends to, itself included; None = all.
        softcap: If not None, scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `(num_heads,)` score of an additional key without a value in each head (gpt-oss); None = no such key.
    """

    scaling: float
    dropout: float = 0.0
    is_causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def plain_for(self, length: int) -> bool:
        """Return whether `scaled_dot_product_attention` supports these options for documents up to this length."""
        windowed = self.sliding_window is not None and self.sliding_window < length
        return self.softcap is None and self.sinks is None and not windowed

    def beyond_flash(self) -> str:
        """Return the options in use that torch's flash kernel does not support, as text for a message."""
        found = {
            f"a soft cap of {self.softcap} on its scores": self.softcap is not None,
            f"a sliding window of {self.sliding_window} tokens": self.sliding_window is not None,
            "attention sinks": self.sinks is not None,
        }
        return " and ".join(name for name, is_asked in found.items() if is_asked)


def flash_is_forced() -> bool:
    """Return whether `sft.attention.choice.flash_sdp_only` is active: torch may use its flash kernel only."""
    return torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()


def attend_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: DocumentLayout, options: AttentionOptions
) -> torch.Tensor:
    """Compute attention with one call per run of documents of equal length.

    The documents of a run are computed as one batch. The row is split by `Tensor.split`, whose backward
    pass joins the gradients of all documents once instead of adding up one full-length gradient per document.

    Args:
        query: `(1, num_heads, num_tokens, head_dim)`.
        key: `(1, num_key_value_heads, num_tokens, head_dim)`.
        value: `(1, num_key_value_heads, num_tokens, value_dim)`.
        layout: Lengths of the documents.
        options: Options of the layer.

    Returns:
        `(1, num_tokens, num_heads, value_dim)`.

    Raises:
        ValueError: `force_flash_sdp` is set and the layer needs something that the flash kernel lacks.
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
    """Reshape `(1, heads, count * length, dim)` to `(count, heads, length, dim)`."""
    if count == 1:
        return states
    return states.squeeze(0).unflatten(1, (count, length)).transpose(0, 1)


def scaled_dot_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Compute attention with torch's `scaled_dot_product_attention`.

    Args:
        query: `(documents, num_heads, length, head_dim)`.
        key: `(documents, num_key_value_heads, length, head_dim)`.
        value: `(documents, num_key_value_heads, length, value_dim)`.
        options: Options for which `plain_for` returns True.

    Returns:
        `(documents, length, num_heads, value_dim)`.

    Raises:
        ValueError: `force_flash_sdp` is set and the flash kernel does not support these tensors.
    """
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
            f"{query.dtype}, heads of width {query.shape[-1]}, dropout {options.dropout:g} (the CPU kernel supports "
            "no dropout). Set force_flash_sdp=False, or the model's attention dropout to 0"
        ) from error
    return output.transpose(1, 2)


def _grouped_kernel(query: torch.Tensor) -> bool:
    """Return whether a fused kernel supports fewer key than query heads; on CUDA only the flash kernel does."""
    return not query.is_cuda or (query.dtype in HALF_PRECISIONS and query.shape[-1] <= 256)


def explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention with plain matrix products, for soft caps, windows and attention sinks.

    1. Scores: `query @ key^T * scaling`, capped if there is a soft cap.
    2. Mask: by `attention_mask`, else by causality and window.
    3. Softmax in float32 at least; an attention sink takes part in it as one more key and is dropped afterwards.
    4. Dropout, then `weights @ value`.

    Args:
        query: `(batch, num_heads, length, head_dim)`.
        key: `(batch, num_key_value_heads, key_length, head_dim)`.
        value: `(batch, num_key_value_heads, key_length, value_dim)`.
        options: Options of the layer; causality and window are used if there is no mask.
        attention_mask: `(batch, 1, length, key_length)`, bool (True = visible) or a float that is added to the scores.

    Returns:
        `(batch, length, num_heads, value_dim)`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = _masked(scores, options, attention_mask)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if options.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = options.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks.to(scores.dtype)], dim=-1).softmax(-1)[..., :-1]
    weights = F.dropout(weights.to(value.dtype), options.dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def _masked(scores: torch.Tensor, options: AttentionOptions, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mask scores `(batch, heads, queries, keys)` by the attention mask, or by causality and window if it is None.

    The last query is at the position of the last key.
    """
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
