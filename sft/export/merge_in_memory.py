"""Merge of adapters into their base with the complete model in memory, and mixes of several LoRA adapters.

Both are done by peft. This module adds the checks, the random seed and the handling of tied embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.chat.formats import resize_embeddings
from sft.models.adapter_starts import changes_base, start_of
from sft.models.saved_adapters import adapter_shapes, check_adapter_folder, check_complete, load_adapter, outgrown
from sft.models.token_rows import declares_tie

logger = logging.getLogger(__name__)

TIE_TOLERANCE = 1e-5
"""Largest difference between head and embeddings, relative to the largest weight, at which they are tied again."""

Combination = Literal["cat", "linear", "ties", "dare_linear", "dare_ties"]
COMBINATIONS = ("cat", "linear", "ties", "dare_linear", "dare_ties")
PRUNING = ("ties", "dare_linear", "dare_ties")
"""Combinations that drop values, and so need a density."""

UNMIXABLE = (
    "target_parameters",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "monteclora_config",
    "arrow_config",
)
"""Options of adapters that peft drops or refuses when it combines them."""

MIX = "mix"
"""Name that the combined adapter gets in the model."""


@dataclass(frozen=True)
class AdapterMix:
    """Several LoRA adapters of one base and how to combine them.

    Args:
        adapters: Folders that `PeftModel.save_pretrained` wrote.
        weights: One factor per adapter.
        combination: `cat` sums the updates exactly and allows different ranks. `linear` sums the A matrices and the B
            matrices separately and needs equal ranks. `ties` (arXiv:2306.01708) trims each update and decides on signs
            by majority. `dare_linear` and `dare_ties` (arXiv:2311.03099) drop values at random and scale up the rest.
        density: Share of the values that `ties` and `dare_*` keep.
        seed: Seed of the random dropping.
    """

    adapters: Sequence[str | Path]
    weights: Sequence[float]
    combination: Combination = "cat"
    density: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Check that the adapters can be combined, before anything is loaded.

        Raises:
            ValueError: They cannot; the message names the option or the folder.
        """
        if len(self.adapters) < 2 or len(self.adapters) != len(self.weights):
            raise ValueError(
                f"{len(self.adapters)} adapters and {len(self.weights)} weights: a mix needs at least two adapters, "
                f"and one weight for each."
            )
        if self.combination not in COMBINATIONS:
            raise ValueError(f"combination {self.combination!r} does not exist: use {', '.join(COMBINATIONS)}.")
        if (self.density is None) == (self.combination in PRUNING):
            needs = "needs a density" if self.combination in PRUNING else "takes no density: it keeps every value"
            raise ValueError(f"combination {self.combination!r} {needs}.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it must be more than 0 and at most 1.")
        for adapter in map(Path, self.adapters):
            check_adapter_folder(adapter)
            _check_plain_lora(adapter)


def load_mix(model: PreTrainedModel, mix: AdapterMix) -> PeftModel:
    """Load all adapters into their base and combine them into one, which is active.

    Raises:
        ValueError: An adapter belongs to another base, or peft cannot combine them.
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
    for name in names:
        _simplify(peft_model, name)
    options: dict[str, Any] = {} if mix.density is None else {"density": mix.density}
    with torch.random.fork_rng():
        torch.manual_seed(mix.seed)
        try:
            peft_model.add_weighted_adapter(names, list(mix.weights), MIX, combination_type=mix.combination, **options)
        except (ValueError, RuntimeError) as error:  # RuntimeError: ranks of single layers differ
            raise ValueError(f"combination {mix.combination!r} of {len(names)} adapters: {error}") from error
    peft_model.set_adapter(MIX)
    for name in names:
        peft_model.delete_adapter(name)
    return peft_model.eval()


def _simplify(peft_model: PeftModel, name: str) -> None:
    """Reduce the configuration of a loaded adapter to what the combined adapter may take over from it.

    peft copies the configuration of the first adapter. The combined adapter has the factor 1, since each adapter's own
    is in the matrices, but it would be scaled by the root of its rank if the first was; and it would leave out
    layers of the others that the first leaves out.
    """
    config = peft_model.peft_config[name]
    config.use_rslora = False
    config.init_lora_weights = True
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.target_modules = {
        place
        for place, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)
    }


def _check_plain_lora(adapter: Path) -> None:
    config = PeftConfig.from_pretrained(adapter)
    if config.peft_type != PeftType.LORA or config.use_dora:
        kind = "DoRA" if config.peft_type == PeftType.LORA else config.peft_type.value
        raise ValueError(f"The adapter in {adapter} is of type {kind}: only plain LoRA adapters can be mixed.")
    unmixable = [option for option in UNMIXABLE if getattr(config, option, None)]
    if changes_base(config) or unmixable:
        option = unmixable[0] if unmixable else f"init_lora_weights={start_of(config)!r}"
        raise ValueError(
            f"The adapter in {adapter} was made with {option}: only adapters that add the product of two matrices to "
            f"the weights of one base can be mixed."
        )
    full_weights = [name for name in adapter_shapes(adapter) if "lora_" not in name]
    if full_weights:
        raise ValueError(
            f"The adapter in {adapter} contains weights that were trained in full ({', '.join(full_weights[:2])}), and "
            f"two versions of such a weight cannot be mixed."
        )


def grow_to_adapter(model: PreTrainedModel, adapter: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Resize the embeddings of the base to the number of rows that they had when the adapter was trained.

    The values of the new rows do not matter, since the adapter contains them: as complete embeddings, or as trained
    token rows.
    """
    wanted = outgrown(model, adapter, tokenizer)
    if wanted:
        resize_embeddings(model, wanted, [])


def merge_into_base(peft_model: PeftModel) -> PreTrainedModel:
    """Merge the active adapter in memory; head and embeddings stay tied only if they are equal afterwards.

    peft merges into the weights in place. If head and embeddings share a weight and both have LoRA, both updates would
    be added to it. They are therefore untied first, and tied again if they come out equal.

    Raises:
        ValueError: A merged weight is not finite, or peft cannot merge the adapter.
    """
    was_tied = declares_tie(peft_model.get_base_model().config)
    _untie_adapted(peft_model)
    with refusing_unmergeable(peft_model.active_peft_config.peft_type.value):
        merged = peft_model.merge_and_unload(safe_merge=True)
    if was_tied:
        _tie_if_equal(merged)
    return merged


@contextmanager
def refusing_unmergeable(kind: str) -> Iterator[None]:
    """Turn peft's errors while it merges an adapter of this type into a ValueError with the reason."""
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"peft cannot merge this {kind} adapter: {reason} Nothing was written. It can be used as an adapter, or be "
            f"trained anew without the option that peft names."
        ) from error


def _untie_adapted(peft_model: PeftModel) -> None:
    base = peft_model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or not any(isinstance(module, BaseTunerLayer) for module in (embedding, head)):
        return
    inner_head, inner_embedding = _base_layer(head), _base_layer(embedding)
    if inner_head.weight is inner_embedding.weight:
        inner_head.weight = torch.nn.Parameter(inner_head.weight.detach().clone(), requires_grad=False)


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _tie_if_equal(model: PreTrainedModel) -> None:
    """Tie head and embeddings if they are equal, and record in the config whether they are tied."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    largest = float(embedding.weight.abs().max())
    alike = head.weight.shape == embedding.weight.shape
    are_equal = alike and float((head.weight - embedding.weight).abs().max()) <= TIE_TOLERANCE * largest
    if are_equal:
        head.weight = embedding.weight
    else:
        logger.info("head and embeddings differ after the merge: the checkpoint contains both")
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = are_equal
