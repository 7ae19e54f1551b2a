"""Attention that never leaves a document, computed document by document: no mask over the whole row is ever formed."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.attention.kernels import ATTEND, choose_kernel
from sft.attention.math import AttentionOptions, explicit_attention
from sft.batches.layout import DocumentLayout, current_layout
from sft.hardware import current_hardware


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
        return explicit_attention(query, key, value, options, attention_mask), None
    _check_flat(layout, query, key, attention_mask, kwargs)
    dims = query.shape[-1], value.shape[-1]
    kernel = choose_kernel(current_hardware(query.device), query.dtype, dims, options, layout.longest)
    if layout.sharing is None:
        return ATTEND[kernel](query, key, value, layout, options), None
    query, key, value = (layout.sharing.whole(states) for states in (query, key, value))
    return layout.sharing.once(ATTEND[kernel](query, key, value, layout, options)), None


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
    if rows != 1 or length != layout.num_computed or key_length != length:
        raise ValueError(
            f"the document layout describes one row of {layout.num_computed} tokens ({len(layout.lengths)} documents), "
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
