"""Several LoRA adapters of one base made into one, each with its weight, by peft's own ways of combining them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.chat.formats import resize_embeddings
from sft.models.saved_adapters import adapter_shapes, check_adapter_folder, check_complete, load_adapter, outgrown

logger = logging.getLogger(__name__)

TIE_TOLERANCE = 1e-5
"""Head and embeddings that differ by less, relative to the largest weight, were meant to be equal."""

Combination = Literal["cat", "linear", "ties", "dare_linear", "dare_ties"]

COMBINATIONS = ("cat", "linear", "ties", "dare_linear", "dare_ties")

PRUNING = ("ties", "dare_linear", "dare_ties")

MIX = "mix"


@dataclass(frozen=True)
class AdapterMix:
    """Which adapters are made into one, and how.

    Args:
        adapters: Folders that `PeftModel.save_pretrained` wrote.
        weights: One factor an adapter.
        combination: `cat` sums the updates exactly, whatever the ranks; `linear` sums the two LoRA matrices each by
            themselves, of one rank; `ties` (arXiv:2306.01708) trims each and lets the majority decide on signs;
            `dare_linear` and `dare_ties` (arXiv:2311.03099) drop at random and scale up what is left.
        density: Share of values that trimming and dropping keep, of `ties` and `dare_*`.
        seed: Of what is dropped.
    """

    adapters: Sequence[str | Path]
    weights: Sequence[float]
    combination: Combination = "cat"
    density: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse what can't be combined, before anything is loaded.

        Raises:
            ValueError: Names the option or the folder.
        """
        if len(self.adapters) < 2 or len(self.adapters) != len(self.weights):
            raise ValueError(
                f"{len(self.adapters)} adapters and {len(self.weights)} weights: a mix has two adapters at least, and "
                f"a weight for each."
            )
        if self.combination not in COMBINATIONS:
            raise ValueError(f"combination {self.combination!r} does not exist: use {', '.join(COMBINATIONS)}.")
        if (self.density is None) == (self.combination in PRUNING):
            needs = "needs a density" if self.combination in PRUNING else "takes no density: it keeps every value"
            raise ValueError(f"combination {self.combination!r} {needs}.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} is no share: more than 0, at most 1.")
        for adapter in map(Path, self.adapters):
            check_adapter_folder(adapter)
            _check_plain_lora(adapter)


def load_mix(model: PreTrainedModel, mix: AdapterMix) -> PeftModel:
    """Put all adapters on their base and make one of them, which is the one that is active.

    Raises:
        ValueError: One belongs to another base, or peft can't combine them.
    """
    mix.check()
    first, *others = map(Path, mix.adapters)
    peft_model = load_adapter(model, first)
    names = ["default", *(f"other{number}" for number in range(len(others)))]
    for name, adapter in zip(names[1:], others, strict=True):
        try:
            peft_model.load_adapter(adapter, name)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"The adapter in {adapter} does not fit {type(model).__name__}: {reason}") from error
        check_complete(peft_model, adapter, name)
    options: dict[str, Any] = {} if mix.density is None else {"density": mix.density}
    with torch.random.fork_rng():
        torch.manual_seed(mix.seed)
        try:
            peft_model.add_weighted_adapter(names, list(mix.weights), MIX, combination_type=mix.combination, **options)
        except ValueError as error:
            raise ValueError(f"combination {mix.combination!r} of {len(names)} adapters: {error}") from error
    peft_model.set_adapter(MIX)
    for name in names:
        peft_model.delete_adapter(name)
    return peft_model.eval()


def _check_plain_lora(adapter: Path) -> None:
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, LoraConfig) or config.use_dora:
        kind = "DoRA" if isinstance(config, LoraConfig) else config.peft_type.value
        raise ValueError(f"The adapter in {adapter} is of the kind {kind}: only plain LoRA adapters can be mixed.")
    whole = [name for name in adapter_shapes(adapter) if "lora_" not in name]
    if whole:
        raise ValueError(
            f"The adapter in {adapter} holds weights that were trained whole ({', '.join(whole[:2])}), and two "
            f"versions of those can't be mixed."
        )


def grow_to_adapter(model: PreTrainedModel, adapter: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Give the base as many rows of embeddings as it had when the adapter was trained.

    What is in the new rows does not matter: the adapter holds them, whole or as trained token rows.
    """
    wanted = outgrown(model, adapter, tokenizer)
    if wanted:
        resize_embeddings(model, wanted, [])


def merge_into_base(peft_model: PeftModel) -> PreTrainedModel:
    """Merge in memory; head and embeddings end up as one tensor only if they are equal.

    peft merges into the weight that it finds. Where head and embeddings share it and carry LoRA of their own, each
    delta would go into both, so the two are parted first and joined again when they come out equal.

    Raises:
        ValueError: A merged weight is not finite.
    """
    was_tied = bool(peft_model.get_base_model().config.get_text_config().tie_word_embeddings)
    _part_adapted_ties(peft_model)
    merged = peft_model.merge_and_unload(safe_merge=True)
    if was_tied:
        _settle_ties(merged)
    return merged


def _part_adapted_ties(peft_model: PeftModel) -> None:
    base = peft_model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or not any(isinstance(module, BaseTunerLayer) for module in (embedding, head)):
        return
    inner_head, inner_embedding = _base_layer(head), _base_layer(embedding)
    if inner_head.weight is inner_embedding.weight:
        inner_head.weight = torch.nn.Parameter(inner_head.weight.detach().clone(), requires_grad=False)


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _settle_ties(model: PreTrainedModel) -> None:
    """Join head and embeddings that came out equal, and have the config say which it is."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    largest = float(embedding.weight.abs().max())
    are_equal = float((head.weight - embedding.weight).abs().max()) <= TIE_TOLERANCE * largest
    if are_equal:
        head.weight = embedding.weight
    else:
        logger.info("head and embeddings were trained apart: the checkpoint holds both")
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = are_equal
