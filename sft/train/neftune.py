"""NEFTune: uniform noise on the input embeddings in training (Jain et al., arXiv:2310.05914)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sft.batches.layout import current_layout
from sft.inner_model import causal_lm


class _EmbeddingNoise:
    """Hooks of one model: `see_inputs` keeps the attention mask of a batch, `add_noise` adds the noise."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.attention_mask: torch.Tensor | None = None

    def see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.attention_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def add_noise(self, module: nn.Module, args: tuple[Any, ...], embeddings: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embeddings
        lengths = document_length_of_tokens(embeddings, self.attention_mask)
        magnitude = self.alpha / (lengths * embeddings.shape[-1]).sqrt()
        noise = torch.empty_like(embeddings).uniform_(-1.0, 1.0)
        return embeddings + noise * magnitude[..., None].to(embeddings.dtype)


def document_length_of_tokens(embeddings: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return for each token the number of tokens in its document, float32 `(batch, length)`.

    A flat row has several documents; in a padded row, padding is not counted.

    Args:
        embeddings: `(batch, length, width)`.
        attention_mask: `(batch, length)`; None if nothing is padded.
    """
    num_rows, num_tokens = embeddings.shape[:2]
    layout = current_layout()
    if layout is not None and (num_rows, num_tokens) == (1, layout.num_tokens):
        lengths = torch.tensor(layout.lengths, device=embeddings.device, dtype=torch.float32)
        return lengths[layout.document_ids(embeddings.device)][None]
    if attention_mask is not None and attention_mask.shape == (num_rows, num_tokens):
        return attention_mask.sum(dim=1, keepdim=True).float().expand(num_rows, num_tokens)
    return embeddings.new_full((num_rows, num_tokens), num_tokens, dtype=torch.float32)


@contextmanager
def embedding_noise(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Add noise to the input embeddings inside the block, in training mode only.

    Each token's embedding gets uniform noise from -1 to 1 times `alpha / sqrt(L * d)`, where `L` is the length of the
    token's document in tokens and `d` the width of the embedding.

    Args:
        model: Causal language model, wrapped or not.
        alpha: Strength of the noise (5 to 15 in the paper); None = no noise.

    Raises:
        ValueError: `alpha` is not above 0.
    """
    if alpha is None:
        yield
        return
    if alpha <= 0:
        raise ValueError(f"neftune_noise_alpha must be above 0, found {alpha}; leave it None for no noise")
    noise = _EmbeddingNoise(alpha)
    handles = [
        model.register_forward_pre_hook(noise.see_inputs, with_kwargs=True),
        causal_lm(model).get_input_embeddings().register_forward_hook(noise.add_noise),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
