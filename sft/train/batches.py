"""How one training makes batches: packing, collator, padding, attention, and tokens that are computed once.

In this order: before the model is on its device, `choose_packing`, `choose_collator` and `choose_dispatch` read the
options and the data. After that, `choose_batches` sets the attention and, where this is left open, joins rows without
padding; `choose_shared_tokens` has common beginnings of documents computed once. Both run the model on a few tokens to
prove that documents in one row do not see each other and that sharing changes no logits.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sft.attention.choice import (
    check_attention_request,
    check_flash_sdp,
    choose_packed_attention,
    flash_sdp_only,
)
from sft.attention.isolation import DocumentsMixError, isolate_documents, probe_padding, rounding_tolerances
from sft.attention.kernels import SFT_DOCUMENTS, has_row_kernel
from sft.attention.per_document import Mixer, per_document
from sft.batches import language_modeling_collator
from sft.batches.collator import DataCollatorForSFT
from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM
from sft.batches.layout import batch_layout, document_layout
from sft.config import SFTConfig
from sft.hardware import Hardware, current_hardware
from sft.inner_model import causal_lm, evaluating, learns_prompt
from sft.loss.supervised import supervised_logits
from sft.models.loading import MIXED_PRECISIONS

logger = logging.getLogger(__name__)

READERS = ("compute_loss", "training_step", "prediction_step", "_prepare_inputs", "get_batch_samples")
"""Methods of a trainer that are given batches."""


@dataclass(frozen=True)
class Packing:
    """How the rows of a training are put together.

    Attributes:
        train: Whether training rows are packed.
        eval: Whether evaluation rows are packed.
        flat: Whether a batch is one row without padding; None = decided later, by `choose_batches`.
    """

    train: bool
    eval: bool
    flat: bool | None


@dataclass(frozen=True)
class RowAttention:
    """How documents in one row are kept apart.

    Attributes:
        description: What was chosen and why, in one line.
        mixers: Modules to run document by document, see `sft.attention.per_document`.
    """

    description: str
    mixers: tuple[Mixer, ...] = ()


def take_over_collator(collator: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Replace transformers' collators for token rows by this library's; return any other collator.

    The `DataCollatorForLanguageModeling` of transformers can't pad labels, and replaces those that rows have. A flat
    row of `DataCollatorWithFlattening` does not state where its documents end. This library's
    `DataCollatorForLanguageModeling` and `DataCollatorForCompletionOnlyLM` are told to state it.

    Args:
        collator: As it was given to the trainer.
        tokenizer: Its padding token fills batches.

    Raises:
        ValueError: The collator is for masked language modelling.
    """
    if isinstance(
        collator, (language_modeling_collator.DataCollatorForLanguageModeling, DataCollatorForCompletionOnlyLM)
    ):
        collator.for_trainer = True
    if type(collator) is DataCollatorWithFlattening:
        return DataCollatorForSFT(tokenizer.pad_token_id, padding_free=True)
    if type(collator) is not DataCollatorForLanguageModeling:
        return collator
    if collator.mlm:
        raise ValueError(
            "DataCollatorForLanguageModeling has mlm=True, which masks tokens for a model that attends in both "
            "directions; a causal model needs mlm=False, or leave data_collator out"
        )
    return DataCollatorForSFT(tokenizer.pad_token_id, pad_to_multiple_of=collator.pad_to_multiple_of)


def choose_packing(config: SFTConfig, data_collator: Any, datasets: list[Any]) -> Packing:
    """Decide which data sets are packed and whether batches are flat.

    Args:
        config: `packing`, `eval_packing`, `padding_free`.
        data_collator: The user's own, or None.
        datasets: All data sets. If one has packed rows already, batches are flat.
    """
    eval_packing = config.packing if config.eval_packing is None else config.eval_packing
    packed = (config.packing or eval_packing) and not config.skip_prepare_dataset
    already = any("seq_lengths" in (getattr(dataset, "column_names", None) or ()) for dataset in datasets)
    flat = packed or already or config.padding_free or getattr(data_collator, "padding_free", False)
    undecided = data_collator is None and config.padding_free is None
    return Packing(config.packing, eval_packing, flat or (None if undecided else False))


def choose_collator(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, packing: Packing) -> DataCollatorForSFT:
    """Return this library's collator for token rows, which makes flat or padded batches as `packing` says."""
    return DataCollatorForSFT(
        pad_token_id=tokenizer.pad_token_id,
        padding_free=bool(packing.flat),
        pad_to_multiple_of=config.padding_multiple,
    )


def choose_dispatch(config: SFTConfig, packing: Packing, datasets_given: list[Any]) -> None:
    """Have each of several processes read its own batches where batches can't be cut into equal parts.

    By default, accelerate has the first process read a stream and sends each process a slice of the batch along
    dimension 0. A flat batch has length 1 there, and batches of a stream that are padded one by one can't be joined.

    Args:
        config: `accelerator_config.dispatch_batches` is set to False where the user did not set it.
        packing: Whether batches are flat.
        datasets_given: All data sets.

    Raises:
        ValueError: The user set it to True, and batches are flat.
    """
    streamed = any(
        isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset)) for dataset in datasets_given
    )
    accelerator = config.accelerator_config
    if packing.flat and accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config has dispatch_batches=True, but flat batches (packing, padding_free) are one row and "
            "can't be divided among processes; leave it out"
        )
    if (packing.flat is not False or streamed) and accelerator.dispatch_batches is None:
        accelerator.dispatch_batches = False


def choose_batches(trainer: Any, trainer_class: type, *, flat: bool | None) -> RowAttention:
    """Set the attention for the batches, and decide whether they are flat where the options leave it open.

    Args:
        trainer: An `SFTTrainer` whose model is on the device that will train it. Its collator is set to flat batches
            if these are chosen.
        trainer_class: `SFTTrainer`, whose methods can read flat batches.
        flat: Whether batches are one row without padding; None = if it is faster and nothing needs padded batches.

    Raises:
        ValueError: The attention can't be used, see `choose_attention`. Flat batches that were not asked for are given
            up instead.
    """
    model, config = trainer.model, trainer.args
    if flat is not None:
        return choose_attention(model, config, flat=flat)
    reason = refuse_flat_reason(trainer, trainer_class, current_hardware(config.device))
    can_join = reason is None
    before = model.config._attn_implementation
    if reason is None:
        try:
            chosen = choose_attention(model, config, flat=True, whole=False)
        except (ValueError, RuntimeError, ImportError) as error:  # documents see each other, or a kernel fails
            if model.config._attn_implementation != before:
                model.set_attn_implementation(before)
            reason = str(error).splitlines()[0]
        else:
            trainer.data_collator.padding_free = True
            return replace(chosen, description=f"batches are joined rows without padding; {chosen.description}")
    try:
        padded = choose_attention(model, config, flat=False)
    except DocumentsMixError as error:
        if not can_join:
            raise
        chosen = choose_attention(model, config, flat=True)
        trainer.data_collator.padding_free = True
        return replace(chosen, description=f"batches are joined rows: {error}; {chosen.description}")
    return replace(padded, description=f"{padded.description}: {reason}")


def refuse_flat_reason(trainer: Any, trainer_class: type, hardware: Hardware) -> str | None:
    """Return why batches should be padded where the options leave it open; None if they may be flat.

    Args:
        trainer: An `SFTTrainer` with this library's collator.
        trainer_class: `SFTTrainer`. A method that a subclass or a script replaced may expect padded batches.
        hardware: Of the device that trains, see `current_hardware`.
    """
    model, config = trainer.model, trainer.args
    if trainer.compute_loss_func is not None or trainer.compute_metrics is not None:
        return "compute_loss_func and compute_metrics are given one row for each example"
    own = [
        name
        for name in READERS
        if getattr(getattr(trainer, name), "__func__", None) is not getattr(trainer_class, name)
    ]
    if own:
        return f"{own[0]} is the script's own and may need padded batches"
    for option in ("pad_to_multiple_of", "torch_compile", "force_flash_sdp", "parallelism_config", "deepspeed"):
        if getattr(config, option, None):
            return f"{option} is set"
    if config.accelerator_config.dispatch_batches:
        return "accelerator_config.dispatch_batches divides batches among processes"
    if not isinstance(causal_lm(model), PreTrainedModel):
        return "the model is not transformers' own"
    return _refuse_flat_attention(model, config, hardware)


def _refuse_flat_attention(model: Any, config: SFTConfig, hardware: Hardware) -> str | None:
    text_config = causal_lm(model).config.get_text_config()
    if requested_attention(model) not in ("auto", SFT_DOCUMENTS):
        return f"attn_implementation={text_config._attn_implementation!r} was asked for"
    if getattr(text_config, "output_attentions", False):
        return "output_attentions is set"
    if getattr(text_config, "attention_chunk_size", None) is not None:
        return "layers attend in chunks"
    if learns_prompt(model):
        return "prompt tuning puts its tokens before each row"
    if model.device.type != config.device.type:
        return "the model is not on its device yet"
    if hardware.device_type == "cpu":
        return None
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if not has_row_kernel(hardware, computed_in(model, config), head_dim):
        return "this device has no kernel that takes documents of many lengths at once"
    return None


def computed_in(model: Any, config: SFTConfig) -> Any:
    """Return the precision that attention computes in: that of autocast, or else that of the model's weights."""
    return MIXED_PRECISIONS[config.autocast_precision] if config.autocast_precision else model.dtype


def choose_attention(model: Any, config: SFTConfig, *, flat: bool, whole: bool = True) -> RowAttention:
    """Choose and set the attention, and prove for flat batches that documents do not see each other.

    Args:
        model: On the device that will train it.
        config: `force_flash_sdp`, the device and the precision.
        flat: Whether batches are one row without padding. The attention of padded batches is only checked.
        whole: Whether a flat batch may run document by document through the whole model, which is not faster than a
            padded one.

    Raises:
        ValueError: The requested attention can't be used here, or documents in one row would see each other.
    """
    current = model.config._attn_implementation
    requested = requested_attention(model)
    hardware = current_hardware(config.device)
    dtype = computed_in(model, config)
    if config.force_flash_sdp:
        check_flash_sdp(requested, dtype, hardware, flat)
    if not flat:
        check_attention_request(requested, dtype, hardware)
        can_be_tried = isinstance(causal_lm(model), PreTrainedModel) and model.device.type == config.device.type
        if can_be_tried and not learns_prompt(model):
            probe_padding(model)
        return RowAttention(f"attention {current} on padded batches")
    choice = choose_packed_attention(model, requested, hardware, dtype)
    if config.force_flash_sdp and choice.implementation != SFT_DOCUMENTS:
        raise ValueError(
            f"force_flash_sdp=True cannot be used: torch's flash kernel takes no mask, and {choice.reason}. Set "
            "force_flash_sdp=False."
        )
    if choice.implementation != current:
        model.set_attn_implementation(choice.implementation)
    description = f"attention {choice.implementation}: {choice.reason}"
    if model.device.type == "meta" or (
        model.device.type != config.device.type and choice.implementation != SFT_DOCUMENTS
    ):
        logger.warning(  # FSDP and DeepSpeed move the model later, in parts
            "the model is not on its device yet: it is not checked that %s keeps documents from seeing each other",
            choice.implementation,
        )
        return RowAttention(description)
    try:
        with flash_sdp_only() if config.force_flash_sdp else nullcontext():
            isolation = isolate_documents(model, own_attention=current)
    except DocumentsMixError:
        if choice.implementation == current or requested != "auto":
            raise
        model.set_attn_implementation(current)  # a layer may need the mask that only the model's own attention gets
        isolation = isolate_documents(model)
        description = f"attention {current}: {choice.implementation} can't be used"
    if isolation.is_complete and not whole:
        raise DocumentsMixError("joined rows would have to be run document by document through the whole model")
    apart = isolation.describe(causal_lm(model))
    return RowAttention(f"{description}; {apart}" if apart else description, isolation.mixers)


def requested_attention(model: Any) -> str:
    """Return the attention that the user asked for; `auto` if it is the one that transformers chooses by default."""
    current = model.config._attn_implementation
    own_choice = "sdpa" if causal_lm(model)._supports_sdpa else "eager"
    return "auto" if current in ("sdpa", own_choice) else current


def choose_shared_tokens(model: Any, config: SFTConfig, data_collator: Any, mixers: tuple[Mixer, ...] = ()) -> str:
    """Have the collator plan which tokens of a batch are computed, if this changes nothing but the time.

    Args:
        model: With its attention set, on the device that will train it.
        config: `share_tokens`, and options that exclude it.
        data_collator: Its `share_tokens` is set if it is this library's and makes flat batches.
        mixers: Modules that run document by document.

    Returns:
        What was chosen and why, in one line.
    """
    reason = refuse_sharing_reason(model, config, data_collator, mixers)
    if reason is None and model.device.type == config.device.type:  # FSDP and DeepSpeed move the model later, in parts
        with per_document(causal_lm(model), mixers):
            reason = probe_sharing(model)
    if reason is not None:
        return f"every token is computed: {reason}"
    data_collator.share_tokens = True
    return "common beginnings of documents are computed once, and no token after a document's last target"


def refuse_sharing_reason(
    model: Any, config: SFTConfig, data_collator: Any, mixers: tuple[Mixer, ...] = ()
) -> str | None:
    """Return why every token of a batch must be computed; None if common beginnings may be computed once."""
    text_config = causal_lm(model).config.get_text_config()
    if not config.share_tokens:
        return "share_tokens is off"
    if type(data_collator) is not DataCollatorForSFT or not data_collator.padding_free:
        return "batches are padded or made by another collator"
    if text_config._attn_implementation != SFT_DOCUMENTS and not mixers:
        return f"attention {text_config._attn_implementation} reads rows as they are"
    if config.neftune_noise_alpha is not None:
        return "NEFTune draws noise for each token"
    if learns_prompt(model):
        return "prompt tuning lengthens the row"
    if getattr(text_config, "output_router_logits", False):
        return "the routers' loss counts every token"
    dropping = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    names = ("attention_dropout", "attn_dropout", "attn_pdrop", "router_jitter_noise")
    named = [name for name in names if getattr(text_config, name, None)]
    return "dropout draws noise for each token" if dropping or named else None


@torch.no_grad()
def probe_sharing(model: Any) -> str | None:
    """Check that logits are the same whether a common beginning of three documents is computed once or three times.

    Returns:
        None if they are, otherwise what is wrong.
    """
    vocab_size = causal_lm(model).get_input_embeddings().weight.shape[0]
    begin = [(7 * place + 1) % vocab_size for place in range(12)]
    rows = [{"input_ids": [*begin, *((place + end) % vocab_size for place in range(6))]} for end in (2, 3, 5)]
    name = causal_lm(model).config.model_type
    with evaluating(model):
        alone = _logits(model, rows, share_tokens=False)
        try:
            shared = _logits(model, rows, share_tokens=True)
        except Exception as error:  # a model may fail on a row with gaps in any way
            return f"{name} fails where common beginnings are computed once ({type(error).__name__}: {error})"
    difference = ((alone - shared).abs().max() / alone.abs().max().clamp_min(1e-30)).item()
    tolerance = rounding_tolerances(causal_lm(model))[1]
    if difference > tolerance:
        return (
            f"computing common beginnings once changes the logits of {name} by {difference:.1e} of their size "
            f"(limit {tolerance:.1e})"
        )
    return None


def _logits(model: Any, rows: list[dict[str, list[int]]], *, share_tokens: bool) -> torch.Tensor:
    batch = DataCollatorForSFT(pad_token_id=0, padding_free=True, share_tokens=share_tokens)(rows)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    with document_layout(batch_layout(batch)):
        return supervised_logits(model, batch).logits.float()
