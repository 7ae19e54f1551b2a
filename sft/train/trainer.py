"""`SFTTrainer`: wires model, adapter, data, attention and loss into `transformers.Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from transformers import (
    BaseImageProcessor,
    DataCollator,
    EvalPrediction,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from sft.attention.choice import flash_sdp_only
from sft.batches.layout import batch_layout, document_layout
from sft.batches.shared_tokens import without_sharing
from sft.config import SFTConfig
from sft.kernels.layers import fused_layers
from sft.kernels.lora import fused_lora
from sft.labels import TOKEN_MASKS
from sft.loss.cross_entropy import LossOptions
from sft.loss.supervised import supervised_loss
from sft.loss.targets import num_targets
from sft.models.adapters import count_parameters, wrap_adapter
from sft.train.arguments import (
    apply_chat_template,
    one_processor,
    resolve_config,
    resolve_model,
    resolve_processor,
    settle_liger,
    tokenizer_of,
)
from sft.train.bad_updates import LossWatch, act_on
from sft.train.batches import (
    choose_collator,
    choose_packing,
    settle_batches,
    settle_dispatch,
    settle_sharing,
    take_over_collator,
)
from sft.train.checks import check_collator, check_ignored, check_token_rows
from sft.train.counters import TokensSeen, TokenTotals, UnloggedFigures
from sft.train.datasets import FormattingFunc, prepare_all, prepare_later
from sft.train.images import choose_vision_collator
from sft.train.neftune import embedding_noise
from sft.train.offloading import check_offloading, offloaded_activations
from sft.train.processes import (
    FILLER,
    EvenCollator,
    EvenOrder,
    EvenRows,
    can_be_filled,
    settle_sharding,
    without_copies,
)

logger = logging.getLogger(__name__)

Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin
Callback = TypeVar("Callback", bound=TrainerCallback)
OWN_INPUTS = ("seq_lengths", "loss_weights", "skip_logits", FILLER)
COLLATED_COLUMNS = ("input_ids", "labels", "seq_lengths", "loss_weights", *TOKEN_MASKS, FILLER)


class SFTTrainer(Trainer):
    """Supervised fine-tuning of a causal language model.

    After construction `train_dataset` holds `input_ids` and `labels` (and `seq_lengths` when packed), so that anyone
    can look at what is trained, e.g. with `sft.preview_masks`.

    Args:
        model: Hub id, folder, model, or `PeftModel` to continue.
        args: `SFTConfig`; plain `TrainingArguments` are taken over into one.
        data_collator: None = chosen from the options.
        train_dataset: Rows of any shape that `sft.train.datasets.prepare_dataset` knows.
        eval_dataset: The same, or a dict of them.
        processing_class: Tokenizer or processor; None = the one that belongs to the model.
        compute_loss_func: `(outputs, labels, num_items_in_batch) -> loss` in place of this trainer's own.
        compute_metrics: Called with the logits of the evaluation rows.
        callbacks: Added to the default ones.
        optimizers: Optimizer and scheduler in place of those that `args` states.
        optimizer_cls_and_kwargs: Optimizer class in place of the one that `args` states.
        preprocess_logits_for_metrics: Applied to logits before they are gathered.
        peft_config: Adapter to put on the model.
        formatting_func: Example (or batch) to text (or texts).
        former: Arguments as older scripts give them: `tokenizer` for `processing_class`, options that belong to `args`.

    Raises:
        ValueError: Arguments that contradict each other, the data or the model; says where and the way out.
    """

    _signature_columns: list[str] | None
    data_collator: Any
    is_fsdp_enabled: bool

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Processor | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        formatting_func: FormattingFunc | None = None,
        **former: Any,
    ) -> None:
        processing_class = one_processor(processing_class, former.pop("tokenizer", None))
        config = resolve_config(args, model, former)
        processing_class = resolve_processor(processing_class, model, config)
        tokenizer = tokenizer_of(processing_class)
        set_seed(config.seed)  # the adapter and new tokens' rows are drawn before upstream seeds anything
        model = apply_chat_template(resolve_model(model, config), tokenizer, config)
        model = wrap_adapter(model, peft_config, tokenizer, **checkpointing_arguments(config))
        settle_liger(model, config)
        if data_collator is None:
            given, formatted = [train_dataset, eval_dataset], formatting_func is not None
            data_collator = choose_vision_collator(processing_class, config, given, formatted=formatted)
        data_collator = take_over_collator(data_collator, tokenizer)
        packing = choose_packing(config, data_collator, [train_dataset, eval_dataset])
        check_ignored(config, data_collator, packing, train_dataset, eval_dataset)
        self._prepare = partial(prepare_all, tokenizer=tokenizer, config=config, formatting_func=formatting_func)
        train_dataset = self._prepare(train_dataset, packing=packing.train, name="train")
        eval_dataset = self._prepare(eval_dataset, packing=packing.eval, name="eval")
        settle_dispatch(config, packing, [train_dataset, eval_dataset])
        check_collator(data_collator, train_dataset, tokenizer)
        check_token_rows(model, config, data_collator, train_dataset, eval_dataset)
        data_collator = data_collator or choose_collator(config, tokenizer, packing)
        self._start_counting(config)
        super().__init__(
            model=model,
            args=config,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=[UnloggedFigures(), LossWatch(config.on_bad_loss, config.bad_loss_factor), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.neftune_noise_alpha = None  # upstream scales the noise by the whole row's length; see `train`
        self.loss_is_scaled_for_ga = True
        with self.accelerator.autocast():
            self.attention = settle_batches(self, SFTTrainer, flat=packing.flat)
            self.sharing = self._settle_sharing(config)
        self._say_what_is_trained()

    def create_accelerator_and_postprocess(self) -> None:
        """As upstream, and with FSDP2 where a launcher asked for it on a CPU."""
        super().create_accelerator_and_postprocess()
        if settle_sharding(self.accelerator):
            self.is_fsdp_enabled = True

    def _start_counting(self, config: SFTConfig) -> None:
        self._loss_options = LossOptions(config.loss_type, config.label_smoothing_factor, config.log_entropy)
        self._totals = {"train": TokenTotals(), "eval": TokenTotals()}
        self._tokens_seen = TokensSeen(config.device)
        self._before_update: TokenTotals | None = None

    def _say_what_is_trained(self) -> None:
        counts = count_parameters(self.model)
        figures = (counts.num_trainable, counts.num_total, self.attention, self.sharing)
        logger.info("training %s of %s parameters; %s; %s", *figures)
        if self.args.activation_offloading:
            check_offloading(self.args.device)

    def _settle_sharing(self, config: SFTConfig) -> str:
        if self.compute_loss_func is not None:
            return "every token is computed: compute_loss_func is given the outputs of all"
        return settle_sharing(self.model, config, self.data_collator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer.train` does, with NEFTune's noise and fused layers while it lasts."""
        with (
            embedding_noise(self.model, self.args.neftune_noise_alpha),
            fused_lora(self.model) if self.args.fused_lora else nullcontext(),
            fused_layers(self.model) if self.args.fused_layers else nullcontext(),
        ):
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward pass; the documents' borders hold for both, as checkpointing computes twice."""
        if self._before_update is None:
            self._before_update = self._totals["train"].copy()
        with (
            attention_context(inputs, force_flash_sdp=self.args.force_flash_sdp),
            offloaded_activations(model, enabled=self.args.activation_offloading),
        ):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._callback(LossWatch).add(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients, and what `on_bad_loss` says of an update that would do harm."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        watch, before = self._callback(LossWatch), self._before_update
        self._before_update = None
        problem = watch.problem(grad_norm, self.accelerator.gather)
        if problem is not None and before is not None:
            self._totals["train"] = before
            act_on(self, watch, problem)
        return grad_norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of a batch: the sum over its targets divided by the targets of the whole accumulated batch."""
        if self.compute_loss_func is not None:
            inputs = {name: value for name, value in inputs.items() if name not in OWN_INPUTS}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        keep_logits = return_outputs and self.compute_metrics is not None
        result = supervised_loss(model, inputs, num_items_in_batch, self._loss_options, keep_logits=keep_logits)
        skip_broken = model.training and self.args.logging_nan_inf_filter
        self._totals["train" if model.training else "eval"].add(result, skip_broken=skip_broken)
        loss = result.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, targets were summed
        return (loss, {"logits": result.logits}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """One evaluation batch, with its documents' borders; `compute_metrics` needs the logits of every token."""
        if self.compute_metrics is not None:
            inputs = without_sharing(inputs)
        with attention_context(inputs, force_flash_sdp=self.args.force_flash_sdp):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As upstream; rows that are not prepared yet are prepared as the trainer's own evaluation rows."""
        return super().get_eval_dataloader(prepare_later(eval_dataset, self.args, self._prepare))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The same for `predict`."""
        return super().get_test_dataloader(prepare_later(test_dataset, self.args, self._prepare))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is a mean over tokens, whatever the batch size and the packing."""
        self._totals["eval"] = TokenTotals()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.compute_loss_func is None:
            figures = self._totals["eval"].means(self.accelerator.gather)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens seen, token accuracy (and entropy when asked) to training logs; means are over tokens.

        Upstream's loss is a mean over updates, however many targets each had. What a mixture of experts adds for its
        load balancing is `aux_loss`, apart.
        """
        if self.args.include_num_input_tokens_seen != "no":
            self._count_tokens()
            if "loss" in logs:
                logs["num_tokens"] = self.state.num_input_tokens_seen
        if "loss" in logs and self.compute_loss_func is None:
            figures = self._totals["train"].means(self.accelerator.gather)
            if not figures:
                del logs["loss"]  # all updates since the last line were skipped
            logs.update(figures)
            self._totals["train"] = TokenTotals()
        super().log(logs, start_time)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count a batch; upstream would wait for the device at every batch, and takes an EOS used as padding for it."""
        if self.args.include_num_input_tokens_seen != "no":
            self._tokens_seen.add(inputs, padding=self.args.include_num_input_tokens_seen == "all")

    def _count_tokens(self) -> None:
        self.state.num_input_tokens_seen += self._tokens_seen.take(self.accelerator.gather)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, with the tokens seen and the figures summed up so far, so that a resumed training goes on counting."""
        self._count_tokens()
        self._callback(UnloggedFigures).sums = self._totals["train"].sums(self.accelerator.gather)
        super()._save_checkpoint(model, trial)

    def _load_callback_state(self) -> None:
        """Take over what a checkpoint says of our callbacks, of others only when asked; go on adding up from there."""
        super()._load_callback_state()
        for kind in (UnloggedFigures, LossWatch):
            stored = self.state.stateful_callbacks.setdefault(kind.__name__, {})
            vars(self._callback(kind)).update((stored[0] if isinstance(stored, list) else stored).get("args", {}))
        sums = self._callback(UnloggedFigures).sums
        self._totals["train"] = TokenTotals(sums if self.is_world_process_zero() else None)
        watch = self._callback(LossWatch)
        watch.policy, watch.factor = self.args.on_bad_loss, self.args.bad_loss_factor  # as they are now

    def _callback(self, kind: type[Callback]) -> Callback:
        """Our own callback of a kind; upstream makes new ones when a training is resumed."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the weights; those that were gathered from all processes without copies of tied ones."""
        super()._save(output_dir, without_copies(self.model, state_dict))

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """Targets (or their weights) in all batches of one update, over all processes."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = sum(num_targets(batch) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **options: Any) -> Any:
        """Share rows out among processes so that none is trained or evaluated twice."""
        multiple = batch_size * self.accelerator.num_processes
        rebalanced = self.args.train_sampling_strategy == "batch_rebalance"  # deals rows out itself
        drop_last = self.args.dataloader_drop_last
        if multiple == batch_size or rebalanced or not can_be_filled(dataset, drop_last=drop_last):
            return super()._get_dataloader(dataset, description, batch_size, **options)
        rows, collator = EvenRows(dataset, multiple), self.data_collator
        order = options.pop("sampler_fn")(dataset)
        if order is not None:
            order = EvenOrder(order, rows, lambda: int(self.state.epoch or 0), self.args.data_seed)
        logits_are_gathered = self.compute_metrics is not None and not options.get("is_training")
        self.data_collator = EvenCollator(collator, keep_rows=logits_are_gathered)
        try:
            return super()._get_dataloader(rows, description, batch_size, sampler_fn=lambda _: order, **options)
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that collators and loss read, though no model's forward names them."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = list(dict.fromkeys([*(self._signature_columns or ()), *COLLATED_COLUMNS]))


def checkpointing_arguments(config: SFTConfig) -> dict[str, Any]:
    """What preparing a k-bit base needs to know of gradient checkpointing."""
    return {
        "gradient_checkpointing": bool(config.activation_checkpointing),
        "gradient_checkpointing_kwargs": config.activation_checkpointing_kwargs,
    }


@contextmanager
def attention_context(inputs: dict[str, Any], *, force_flash_sdp: bool) -> Iterator[None]:
    """What attention needs to know around a step: the documents of a flat batch, and whether only flash will do."""
    with document_layout(batch_layout(inputs)), flash_sdp_only() if force_flash_sdp else nullcontext():
        yield
