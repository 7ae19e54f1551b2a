"""Values that options may take, for the library and for the types of params.yaml. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

PackingStrategy = Literal["bfd", "bfd_split", "in_order", "wrapped"]
"""How documents are put into rows, see `sft.tokens.packing.pack_dataset`."""
PACKING_STRATEGIES: tuple[PackingStrategy, ...] = get_args(PackingStrategy)

OverflowPolicy = Literal["truncate", "split", "split_with_prompt", "drop", "error"]
"""What happens to documents longer than the limit, see `sft.tokens.packing.apply_overflow`."""
OVERFLOW_POLICIES: tuple[OverflowPolicy, ...] = get_args(OverflowPolicy)

NotPrintedPolicy = Literal["fail", "warn", "drop"]
"""What happens to a conversation that says more than the chat template prints, see `sft.chat.printed`."""
NOT_PRINTED_POLICIES: tuple[NotPrintedPolicy, ...] = get_args(NotPrintedPolicy)

ThinkingPolicy = Literal["keep", "last", "unroll", "drop"]
"""What happens to the reasoning of the assistant, see `sft.chat.render.ChatRenderer`."""
THINKING_POLICIES: tuple[ThinkingPolicy, ...] = get_args(ThinkingPolicy)

TruncationMode = Literal["keep_start", "keep_end"]
"""Part of a too long document that is kept."""
TRUNCATION_MODES: tuple[TruncationMode, ...] = get_args(TruncationMode)

LossType = Literal["nll", "dft"]
"""Loss per token: negative log-likelihood, or dynamic fine-tuning (arXiv:2508.05629)."""
LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)

BadLossPolicy = Literal["stop", "skip", "rollback"]
"""What happens to an update with a non-finite or spiking loss, see `SFTConfig.on_bad_loss`."""
BAD_LOSS_POLICIES: tuple[BadLossPolicy, ...] = get_args(BadLossPolicy)

UntrainedPolicy = Literal["warn", "fail"]
"""What happens if parameters that are to be trained are not, see `SFTConfig.on_untrained`."""
UNTRAINED_POLICIES: tuple[UntrainedPolicy, ...] = get_args(UntrainedPolicy)

UNREPEATABLE_STARTS = {
    "pissa_niter": "its decomposition of the weights starts from random numbers, which differ at each loading",
    "corda": "it needs activations that were measured before training, which are not saved with the adapter",
    "lora_ga": "it needs gradients that were measured before training, which are not saved with the adapter",
}
"""Starts of LoRA that change the base and cannot be repeated when a saved adapter is loaded, with the reason."""
