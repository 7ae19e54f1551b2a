"""Whether a training may leave out tokens that `sft.batches.shared_tokens` finds redundant, and the proof that it may."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sft.attention.choice import SFT_DOCUMENTS, rounding_tolerances
from sft.batches.collator import DataCollatorForSFT
from sft.batches.layout import batch_layout, document_layout
from sft.config import SFTConfig
from sft.inner_model import causal_lm, evaluating, learns_prompt
from sft.loss.supervised import supervised_logits


def settle_sharing(model: Any, config: SFTConfig, data_collator: Any) -> str:
    """Have the collator plan which tokens are computed, where that changes nothing but time.

    Args:
        model: With its attention set, on the device that will train it.
        config: `share_tokens`, and the options that speak against it.
        data_collator: Its `share_tokens` is set when it is this library's own for flat batches.

    Returns:
        One line that says what was chosen and why.

    Raises:
        ValueError: The model computes something else when beginnings are shared.
    """
    reason = refuse_sharing_reason(model, config, data_collator)
    if reason is not None:
        return f"every token is computed: {reason}"
    if model.device.type == config.device.type:  # FSDP and DeepSpeed move it later, piece by piece
        probe_sharing(model)
    data_collator.share_tokens = True
    return "what documents begin with alike is computed once, nothing behind their last targets"


def refuse_sharing_reason(model: Any, config: SFTConfig, data_collator: Any) -> str | None:
    """Why each token must be computed on its own, or None when nothing speaks against sharing."""
    text_config = causal_lm(model).config.get_text_config()
    if not config.share_tokens:
        return "share_tokens is off"
    if type(data_collator) is not DataCollatorForSFT or not data_collator.padding_free:
        return "batches are padded or made by another collator"
    if text_config._attn_implementation != SFT_DOCUMENTS:
        return f"attention {text_config._attn_implementation} reads rows as they are"
    if config.neftune_noise_alpha is not None:
        return "NEFTune draws noise for each token"
    if learns_prompt(model):
        return "prompt tuning lengthens the row"
    if getattr(text_config, "output_router_logits", False):
        return "the routers' loss counts every token"
    return _noise(model, text_config)


def _noise(model: nn.Module, text_config: Any) -> str | None:
    dropping = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    names = ("attention_dropout", "attn_dropout", "attn_pdrop", "router_jitter_noise")
    named = [name for name in names if getattr(text_config, name, None)]
    return "dropout draws noise for each token" if dropping or named else None


@torch.no_grad()
def probe_sharing(model: Any) -> float:
    """Run documents with a common beginning, shared and not, and see that the logits of their targets are the same.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        ValueError: It is more than rounding.
    """
    vocab_size = causal_lm(model).get_input_embeddings().weight.shape[0]
    begin = [(7 * place + 1) % vocab_size for place in range(12)]
    rows = [{"input_ids": [*begin, *((place + end) % vocab_size for place in range(6))]} for end in (2, 3, 5)]
    with evaluating(model):
        alone, shared = (_logits(model, rows, share_tokens=sharing) for sharing in (False, True))
    difference = ((alone - shared).abs().max() / alone.abs().max().clamp_min(1e-30)).item()
    tolerance = rounding_tolerances(causal_lm(model))[1]
    if difference > tolerance:
        raise ValueError(
            f"computing common beginnings once changes what {causal_lm(model).config.model_type} computes: logits "
            f"differ by {difference:.1e} of their size (limit {tolerance:.1e}). Use share_tokens=False."
        )
    return difference


def _logits(model: Any, rows: list[dict[str, list[int]]], *, share_tokens: bool) -> torch.Tensor:
    batch = DataCollatorForSFT(pad_token_id=0, padding_free=True, share_tokens=share_tokens)(rows)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    with document_layout(batch_layout(batch)):
        return supervised_logits(model, batch).logits.float()
