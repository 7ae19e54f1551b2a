"""`SFTTrainer`: `transformers.Trainer` with the model, adapter, data, attention and loss of supervised fine-tuning."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar

import torch
from datasets import Dataset
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
from transformers import trainer as trainer_module
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import EvalLoopOutput

from sft.attention.choice import flash_sdp_only
from sft.attention.per_document import per_document
from sft.attention.token_types import add_token_types
from sft.batches.layout import FILLER, SKIP_LOGITS, batch_layout, current_layout, document_layout
from sft.batches.shared_tokens import without_sharing
from sft.chat.stops import TurnEnds
from sft.config import SFTConfig
from sft.inner_model import causal_lm, takes_position_ids
from sft.kernels.proven import find_unproven, replaced_by_fused
from sft.labels import LOSS_GROUPS, TEACHER_ROWS, TOKEN_MASKS
from sft.loss.cross_entropy import LossOptions
from sft.loss.supervised import supervised_loss
from sft.loss.targets import num_targets
from sft.loss.teacher import Teacher
from sft.models.adapter_starts import BY_ACTIVATIONS, start_by_activations, start_of
from sft.models.adapters import count_parameters, wrap_adapter
from sft.models.loading import check_causal, configs_read_as, load_converted_weights
from sft.models.saved_adapters import check_resumed
from sft.models.saving import check_disk, check_saving, mend_generation_config, sort_adapter_lists
from sft.optimizers.groups import check_rates, freeze, regroup
from sft.optimizers.muon import MuonWithAdamW, muon_groups
from sft.optimizers.names import MUON, check_device, check_package, parse_optim_args, updates_in_backward
from sft.optimizers.rules import parameter_rules
from sft.optimizers.untrained import UntrainedWatch, report
from sft.train.arguments import (
    align_special_tokens,
    apply_chat_template,
    check_router_padding,
    choose_liger_kernels,
    choose_processing_class,
    choose_router_loss,
    resolve_config,
    resolve_model,
    resolve_processor,
    tokenizer_of,
)
from sft.train.bad_updates import LossWatch, act_on, warn_of_bad_updates
from sft.train.batches import (
    choose_batches,
    choose_collator,
    choose_dispatch,
    choose_packing,
    choose_shared_tokens,
    take_over_collator,
)
from sft.train.checks import check_collator, check_ignored, check_kbit_arguments, check_token_rows, number_left_padded
from sft.train.counters import TokensSeen, TokenTotals, UnloggedFigures
from sft.train.datasets import FormattingFunc, chats_of, prepare_all, prepare_later
from sft.train.images import check_image_turn_ends, check_image_types, choose_vision_collator
from sft.train.model_card import card_facts, write_model_card
from sft.train.neftune import embedding_noise
from sft.train.offloading import SELECTIVE, check_offloading, offloaded_activations, selective_checkpointing
from sft.train.processes import (
    EvenCollator,
    EvenOrder,
    EvenRows,
    can_be_filled,
    check_parallelism,
    check_undivided,
    fsdp2_on_cpus,
    without_copies,
)

logger = logging.getLogger(__name__)

Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin
Callback = TypeVar("Callback", bound=TrainerCallback)

OWN_INPUTS = ("seq_lengths", "loss_weights", TEACHER_ROWS, LOSS_GROUPS, SKIP_LOGITS, FILLER)
"""Keys of a batch that this library reads and a model's forward does not take."""

ROWS_OF_START = 16
"""Rows whose activations start an adapter, see `start_by_activations`."""

COLLATED_COLUMNS = (
    "input_ids",
    "labels",
    "seq_lengths",
    "loss_weights",
    TEACHER_ROWS,
    LOSS_GROUPS,
    *TOKEN_MASKS,
    FILLER,
)
"""Columns of prepared rows that collators and loss read."""


class SFTTrainer(Trainer):
    """Supervised fine-tuning of a causal language model.

    A `transformers.Trainer` that also

    * loads the model and its tokenizer by name, and puts an adapter on the model;
    * turns texts, conversations or prompts with completions into token rows with labels, packed if asked;
    * keeps documents that share a row from attending to each other, and checks this on the model itself;
    * computes the loss from the supervised tokens alone, as a mean over tokens: the losses do not depend on how an
      update is divided into batches, accumulation steps and processes.

    After construction, `train_dataset` contains `input_ids` and `labels` (and `seq_lengths` when packed);
    `sft.preview_masks` shows which of the tokens are trained.

    `loss_groups` may be set to names of groups: evaluation then reports `eval_loss/NAME` for the tokens whose number in
    the column `loss_groups` of the prepared rows is the place of that name.

    Args:
        model: Hub id, folder or model. A `PeftModel` continues its active adapter.
        args: Options. `TrainingArguments` are converted to an `SFTConfig`; None = the defaults.
        data_collator: Makes batches of prepared rows; None = chosen by the options and the data.
        train_dataset: Rows of any form that `sft.train.datasets.prepare_dataset` takes.
        eval_dataset: The same, or a dict of several data sets.
        processing_class: Tokenizer or processor; None = the one saved with the model.
        compute_loss_func: `(outputs, labels, num_items_in_batch) -> loss`, used instead of this trainer's loss.
        compute_metrics: Function of the logits and labels of all evaluation rows that returns metrics by name.
        callbacks: Callbacks in addition to the default ones.
        optimizers: Optimizer and scheduler, used instead of those that `args` describes.
        optimizer_cls_and_kwargs: Class and arguments of the optimizer, used instead of those that `args` describes.
        preprocess_logits_for_metrics: Applied to the logits of each batch before they are gathered.
        peft_config: Adapter to put on the model; None = train the model itself, or the adapter it has.
        formatting_func: Returns the text of an example, or a list of texts for a batch of examples.
        quantization_config: Quantization to load a model in that is given by name, such as a `BitsAndBytesConfig`.
        teacher: Recorded distributions of another model, which tokens of the training rows are trained towards: those
            with a number in the column `teacher_rows`.
        former: Arguments of older scripts: `tokenizer` (now `processing_class`), options that now belong to `args`, and
            arguments of `from_pretrained`.

    Attributes:
        aux_loss_enabled: Whether the load-balancing loss of a mixture of experts is part of the loss.
        router_aux_loss_coef: Its weight; 0 if the model has none.
        attention: The attention that was chosen, and why, in one line.
        sharing: Whether common beginnings of documents are computed once (`share_tokens`), and why, in one line.
        weight_copies: Copies of the weights that callbacks keep beside the checkpoints; the disk is checked for them.

    Raises:
        ValueError: Arguments contradict each other, the data or the model. The message names the place and a way out.
    """

    _tag_names = ("sft", "trl")
    _signature_columns: list[str] | None
    data_collator: Any
    is_fsdp_enabled: bool
    weight_copies: int = 0
    _loaded_from: str

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
        quantization_config: Any = None,
        teacher: Teacher | None = None,
        **former: Any,
    ) -> None:
        # 1. The kind of model, options, and the tokenizer with its special tokens.
        if not isinstance(model, str):
            token_types = add_token_types(model)
            check_causal(model)
        processing_class = choose_processing_class(processing_class, former.pop("tokenizer", None))
        if quantization_config is not None:
            former["quantization_config"] = quantization_config
        config = resolve_config(args, model, former)
        check_parallelism(config)
        if optimizers[0] is None and optimizer_cls_and_kwargs is None:
            check_optimizer(config)
        processing_class = resolve_processor(processing_class, model, config)
        tokenizer = tokenizer_of(processing_class)

        # 2. Model, with the rows of new tokens and the adapter. Both are initialized at random: seed first.
        set_seed(config.seed)
        if isinstance(model, str):
            model = resolve_model(model, config)
            token_types = add_token_types(model)
            check_causal(model)
        check_undivided(model)
        chats = chain.from_iterable(map(chats_of, (train_dataset, eval_dataset)))
        model = apply_chat_template(model, tokenizer, config, chats)
        align_special_tokens(model, tokenizer, config)
        check_kbit_arguments(model, config)
        self._adapter_is_new = peft_config is not None
        model = wrap_adapter(model, peft_config, tokenizer, **checkpointing_arguments(config))
        freeze(model, parameter_rules(config.parameter_groups))
        check_rates(model, config.embedding_learning_rate, config.loraplus_lr_ratio)
        own_loss = compute_loss_func is not None
        self.router_aux_loss_coef, self.aux_loss_enabled = choose_router_loss(model, config, own_loss=own_loss)
        if train_dataset is not None:
            check_saving(model, processing_class, config)
        choose_liger_kernels(model, config)

        # 3. How rows become batches: collator, packing, padding. Options that would have no effect are refused.
        if data_collator is None:
            given, formatted = [train_dataset, eval_dataset], formatting_func is not None
            data_collator = choose_vision_collator(processing_class, config, given, formatted=formatted)
        data_collator = take_over_collator(data_collator, tokenizer)
        check_image_types(model, token_types, data_collator)
        packing = choose_packing(config, data_collator, [train_dataset, eval_dataset])
        check_ignored(config, data_collator, packing, train_dataset, eval_dataset)

        # 4. Token rows with labels, checked against the model and the collator.
        self._prepare = partial(prepare_all, tokenizer=tokenizer, config=config, formatting_func=formatting_func)
        turn_ends = TurnEnds(causal_lm(model), tokenizer, saves_generation_config=not hasattr(model, "peft_config"))
        train_dataset = self._prepare(train_dataset, packing=packing.train, name="train", turn_ends=turn_ends)
        check_image_turn_ends(turn_ends, data_collator, train_dataset)
        if train_dataset is not None:
            mend_generation_config(model, tokenizer)
        eval_dataset = self._prepare(eval_dataset, packing=packing.eval, name="eval")
        choose_dispatch(config, packing, [train_dataset, eval_dataset])
        check_collator(data_collator, train_dataset, tokenizer)
        number_left_padded(data_collator, model)
        check_token_rows(model, config, data_collator, train_dataset, eval_dataset)
        data_collator = data_collator or choose_collator(config, tokenizer, packing)

        # 5. transformers.Trainer: optimizer, schedule, devices, checkpoints. It moves the model to its device.
        self._start_counting(config)
        self._teacher = teacher
        super().__init__(
            model=model,
            args=config,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=None if compute_loss_func is None else returns_loss(compute_loss_func),
            compute_metrics=compute_metrics,
            callbacks=[
                UnloggedFigures(),
                LossWatch(config.on_bad_loss, config.bad_loss_factor),
                UntrainedWatch(config.on_untrained),
                *(callbacks or []),
            ],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.neftune_noise_alpha = None  # `train` adds the noise: transformers would scale it by the row's length
        self._flat = packing.flat
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the targets of the accumulated batch

        # 6. Attention that keeps documents apart, and tokens to compute once. Both are tried out on the model, which is
        #    on its device by now, unless FSDP or DeepSpeed moves it when training begins.
        with self.accelerator.autocast():
            chosen = choose_batches(self, SFTTrainer, flat=packing.flat)
            self.attention, self._mixers = chosen.description, chosen.mixers
            self.sharing = self._choose_shared_tokens(config)
        if self.aux_loss_enabled:
            check_router_padding(self.data_collator)
        self._log_choices()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP2 also where a launcher asks for it on CPUs."""
        with fsdp2_on_cpus(self.args) as turn_on_fsdp2:
            super().create_accelerator_and_postprocess()
            if turn_on_fsdp2(self.accelerator):
                self.is_fsdp_enabled = True

    def _start_counting(self, config: SFTConfig) -> None:
        self._has_warned = False
        self._loss_options = LossOptions(config.loss_type, config.label_smoothing_factor, config.log_entropy)
        self._totals = {"train": TokenTotals(), "eval": TokenTotals()}
        self.loss_groups: list[str] = []
        self._tokens_seen = TokensSeen(config.device)
        self._before_update: TokenTotals | None = None
        self._skip_logits = False

    def _log_choices(self) -> None:
        counts = count_parameters(self.model)
        figures = (counts.num_trainable, counts.num_total, self.attention, self.sharing)
        logger.info("training %s of %s parameters; %s; %s", *figures)
        if self.args.activation_offloading:
            check_offloading(self.args.device)

    def _choose_shared_tokens(self, config: SFTConfig) -> str:
        if self.compute_loss_func is not None:
            return "every token is computed: compute_loss_func is given the outputs of all tokens"
        return choose_shared_tokens(self.model, config, self.data_collator, self._mixers)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer.train` does, with NEFTune's noise and fused layers until it returns.

        Raises:
            ValueError: The disk has too little space for the checkpoints.
        """
        if self.args.should_save:
            resumes = bool(args[0] if args else kwargs.get("resume_from_checkpoint"))
            check_disk(self.model, self.args, self._num_steps(), resumes=resumes, copies=self.weight_copies)
        if start_of(getattr(self.model, "active_peft_config", None)) == BY_ACTIVATIONS and self._adapter_is_new:
            self._start_by_activations()
        fused = {"lora": self.args.fused_lora, "layers": self.args.fused_layers}
        with self.accelerator.autocast(), self._attention_context({}):
            left_out = find_unproven(self.model, **fused)
        with (
            embedding_noise(self.model, self.args.neftune_noise_alpha),
            replaced_by_fused(self.model, **fused, left_out=left_out),
            selective_checkpointing(self.model),
        ):
            output = super().train(*args, **kwargs)
        if self.state.global_step >= self.state.max_steps:
            self.check_trained()
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()  # schedule-free optimizers train other weights than those that they return
        return output

    def check_trained(self) -> None:
        """Apply `on_untrained` to all parameters that training has not changed; `train` does so after the last step."""
        if not self.is_deepspeed_enabled:
            self._callback(UntrainedWatch).settle(was_skipped=self._was_skipped())
            self._report_untrained(self.model_wrapped, at_end=True)

    def _look_for_untrained(self, model: nn.Module) -> None:
        """Look at the gradients of an update that is about to be applied; DeepSpeed does not show them."""
        if self.is_deepspeed_enabled:
            return
        watch = self._callback(UntrainedWatch)
        watch.settle(was_skipped=self._was_skipped())
        if watch.is_due:
            self._report_untrained(model, at_end=False)
        watch.look(model, self.args.device, in_backward=updates_in_backward(optimizer_name(self.args)))

    def _report_untrained(self, model: nn.Module, *, at_end: bool) -> None:
        watch = self._callback(UntrainedWatch)
        report(self, watch.decide(model, self.args.device, self.accelerator.gather, at_end=at_end), watch.policy)

    def _was_skipped(self) -> bool:
        return bool(self.accelerator.optimizer_step_was_skipped)

    def _start_by_activations(self) -> None:
        """Start the adapter by the activations on the first rows, the same ones whether training is resumed or not."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "init_lora_weights='eva' runs the model before its weights are divided among processes by FSDP or "
                "DeepSpeed; use DDP, or another start"
            )
        rows = self._remove_unused_columns(self.train_dataset, "training")
        size = self.args.train_batch_size
        count = min(len(rows), max(size, ROWS_OF_START))
        batches = [
            self._prepare_inputs(without_sharing(self.data_collator([rows[index] for index in range(first, last)])))
            for first in range(0, count, size)
            for last in (min(first + size, count),)
        ]
        with self.accelerator.autocast():
            with torch.no_grad():  # the first pass checks the head on other tokens, which must not be measured
                self.compute_loss(self.model, batches[0])
            start_by_activations(self.model, batches, lambda model, inputs: self.compute_loss(model, inputs))
        self._totals = {"train": TokenTotals(), "eval": TokenTotals()}
        self._adapter_is_new = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer that the options name, with learning rates of their own for parts of the model."""
        self.optimizer: torch.optim.Optimizer
        if self.optimizer is not None:
            return super().create_optimizer(model)
        config, trained = self.args, self.model if model is None else model
        if config.optim == MUON and self.optimizer_cls_and_kwargs is None:
            groups = muon_groups(trained, self.get_decay_parameter_names(trained), config.weight_decay)
            self.optimizer = MuonWithAdamW(groups, config.learning_rate, **muon_arguments(config))
        else:
            with warmup_by_schedule(config):
                super().create_optimizer(model)
        rules = parameter_rules(config.parameter_groups)
        rates = (config.embedding_learning_rate, config.loraplus_lr_ratio)
        if rules or rates != (None, None):
            regroup(self.optimizer, trained, config.learning_rate, rules, *rates)
        return self.optimizer

    def _activate_neftune(self, model: Any) -> Any:
        """Add NEFTune's noise to a model until `neftune_hook_handle.remove()`, as `transformers.Trainer` did before 5.

        `train` adds the noise itself.
        """
        noise = ExitStack()
        noise.enter_context(embedding_noise(model, self.args.neftune_noise_alpha))
        self.neftune_hook_handle = SimpleNamespace(remove=noise.close)
        return model

    def _num_steps(self) -> int:
        """Return the number of optimizer steps, counted from below; 1 for a stream without `max_steps`."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else 0
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return max(1, int(rows // rows_per_step * self.args.num_train_epochs))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a forward and a backward pass.

        Attention needs the documents' borders in both, since activation checkpointing runs layers again in the second.
        """
        if self._before_update is None:
            self._before_update = self._totals["train"].copy()
        with (
            self._attention_context(inputs),
            offloaded_activations(model, enabled=self.args.activation_offloading),
        ):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._callback(LossWatch).add(loss)
        return loss

    @contextmanager
    def _attention_context(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Tell the model inside the block where the documents of a batch end, and keep them apart."""
        flash = flash_sdp_only() if self.args.force_flash_sdp else nullcontext()
        with document_layout(batch_layout(inputs)), per_document(causal_lm(self.model), self._mixers), flash:
            yield

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients; apply `on_bad_loss` if this update is a bad one.

        `transformers.Trainer` calls this after the last backward pass of an update and before the optimizer's step.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        watch, before = self._callback(LossWatch), self._before_update
        self._before_update = None
        problem = watch.problem(grad_norm, self.accelerator.gather)
        if problem is not None and before is not None:
            self._totals["train"] = before
            act_on(self, watch, problem)
        else:
            self._look_for_untrained(model)
        return grad_norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch: the sum over its targets, divided by the targets of the accumulated batch.

        Args:
            model: The model, wrapped or not.
            inputs: The batch.
            return_outputs: Return the outputs, too.
            num_items_in_batch: Number (or weight) of the targets in all batches of the update.

        Returns:
            The loss, or a tuple of the loss and an object with `loss` and `logits` `(batch, length, vocab)`.
        """
        if self.aux_loss_enabled:
            inputs = {**inputs, "output_router_logits": True}  # a vision-language model reads it nowhere else
        if self.compute_loss_func is not None:
            inputs = {name: value for name, value in inputs.items() if name not in OWN_INPUTS}
            if not takes_position_ids(model):
                inputs.pop("position_ids", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        keep_logits = return_outputs and not self._skip_logits
        if keep_logits:
            inputs = without_sharing(inputs)
        inside = current_layout() is not None  # as in `training_step`; a script may call this by itself
        with nullcontext() if inside else self._attention_context(inputs):
            result = supervised_loss(
                model,
                inputs,
                num_items_in_batch,
                self._loss_options,
                keep_logits=keep_logits,
                teacher=self._teacher,
                num_groups=0 if model.training else len(self.loss_groups),
            )
        skip_broken = model.training and self.args.logging_nan_inf_filter
        self._totals["train" if model.training else "eval"].add(result, skip_broken=skip_broken)
        loss = result.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch is a sum over processes, but gradients are averaged over them
            loss = loss * self.accelerator.num_processes
        return (loss, CausalLMOutput(loss=loss, logits=result.logits)) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Evaluate one batch, in which documents don't see each other; compute all logits unless the loss is enough."""
        inputs = inputs if prediction_loss_only else without_sharing(inputs)
        self._skip_logits = prediction_loss_only
        try:
            with self._attention_context(inputs):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._skip_logits = False

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a loader of evaluation rows; raw rows are prepared as the trainer's own evaluation rows were."""
        return super().get_eval_dataloader(prepare_later(eval_dataset, self.args, self._prepare))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return a loader of rows for `predict`; raw rows are prepared as evaluation rows are.

        `predict` returns logits, one row for each example, so that batches are padded unless `padding_free` or packing
        was asked for.
        """
        rows = prepare_later(test_dataset, self.args, self._prepare)
        collator = self.data_collator
        if self._flat is None and getattr(collator, "padding_free", False):
            self.data_collator = replace(collator, padding_free=False, share_tokens=False)
        try:
            return super().get_test_dataloader(rows)
        finally:
            self.data_collator = collator

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is a mean over tokens, so that it does not depend on batch size and packing."""
        self._totals["eval"] = TokenTotals()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.compute_loss_func is None:
            figures = self._totals["eval"].means(self.accelerator.gather, self.loss_groups)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a log line; in training it gets the tokens seen, the token accuracy and, if asked, the entropy.

        All means are over tokens, while the loss of `transformers.Trainer` is a mean over updates. The load balancing
        loss of a mixture of experts is logged as `aux_loss` and not part of `loss`. The last line of a training, that
        with `train_loss`, gets the figures of the updates after the last line before it.
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
        elif "train_loss" in logs and self.compute_loss_func is None:
            rest = self._totals["train"].means(self.accelerator.gather)
            logs.update({name: value for name, value in rest.items() if name != "loss"})
        # fp16 skips such updates itself while it looks for its loss scale
        if not self._has_warned and self.args.on_bad_loss is None and not self.args.fp16:
            self._has_warned = warn_of_bad_updates(logs, self.state.global_step)
        super().log(logs, start_time)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of a batch.

        `transformers.Trainer` waits for the device at every batch, and takes each eos for padding where both are one
        token.
        """
        if self.args.include_num_input_tokens_seen != "no":
            self._tokens_seen.add(inputs, padding=self.args.include_num_input_tokens_seen == "all")

    def _count_tokens(self) -> None:
        self.state.num_input_tokens_seen += self._tokens_seen.take(self.accelerator.gather)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, with the tokens seen and the sums since the last log line."""
        self._count_tokens()
        self._callback(UnloggedFigures).sums = self._totals["train"].by_process(self.accelerator.gather)
        watch = self._callback(UntrainedWatch)
        watch.settle(was_skipped=self._was_skipped())
        watch.write_down(self.accelerator.gather)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, also those that are saved under other names than the model's."""
        self._loaded_from = resume_from_checkpoint
        with reading_only_version(), configs_read_as(type(causal_lm(self.model).config)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._check_loaded()

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, also those that are saved under other names than the model's."""
        self._loaded_from = str(self.state.best_model_checkpoint)
        super()._load_best_model()
        self._check_loaded()

    def _check_loaded(self) -> None:
        """Check that an adapter has all weights of the checkpoint; FSDP and DeepSpeed load and check it themselves."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            check_resumed(self.model, Path(self._loaded_from))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load through transformers' conversion where the names in a checkpoint are not those of the model.

        `transformers.Trainer` warns, and trains on from the weights that the model had before.
        """
        base = causal_lm(self.model)
        missing = set(load_result.missing_keys) - set(getattr(base, "all_tied_weights_keys", None) or ())
        if (missing or load_result.unexpected_keys) and isinstance(base, PreTrainedModel):
            load_converted_weights(base, self._loaded_from)
        else:
            super()._issue_warnings_after_load(load_result)

    def _load_callback_state(self) -> None:
        """Restore this library's callbacks and running sums from a checkpoint.

        `transformers.Trainer` restores callbacks only with `restore_callback_states_from_checkpoint`.
        """
        super()._load_callback_state()
        for kind in (UnloggedFigures, LossWatch, UntrainedWatch):
            stored = self.state.stateful_callbacks.setdefault(kind.__name__, {})
            vars(self._callback(kind)).update((stored[0] if isinstance(stored, list) else stored).get("args", {}))
        processes = self.accelerator
        sums = self._callback(UnloggedFigures).of_process(processes.process_index, processes.num_processes)
        self._totals["train"] = TokenTotals(sums)
        watch = self._callback(LossWatch)
        watch.policy, watch.factor = self.args.on_bad_loss, self.args.bad_loss_factor  # options of this run
        self._callback(UntrainedWatch).policy = self.args.on_untrained

    def _callback(self, kind: type[Callback]) -> Callback:
        """Return this library's callback of a class; `transformers.Trainer` replaces the objects at a resume."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the weights; of tied weights that were gathered from all processes, only one copy."""
        super()._save(output_dir, without_copies(self.model, state_dict))
        sort_adapter_lists(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """Write the model card, README.md, into the output folder; `push_to_hub` does so, too.

        Args:
            model_name: Name of the model; None = the name of the output folder or of `hub_model_id`.
            dataset_name: Names of the data sets.
            tags: Tags in addition to `sft`.
            metadata: What `transformers.Trainer.create_model_card` takes as well: `language`, `license`,
                `finetuned_from`, `tasks`, `dataset`, `dataset_tags` and `dataset_args`.

        Raises:
            ValueError: There is no such metadata.
        """
        if self.is_world_process_zero():
            facts = card_facts(self, model_name, dataset_name, tags, metadata)
            write_model_card(Path(self.args.output_dir), facts)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """Return the number (or weight) of targets in all batches of one update, summed over processes."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = sum(num_targets(batch) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **options: Any) -> Any:
        """Return a data loader that distributes rows over processes without using any row twice."""
        multiple = batch_size * self.accelerator.num_processes
        rebalanced = self.args.train_sampling_strategy == "batch_rebalance"  # distributes rows itself
        drop_last = self.args.dataloader_drop_last
        if multiple == batch_size or rebalanced or not can_be_filled(dataset, drop_last=drop_last):
            return super()._get_dataloader(dataset, description, batch_size, **options)
        rows, collator = EvenRows(dataset, multiple), self.data_collator
        order = options.pop("sampler_fn")(dataset)
        if order is not None:
            order = EvenOrder(order, rows, lambda: int(self.state.epoch or 0), self.args.data_seed)
        with_metrics = self.compute_metrics is not None or description == "test"
        logits_are_gathered = with_metrics and not options.get("is_training")
        self.data_collator = EvenCollator(collator, keep_rows=logits_are_gathered)
        try:
            return super()._get_dataloader(rows, description, batch_size, sampler_fn=lambda _: order, **options)
        finally:
            self.data_collator = collator

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Remove columns that no one reads, but none that a transform of the user's may read."""
        has_transform = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
        return dataset if has_transform else super()._remove_unused_columns(dataset, description)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that collators and loss read, which a model's forward does not name."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = list(dict.fromkeys([*(self._signature_columns or ()), *COLLATED_COLUMNS]))


class _WrittenBy:
    """Stands for `PreTrainedConfig` where only the version of transformers is read from a config.

    Attributes:
        transformers_version: The version that wrote the config; None if it does not say.
    """

    def __init__(self, transformers_version: str | None) -> None:
        self.transformers_version = transformers_version

    @classmethod
    def from_json_file(cls, file: str) -> _WrittenBy:
        """Read the version from a file."""
        return cls(json.loads(Path(file).read_text(encoding="utf-8")).get("transformers_version"))


@contextmanager
def reading_only_version() -> Iterator[None]:
    """Have `transformers.Trainer` read nothing but the version from a checkpoint's config inside the block.

    It reads the config as one of no family, which refuses values that the family's own config takes, such as the kinds
    of layers of DeepSeek V4.
    """
    own = trainer_module.PreTrainedConfig
    trainer_module.PreTrainedConfig = _WrittenBy
    try:
        yield
    finally:
        trainer_module.PreTrainedConfig = own


def returns_loss(compute_loss_func: Callable) -> Callable:
    """Return the function with a check that it returns a loss."""

    @wraps(compute_loss_func)
    def checked(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss_func(*args, **kwargs)
        if not isinstance(loss, torch.Tensor):
            raise ValueError(
                f"compute_loss_func returned {type(loss).__name__} instead of a tensor: compute the loss from "
                "outputs.logits and labels (outputs.loss is None, since the model is not given the labels)"
            )
        return loss

    return checked


def optimizer_name(config: SFTConfig) -> str:
    """Return the name of the optimizer, which transformers keeps as a member of an enum."""
    return str(getattr(config.optim, "value", config.optim))


def check_optimizer(config: SFTConfig) -> None:
    """Check that the optimizer's package is installed, and that it runs on this device and with these processes.

    Raises:
        ValueError: It does not.
    """
    optim = optimizer_name(config)
    check_package(optim)
    check_device(optim, config.device.type)
    sharded = [name for name in ("fsdp", "deepspeed") if getattr(config, name)]
    if optim == MUON and sharded:
        raise ValueError(
            f"optim={optim!r} needs complete matrices, and {sharded[0]} divides them among processes; use another "
            "optimizer, or DDP"
        )


def muon_arguments(config: SFTConfig) -> dict[str, Any]:
    """Return the arguments of `MuonWithAdamW` that the options state."""
    given = parse_optim_args(config.optim_args)
    arguments: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if "momentum" in given:
        arguments["momentum"] = float(given["momentum"])
    if "nesterov" in given:
        arguments["nesterov"] = given["nesterov"].lower() in ("true", "1", "yes")
    if "ns_steps" in given:
        arguments["ns_steps"] = int(given["ns_steps"])
    return arguments


@contextmanager
def warmup_by_schedule(config: SFTConfig) -> Iterator[None]:
    """Leave the warm-up to the schedule inside the block.

    `transformers.Trainer` also gives `warmup_steps` to schedule-free optimizers, which would warm up a second time, and
    read a share of all steps as a number of steps.
    """
    given, config.warmup_steps = config.warmup_steps, 0
    try:
        yield
    finally:
        config.warmup_steps = given


def checkpointing_arguments(config: SFTConfig) -> dict[str, Any]:
    """Return the arguments of `wrap_adapter` that say whether activations are computed again."""
    given = config.prepare_in_int8_kwargs if isinstance(config.prepare_in_int8_kwargs, dict) else {}
    return {
        "gradient_checkpointing": given.get("use_gradient_checkpointing", bool(config.activation_checkpointing)),
        "gradient_checkpointing_kwargs": given.get(
            "gradient_checkpointing_kwargs", _without_selective(config.activation_checkpointing_kwargs)
        ),
    }


def _without_selective(arguments: Any) -> Any:
    """Return arguments of checkpointing without the choice of operations, which is made when training begins."""
    if not isinstance(arguments, dict):
        return arguments
    return {name: value for name, value in arguments.items() if name != SELECTIVE}
