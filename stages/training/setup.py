"""The trainer of one training: options, base model, rows and callbacks, as params.yaml states them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from peft import PeftConfig
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from sft.attention.isolation import DocumentsMixError
from sft.chat.formats import resize_embeddings
from sft.config import SFTConfig
from sft.inner_model import outside_language_model
from sft.labels import LOSS_GROUPS
from sft.models.adapters import ALL_LINEAR
from sft.models.kbit import get_quantization_config
from sft.models.loading import load_model
from sft.optimizers.schedules import FOLLOWS_THE_LOSS
from sft.train.offloading import SELECTIVE
from sft.train.trainer import SFTTrainer, check_optimizer
from stages.checkout.artifacts import read_json
from stages.checkout.paths import EVAL_SOURCES, Paths
from stages.models.base import read_base_model
from stages.models.images import image_collator
from stages.params.schema import NO_LORA_OPTIONS, Params, TrainSection
from stages.training.adapter import make_model_config, make_peft_config
from stages.training.checkpoints import SealCheckpoints
from stages.training.teacher import with_teacher

NOT_SFT_OPTIONS = {
    *("method", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
    *NO_LORA_OPTIONS.keys() - {"loraplus_lr_ratio"},
    *("adapter", "use_kernels"),  # see `make_peft_config` and `load_base`
    *("warmup_ratio", "warmup_steps", "optim_args", "lr_scheduler_kwargs", "parameter_groups"),
    *("mixed_precision", "gradient_checkpointing", "order", "arguments"),  # see `make_sft_config`
    *("launch", "on_oom"),  # see `stages.train.run`
    *("select", "samples", "report_to"),  # see `stages.train.attempt`
}
"""Keys of the section `train` that are not passed to `SFTConfig` under their own name."""


CHECKPOINTING_ARGUMENTS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


def make_trainer(
    params: Params, paths: Paths, config: SFTConfig, recorders: list[TrainerCallback], streamed: Any = None
) -> SFTTrainer:
    """Create the trainer.

    Args:
        params: Values of params.yaml.
        paths: The checkout, with the outs of `load`, `format` and `pack`.
        config: The options, made by `make_sft_config`.
        recorders: Callbacks that record the training.
        streamed: Training rows as a stream; None = those that `pack` wrote.

    Raises:
        ValueError: The model can't train on rows of several documents.
    """
    tokenizer = AutoTokenizer.from_pretrained(paths.out("format", "tokenizer"))
    check_optimizer(config)
    model = load_base(params, tokenizer, paths)
    peft_config = make_peft_config(params, model)
    collator = None
    if paths.has_images():
        collator = image_collator(paths, tokenizer, model.dtype)
        config.remove_unused_columns = False  # the collator reads their texts and the names of their images
    else:
        leave_out_images(model, peft_config)
    rows, teacher = streamed, None
    if streamed is None:
        rows, teacher = with_teacher(load_from_disk(str(paths.out("pack", "train"))), paths.out("load", "rehearsal"))
    held_out, groups = with_sources(load_from_disk(str(paths.out("pack", "eval"))), paths)
    try:
        trainer = SFTTrainer(
            model,
            args=config,
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[LogLastStep(), *recorders, SealCheckpoints()],
            teacher=teacher,
        )
    except DocumentsMixError as error:
        raise ValueError(f"{error} In params.yaml: pack.strategy: none and train.padding_free: false") from None
    trainer.loss_groups = groups
    trainer.remove_callback(PrinterCallback)  # `TrainingProgress` replaces it
    return trainer


def with_sources(rows: Dataset, paths: Paths) -> tuple[Dataset, list[str]]:
    """Add the column of groups by which the loss of held-out rows is reported, if they are from several sources.

    Rows with images get none: their tokens are made when they are collated.

    Returns:
        The rows, and the names of the groups.
    """
    file = paths.out("pack", EVAL_SOURCES)
    if not file.exists() or paths.has_images():
        return rows, []
    known, column = read_json(file), []
    lengths = rows["seq_lengths"] if "seq_lengths" in rows.column_names else [[len(ids)] for ids in rows["input_ids"]]
    for sources, of_row in zip(known["rows"], lengths, strict=True):
        column.append(np.repeat(np.array(sources, dtype=np.int8), of_row))
    return rows.add_column(LOSS_GROUPS, column), [f"source/{name}" for name in known["names"]]


def leave_out_images(model: PreTrainedModel, peft_config: PeftConfig | None) -> None:
    """Leave the parts of a model that only images pass as they are, since rows of text would not train them.

    Args:
        model: The base model. Where there is no adapter, these parts are frozen.
        peft_config: Its adapter, which gets no weights there if it is for `all-linear`; named modules stay.
    """
    parts = outside_language_model(model)
    if not parts:
        return
    if peft_config is None:
        for part in parts:
            model.get_submodule(part).requires_grad_(False)
    elif getattr(peft_config, "target_modules", None) == ALL_LINEAR:
        peft_config.exclude_modules = _excluding(parts, peft_config.exclude_modules)
    else:
        return
    print(f"note: the rows have no images, so {', '.join(parts)} of the model stay as they are", flush=True)


def _excluding(parts: Iterable[str], named: Collection[str] | str | None) -> str:
    """Return a regular expression of modules: some parts of a model, and those that were excluded by name before."""
    inside = rf"({'|'.join(map(re.escape, parts))})(\..*)?"
    if isinstance(named, str):
        return rf"{inside}|{named}"
    return "|".join([inside, *(rf"(.*\.)?{re.escape(name)}" for name in named or ())])


def load_base(params: Params, tokenizer: PreTrainedTokenizerBase, paths: Paths) -> PreTrainedModel:
    """Load the base model that `load` recorded, with an embedding for each token of the tokenizer.

    Raises:
        ValueError: The package of `use_kernels` is missing.
    """
    section = params.model
    kernels: dict[str, Any] = {}
    if params.train.use_kernels:
        if find_spec("kernels") is None:
            raise ValueError("params.yaml, train.use_kernels: it needs the package kernels: pip install kernels")
        kernels["use_kernels"] = True
    base = read_base_model(paths.out("load", "base_model.json"))
    model = load_model(
        base.path,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        quantization_config=get_quantization_config(make_model_config(params)),
        trust_remote_code=section.trust_remote_code,
        **kernels,
    )
    new_token_ids = read_json(paths.out("format", "summary.json"))["new_token_ids"]
    resize_embeddings(model, len(tokenizer), new_token_ids)
    return model


def make_sft_config(section: TrainSection, folder: Path) -> SFTConfig:
    """Return the section as `SFTConfig`; a key of the section is the option of the same name.

    Args:
        section: Section `train` of params.yaml.
        folder: Where checkpoints are written.
    """
    options = {
        "output_dir": str(folder),
        "per_device_eval_batch_size": section.per_device_train_batch_size,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "report_to": [],
        "disable_tqdm": True,
        **section.model_dump(exclude=NOT_SFT_OPTIONS),
        **optimizer_options(section),
        **checkpointing_options(section),
        **precision_options(section),
        "train_sampling_strategy": "random" if section.order == "shuffled" else "sequential",
    }
    try:
        return SFTConfig(**options | copy.deepcopy(section.arguments))
    except (ValueError, TypeError) as error:
        if not section.arguments:
            raise
        raise ValueError(f"params.yaml, train: {error} (options by name: {section.arguments})") from None


def precision_options(section: TrainSection) -> dict[str, Any]:
    """Return the options of `mixed_precision`.

    Raises:
        ValueError: fp16 is stated without an accelerator, where it would have no effect.
    """
    options: dict[str, Any] = {name: section.mixed_precision == name for name in ("bf16", "fp16")}
    if section.mixed_precision != "no" and not torch.accelerator.is_available():
        if options["fp16"]:
            raise ValueError("params.yaml, train.mixed_precision: fp16 has no effect on CPUs; state bf16 or no")
        options["use_cpu"] = True  # transformers takes a missing accelerator for a mistake
    return options


def optimizer_options(section: TrainSection) -> dict[str, Any]:
    """Return the options of optimizer and schedule that `SFTConfig` has in another form."""
    options: dict[str, Any] = {
        "lr_scheduler_kwargs": dict(section.lr_scheduler_kwargs) or None,
        "optim_args": ",".join(f"{name}={str(value).lower()}" for name, value in section.optim_args.items()) or None,
        "parameter_groups": [group.model_dump() for group in section.parameter_groups] or None,
    }
    if section.warmup_steps is None:
        options["warmup_ratio"] = section.warmup_ratio
    else:
        options["warmup_steps"] = section.warmup_steps
    if section.lr_scheduler_type in FOLLOWS_THE_LOSS:
        options["metric_for_best_model"] = "loss"
    return options


def checkpointing_options(section: TrainSection) -> dict[str, Any]:
    """Return the options that say which activations are computed again; those stated by name stay.

    Raises:
        ValueError: Arguments of checkpointing are stated by name, and it is off.
    """
    by_name = {name: section.arguments[name] for name in CHECKPOINTING_ARGUMENTS if name in section.arguments}
    if by_name and not section.gradient_checkpointing:
        raise ValueError(
            f"params.yaml, train.arguments: {next(iter(by_name))} would be ignored with gradient_checkpointing: false; "
            "state true"
        )
    options: dict[str, Any] = {"gradient_checkpointing": bool(section.gradient_checkpointing)}
    if section.gradient_checkpointing == SELECTIVE and not by_name:
        options["gradient_checkpointing_kwargs"] = {SELECTIVE: True}
    return options


class LogLastStep(TrainerCallback):
    """Callback that logs the last step, also where it is not a multiple of `logging_steps`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log line after the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = True
