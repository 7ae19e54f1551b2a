"""The trainer of one training: options, base model, rows and callbacks, as params.yaml states them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from sft.attention.isolation import DocumentsMixError
from sft.chat.formats import resize_embeddings
from sft.config import ModelConfig, SFTConfig
from sft.inner_model import outside_language_model
from sft.models.adapters import ALL_LINEAR, get_peft_config
from sft.models.kbit import get_quantization_config
from sft.models.loading import load_model
from sft.train.trainer import SFTTrainer
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.models.base import read_base_model
from stages.models.images import image_collator
from stages.params.schema import ModelSection, Params, TrainSection
from stages.training.checkpoints import SealCheckpoints

NOT_SFT_OPTIONS = {
    *(
        "method",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_parameters",
    ),  # see `make_model_config`
    "warmup_ratio",  # `SFTConfig` keeps it as `warmup_steps`
    *("launch", "on_oom"),  # see `stages.train.run`
    "arguments",  # a dict of options, see `make_sft_config`
}
"""Keys of the section `train` that are not passed to `SFTConfig` under their own name."""


def make_trainer(params: Params, paths: Paths, config: SFTConfig, recorders: list[TrainerCallback]) -> SFTTrainer:
    """Create the trainer.

    Args:
        params: Values of params.yaml.
        paths: The checkout, with the outs of `load`, `format` and `pack`.
        config: The options, made by `make_sft_config`.
        recorders: Callbacks that record the training.

    Raises:
        ValueError: The model can't train on rows of several documents.
    """
    tokenizer = AutoTokenizer.from_pretrained(paths.out("format", "tokenizer"))
    model_config = make_model_config(params)
    model, peft_config = load_base(params.model, model_config, tokenizer, paths), get_peft_config(model_config)
    collator = None
    if paths.has_images():
        collator = image_collator(paths, tokenizer, model.dtype)
        config.remove_unused_columns = False  # the collator reads their texts and the names of their images
    else:
        leave_out_images(model, peft_config)
    try:
        trainer = SFTTrainer(
            model,
            args=config,
            data_collator=collator,
            train_dataset=load_from_disk(str(paths.out("pack", "train"))),
            eval_dataset=load_from_disk(str(paths.out("pack", "eval"))),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[LogLastStep(), *recorders, SealCheckpoints()],
        )
    except DocumentsMixError as error:
        raise ValueError(f"{error} In params.yaml: pack.strategy: none and train.padding_free: false") from None
    trainer.remove_callback(PrinterCallback)  # `TrainingProgress` replaces it
    return trainer


def leave_out_images(model: PreTrainedModel, peft_config: LoraConfig | None) -> None:
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
    elif peft_config.target_modules == ALL_LINEAR:
        peft_config.exclude_modules = rf"({'|'.join(map(re.escape, parts))})(\..*)?"
    else:
        return
    print(f"note: the rows have no images, so {', '.join(parts)} of the model stay as they are", flush=True)


def make_model_config(params: Params) -> ModelConfig:
    """Return the params of base model and adapter as `ModelConfig`."""
    section = params.train
    return ModelConfig(
        model_name_or_path=params.model.name_or_path,
        dtype=params.model.dtype,
        attn_implementation=params.model.attn_implementation,
        trust_remote_code=params.model.trust_remote_code,
        use_peft=section.method != "full",
        lora_r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        lora_target_modules=section.lora_target_modules,
        lora_target_parameters=section.lora_target_parameters,
        load_in_4bit=section.method == "qlora",
        use_bnb_nested_quant=section.method == "qlora",
    )


def load_base(
    section: ModelSection, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, paths: Paths
) -> PreTrainedModel:
    """Load the base model that `load` recorded, with an embedding for each token of the tokenizer."""
    base = read_base_model(paths.out("load", "base_model.json"))
    model = load_model(
        base.path,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        quantization_config=get_quantization_config(config),
        trust_remote_code=section.trust_remote_code,
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
        "warmup_ratio": section.warmup_ratio,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "report_to": [],
        "disable_tqdm": True,
        **section.model_dump(exclude=NOT_SFT_OPTIONS),
    }
    try:
        return SFTConfig(**options | copy.deepcopy(section.arguments))
    except (ValueError, TypeError) as error:
        if not section.arguments:
            raise
        raise ValueError(f"params.yaml, train: {error} (options by name: {section.arguments})") from None


class LogLastStep(TrainerCallback):
    """Callback that logs the last step, also where it is not a multiple of `logging_steps`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log line after the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = True
