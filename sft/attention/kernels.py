"""Attention within the documents of a flat row, as transformers' `attn_implementation="sft_documents"`.

Inside `sft.batches.layout.document_layout`, `document_attention_forward` gives the row to the fastest kernel that
computes exactly what the layer asks for: one that takes the row and its document lengths at once, or
`sft.attention.math.attend_by_document`. No mask over the row is formed, except by flex attention (in blocks).

Importing this module registers `sft_documents` with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.attention.math import AttentionOptions, attend_by_document, explicit_attention
from sft.batches.layout import DocumentLayout, current_layout
from sft.hardware import HALF_PRECISIONS, Hardware, current_hardware

SFT_DOCUMENTS = "sft_documents"
"""Name of the attention of this module in transformers' registries."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DocumentLayout, AttentionOptions], torch.Tensor]
"""Query, key, value, layout and options -> output; shapes as in `sft.attention.math.attend_by_document`."""


class Kernel(StrEnum):
    """Ways to compute attention over a flat row; the values of the first three are modules to import."""

    FLASH_3 = "flash_attn_interface"
    FLASH_2 = "flash_attn"
    TORCH_VARLEN = "torch.nn.attention.varlen"
    FLEX = "flex_attention"
    BY_DOCUMENT = "by_document"


def choose_kernel(
    hardware: Hardware, dtype: torch.dtype, dims: tuple[int, int], options: AttentionOptions, longest: int
) -> Kernel:
    """Return the fastest kernel that computes exactly what a layer asks for on this device.

    Args:
        hardware: Device and installed packages.
        dtype: Of the queries.
        dims: Width of a query head and of a value head.
        options: What the layer asks for.
        longest: Tokens of the longest document.
    """
    if hardware.device_type != "cuda" or hardware.capability < (8, 0) or options.sinks is not None:
        return Kernel.BY_DOCUMENT
    flash = dtype in HALF_PRECISIONS and dims[0] == dims[1] <= 256 and dims[0] % 8 == 0
    capped, dropping = options.softcap is not None, options.dropout > 0
    able = {
        Kernel.FLASH_3: flash and not dropping and hardware.capability[0] == 9,
        Kernel.FLASH_2: flash and not (capped and dropping),
        Kernel.TORCH_VARLEN: flash and not capped and not dropping,
    }
    for kernel, can in able.items():
        if can and kernel in hardware.packages:
            return kernel
    if not options.plain_for(longest) and not dropping and "triton" in hardware.packages:
        return Kernel.FLEX
    return Kernel.BY_DOCUMENT


def has_row_kernel(hardware: Hardware, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether one kernel call computes plain causal attention over all documents of a flat row.

    Args:
        hardware: Device and installed packages.
        dtype: Of the queries.
        head_dim: Width of a head.
    """
    options = AttentionOptions(scaling=head_dim**-0.5)
    kernel = choose_kernel(hardware, dtype, (head_dim, head_dim), options, longest=1)
    return kernel in (Kernel.FLASH_2, Kernel.FLASH_3, Kernel.TORCH_VARLEN)


def _as_tokens(states: torch.Tensor) -> torch.Tensor:
    """Reshape `(1, heads, tokens, dim)` to `(tokens, heads, dim)`."""
    return states.squeeze(0).transpose(0, 1)


def _window(options: AttentionOptions) -> tuple[int, int]:
    """Return how many tokens to the left and to the right a token attends to; -1 = all."""
    reach = -1 if options.sliding_window is None else options.sliding_window - 1
    return reach, 0 if options.is_causal else reach


def attend_torch_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: DocumentLayout, options: AttentionOptions
) -> torch.Tensor:
    """Compute attention with torch's variable-length flash kernel; shapes as in `attend_by_document`."""
    ends = layout.boundaries(query.device)
    output = import_module(Kernel.TORCH_VARLEN).varlen_attn(
        _as_tokens(query),
        _as_tokens(key),
        _as_tokens(value),
        ends,
        ends,
        layout.longest,
        layout.longest,
        scale=options.scaling,
        window_size=_window(options),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.unsqueeze(0)


def attend_flash_2(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: DocumentLayout, options: AttentionOptions
) -> torch.Tensor:
    """Compute attention with Flash Attention 2 (arXiv:2307.08691); shapes as in `attend_by_document`."""
    return _flash(Kernel.FLASH_2, (query, key, value), layout, options, {"dropout_p": options.dropout})


def attend_flash_3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: DocumentLayout, options: AttentionOptions
) -> torch.Tensor:
    """Compute attention with Flash Attention 3 (arXiv:2407.08608), which has no dropout.

    Shapes as in `attend_by_document`.
    """
    return _flash(Kernel.FLASH_3, (query, key, value), layout, options, {})


def _flash(
    package: Kernel,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: DocumentLayout,
    options: AttentionOptions,
    further: dict[str, Any],
) -> torch.Tensor:
    """Call `flash_attn_varlen_func` of a package on query, key and value, with `further` arguments."""
    ends = layout.boundaries(states[0].device)
    output = import_module(package).flash_attn_varlen_func(
        *(_as_tokens(tensor) for tensor in states),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=layout.longest,
        max_seqlen_k=layout.longest,
        softmax_scale=options.scaling,
        causal=options.is_causal,
        window_size=_window(options) if options.sliding_window is not None else (-1, -1),
        softcap=options.softcap or 0.0,
        **further,
    )
    return (output[0] if isinstance(output, tuple) else output).unsqueeze(0)


class DocumentMask:
    """Mask function of flex attention: same document, not later (if causal), within the window (if there is one).

    Args:
        document_ids: `(num_tokens,)` document of each token.
        options: What the layer asks for.
    """

    def __init__(self, document_ids: torch.Tensor, options: AttentionOptions) -> None:
        self.document_ids = document_ids
        self.is_causal = options.is_causal
        self.window = options.sliding_window

    def __call__(self, batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return whether queries at these positions may attend to keys at those positions, elementwise."""
        visible = self.document_ids[query] == self.document_ids[key]
        if self.is_causal:
            visible = visible & (query >= key)
        if self.window is not None:
            visible = visible & ((query - key).abs() < self.window)
        return visible


class SoftCap:
    """Score function of flex attention: `limit * tanh(score / limit)`."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        """Return the capped score."""
        return torch.tanh(score / self.limit) * self.limit


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Any:
    return torch.compile(import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=True)


def attend_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: DocumentLayout, options: AttentionOptions
) -> torch.Tensor:
    """Compute attention with flex attention (arXiv:2412.05496), which has soft caps and windows.

    Shapes as in `attend_by_document`. It is compiled on CUDA only.
    """
    flex = import_module("torch.nn.attention.flex_attention")
    attention = _compiled_flex_attention() if query.is_cuda else flex.flex_attention
    output = attention(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else SoftCap(options.softcap),
        block_mask=_block_mask(layout, options, query.device),
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def _block_mask(layout: DocumentLayout, options: AttentionOptions, device: torch.device) -> Any:
    """Return flex attention's block mask, built once per layout and kind of layer."""
    key = f"block_mask:{options.is_causal}:{options.sliding_window}:{device}"
    if key not in layout.cache:
        layout.cache[key] = import_module("torch.nn.attention.flex_attention").create_block_mask(
            DocumentMask(layout.document_ids(device), options),
            None,
            None,
            layout.num_tokens,
            layout.num_tokens,
            device=device,
            _compile=device.type == "cuda",
        )
    return layout.cache[key]


ATTEND: dict[Kernel, Attend] = {
    Kernel.FLASH_3: attend_flash_3,
    Kernel.FLASH_2: attend_flash_2,
    Kernel.TORCH_VARLEN: attend_torch_varlen,
    Kernel.FLEX: attend_flex,
    Kernel.BY_DOCUMENT: attend_by_document,
}


def document_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention within documents inside `document_layout`, and as `sdpa` outside it.

    This is transformers' attention interface. Inside a layout:

    1. Choose the kernel for this device, precision and layer.
    2. If beginnings that documents share are computed only once (`sft.batches.shared_tokens`), copy their states to
       every document that begins with them.
    3. Run the kernel.
    4. After step 2, keep only the outputs of the computed tokens.

    Args:
        module: Attention layer; its `is_causal` is used if `kwargs` has none.
        query: `(batch, num_heads, length, head_dim)`; inside a layout, batch is 1 and length is the number of computed
            tokens.
        key: `(batch, num_key_value_heads, length, head_dim)`.
        value: `(batch, num_key_value_heads, length, value_dim)`.
        attention_mask: `(batch, 1, length, key_length)` outside a layout; must be None inside.
        **kwargs: `scaling`, `dropout`, `sliding_window`, `softcap`, `s_aux` (attention sinks) and `is_causal` are used.

    Returns:
        `(batch, length, num_heads, value_dim)`, and None in place of the attention weights, which are not available.

    Raises:
        ValueError: The layout does not describe this row, or the layer needs something that is not supported within
            documents.
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
    query, key, value = (layout.sharing.to_documents(states) for states in (query, key, value))
    return layout.sharing.to_computed(ATTEND[kernel](query, key, value, layout, options)), None


def document_attention_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return no mask inside `document_layout`, and the mask of `sdpa` outside it; transformers' mask interface."""
    return None if current_layout() is not None else sdpa_mask(*args, **kwargs)


def _options(module: torch.nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> AttentionOptions:
    """Read what a layer asks for from the arguments that transformers' layers pass."""
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
    """Check that query and key are the one row that the layout describes, without a mask or a position bias."""
    rows, length, key_length = query.shape[0], query.shape[2], key.shape[2]
    if rows != 1 or length != layout.num_computed or key_length != length:
        raise ValueError(
            f"the document layout describes one row of {layout.num_computed} tokens ({len(layout.lengths)} documents), "
            f"but attention got {rows} rows of {length} queries and {key_length} keys; give the model the flat batch "
            "that the layout was made from, without a cache"
        )
    if attention_mask is not None:
        raise ValueError(
            f"attention got a mask of shape {tuple(attention_mask.shape)} inside a document layout, which already "
            "defines which tokens are visible; leave attention_mask out of flat batches"
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            "this model adds a position bias to its attention, which packed rows do not support: use packing=False"
        )


AttentionInterface.register(SFT_DOCUMENTS, document_attention_forward)
AttentionMaskInterface.register(SFT_DOCUMENTS, document_attention_mask)
