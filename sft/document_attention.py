"""Attention that never leaves a document, computed document by document: no mask over the whole row is ever formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.layout import DocumentLayout, current_layout


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of its attention besides query, key and value."""

    scaling: float
    dropout: float
    is_causal: bool
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    def plain_for(self, length: int) -> bool:
        """Whether `scaled_dot_product_attention` alone gives the answer for a document of this length."""
        windowed = self.sliding_window is not None and self.sliding_window < length
        return self.softcap is None and self.sinks is None and not windowed


def document_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: per document inside `document_layout`, as `sdpa` does outside of it.

    Args:
        module: the attention layer (its `is_causal` counts where the call does not say).
        query: `(batch, num_heads, length, head_dim)`; batch is 1 inside a layout.
        key: `(batch, num_key_value_heads, length, head_dim)`.
        value: `(batch, num_key_value_heads, length, value_dim)`.
        attention_mask: `(batch, 1, length, key_length)` outside of a layout; must be None inside.
        **kwargs: `scaling`, `dropout`, `sliding_window`, `softcap`, `s_aux`, `is_causal` are honoured.

    Returns:
        `(batch, length, num_heads, value_dim)`, and None for the attention weights, which are never formed.

    Raises:
        ValueError: the layout does not describe this row, or the layer asks for what cannot be done per document.
    """
    layout = current_layout()
    options = _options(module, query, kwargs)
    if layout is None:
        if options.softcap is None and options.sinks is None:
            kwargs.pop("softcap", None)
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return _explicit(query, key, value, options, attention_mask), None
    _check_flat(layout, query, key, attention_mask, kwargs)
    return _kernel_for(query, value, options)(query, key, value, layout, options), None


def document_attention_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask interface: no mask inside `document_layout`, the one of `sdpa` outside of it."""
    return None if current_layout() is not None else sdpa_mask(*args, **kwargs)


def _options(module: torch.nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> AttentionOptions:
    scaling, is_causal = kwargs.get("scaling"), kwargs.get("is_causal")
    return AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        dropout=float(kwargs.get("dropout") or 0.0),
        is_causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )


def _check_flat(
    layout: DocumentLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    rows, length, key_length = query.shape[0], query.shape[2], key.shape[2]
    if rows != 1 or length != layout.num_tokens or key_length != length:
        raise ValueError(
            f"the document layout describes one row of {layout.num_tokens} tokens ({len(layout.lengths)} documents), "
            f"but attention got {rows} rows of {length} queries and {key_length} keys; give the model the flat batch "
            "that the layout came from, without a cache"
        )
    if attention_mask is not None:
        raise ValueError(
            f"attention got a mask of shape {tuple(attention_mask.shape)} inside a document layout, which already says "
            "what may be seen; leave attention_mask out of flat batches"
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            "this model adds a position bias to its attention, which packed rows do not support: use packing=False"
        )


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DocumentLayout, AttentionOptions], torch.Tensor]


def _kernel_for(query: torch.Tensor, value: torch.Tensor, options: AttentionOptions) -> Kernel:
    if varlen_supported(query, value, options):
        return _varlen
    return _by_document


def varlen_supported(query: torch.Tensor, value: torch.Tensor, options: AttentionOptions) -> bool:
    """Whether torch's variable-length flash kernel can do this: half precision on CUDA, nothing but causal windows."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and options.softcap is None
        and options.sinks is None
        and options.dropout == 0.0
        and find_spec("torch.nn.attention.varlen") is not None
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: DocumentLayout, options: AttentionOptions
) -> torch.Tensor:
    """One kernel launch for the whole row; the kernel itself stops at the document boundaries."""
    from torch.nn.attention.varlen import varlen_attn

    window_left = -1 if options.sliding_window is None else options.sliding_window - 1
    boundaries = layout.boundaries(query.device)
    output = varlen_attn(
        *(states.squeeze(0).transpose(0, 1) for states in (query, key, value)),
        boundaries,
        boundaries,
        layout.longest,
        layout.longest,
        scale=options.scaling,
        window_size=(window_left, 0 if options.is_causal else -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.unsqueeze(0)


def _by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: DocumentLayout, options: AttentionOptions
) -> torch.Tensor:
    """One call a document (or run of equally long documents); `split` so that backward joins the pieces only once."""
    sizes = [count * length for count, length in layout.runs]
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = []
    for (count, length), piece in zip(layout.runs, pieces, strict=True):
        batch = [_as_batch(states, count, length) for states in piece]
        attend = _scaled_dot_product if options.plain_for(length) else _explicit
        outputs.append(attend(batch[0], batch[1], batch[2], options).reshape(1, count * length, query.shape[1], -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _as_batch(states: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`(1, heads, count * length, dim)` to `(count, heads, length, dim)`."""
    if count == 1:
        return states
    return states.squeeze(0).unflatten(1, (count, length)).transpose(0, 1)


def _scaled_dot_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _grouped_kernel(query):
        groups = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=options.dropout,
        scale=options.scaling,
        is_causal=options.is_causal,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2)


def _grouped_kernel(query: torch.Tensor) -> bool:
    """Whether a fused kernel takes fewer key than query heads: on CUDA only the half-precision flash kernel does."""
    return not query.is_cuda or (query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256)


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention written out, for what `scaled_dot_product_attention` lacks: soft caps, windows and attention sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = _masked(scores, options, attention_mask).float()
    if options.sinks is not None:
        sinks = options.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks.to(scores.dtype)], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = F.dropout(weights.to(value.dtype), options.dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def _masked(scores: torch.Tensor, options: AttentionOptions, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Hide what a query may not see: by the given mask, or by causality and window counted from the last query."""
    if attention_mask is not None:
        hidden = ~attention_mask if attention_mask.dtype == torch.bool else None
        return scores + attention_mask if hidden is None else scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    num_queries, num_keys = scores.shape[-2:]
    places = torch.arange(num_keys, device=scores.device)
    distance = places[num_keys - num_queries :, None] - places[None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if options.is_causal:
        hidden |= distance < 0
    if options.sliding_window is not None:
        hidden |= distance.abs() >= options.sliding_window
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
