"""`train.arguments`: options of the trainer by name, and what becomes of each option of `SFTConfig` in the pipeline.

An option of `SFTConfig` (those of `TrainingArguments` included) is set in one of three ways: by a key of params.yaml,
by its name in `train.arguments`, or not at all, for a reason. training_options.json holds the types of all options, so
that they are checked without loading torch. `python -m stages.training.option_table` writes that file and
docs/training_options.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sft.option_types import WORDS, convert_value
from sft.suggest import did_you_mean

TABLE = Path(__file__).with_name("training_options.json")

SAME_NAME = (
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta2",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "gradient_checkpointing",
    "use_liger_kernel",
    "neftune_noise_alpha",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "seed",
    "router_aux_loss_coef",
    "padding_free",
    "loss_type",
    "on_bad_loss",
    "bad_loss_factor",
    "on_untrained",
    "warmup_ratio",
    "warmup_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_epsilon",
    "lr_scheduler_kwargs",
    "embedding_learning_rate",
    "loraplus_lr_ratio",
    "parameter_groups",
    "label_smoothing_factor",
    "activation_offloading",
    "torch_compile",
)
"""Options that are keys of the section `train` under their own name."""

KEYS = {
    **{name: f"train.{name}" for name in SAME_NAME},
    "activation_checkpointing": "train.gradient_checkpointing",
    "bf16": "train.mixed_precision",
    "fp16": "train.mixed_precision",
    "train_sampling_strategy": "train.order",
    "group_by_length": "train.order",
    "use_liger": "train.use_liger_kernel",
    "auto_find_batch_size": "train.on_oom",
    "deepspeed": "train.launch.engine",
    "fsdp": "train.launch.engine",
    "fsdp_config": "train.launch.engine",
    "parallelism_config": "train.launch.engine",
    "push_to_hub": "publish.push_to_hub",
    "hub_model_id": "publish.push_to_hub",
    "model_init_kwargs": "model",
    "chat_template_path": "format.chat_template",
    "chat_template_kwargs": "format.chat_template_kwargs",
    "not_printed": "format.not_printed",
    "thinking": "format.thinking",
    "dataset_text_field": "load.sources[].columns",
    "max_length": "pack.max_length",
    "max_seq_length": "pack.max_length",
    "truncation_mode": "pack.overflow",
    "overflow": "pack.overflow",
    "packing": "pack.strategy",
    "packing_strategy": "pack.strategy",
    "eval_packing": "pack.strategy",
    "assistant_only_loss": "format.train_on",
    "completion_only_loss": "format.train_on",
    "last_turn_only_loss": "format.train_on",
    "project": "publish.experiment",
    "report_to": "train.report_to",
}
"""Option -> key of params.yaml that states it."""

_FOLDER = "checkpoints lie in .state/, in a folder named after params, rows, base model and code, for resuming"
_RESUME = "a training that was interrupted would not continue to the same weights"
_RECORD = "the curve, the report and the gate read these figures"
_HUB = "`publish` uploads the shipped model after the gate; a training uploads nothing"
_METRICS = "it serves a function `compute_metrics`, and the stage `train` computes losses only"
_PACKED = "rows are tokenized and packed by the stages `format` and `pack`; `train` reads them as they are"
_SCRIPT = "it is read by scripts, not by the trainer"
_BEST = "`train.select` states which evaluated step is shipped, by which figure, and when to stop early"
_TRACKIO = "Trackio's own environment variables, such as TRACKIO_SPACE_ID, state it (train.report_to)"

REFUSED = {
    "output_dir": _FOLDER,
    "save_strategy": f"checkpoints are written every `train.save_steps` steps; otherwise {_RESUME}",
    "save_only_model": _RESUME,
    "save_on_each_node": "the first process of all machines writes checkpoints, into a folder that all of them share",
    "save_total_limit": "two checkpoints are kept, so that a damaged one costs no more than the steps after the other",
    "enable_jit_checkpoint": "the stage `train` handles signals itself",
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": "the trainer restores its callbacks itself at every resume",
    "resume_from_checkpoint": "the stage `train` finds the last valid checkpoint of this training itself",
    "eval_strategy": f"held-out rows are evaluated every `train.eval_steps` steps: {_RECORD}",
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "logging_strategy": f"losses are logged every `train.logging_steps` steps: {_RECORD}",
    "logging_nan_inf_filter": "it writes a finite number into the curve where a loss is not finite",
    "include_num_input_tokens_seen": f"tokens without padding are counted: {_RECORD}",
    "disable_tqdm": "progress lines replace its bar",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "prediction_loss_only": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "hub_token": f"{_HUB}; a token belongs into the environment variable HF_TOKEN, never into a file that git tracks",
    "hub_private_repo": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "local_rank": "the launcher sets it (train.launch)",
    "remove_unused_columns": "the trainer knows which columns its collators read",
    "label_names": "the trainer knows which column has the labels",
    "length_column_name": _PACKED,
    "use_cache": "a training reads no cache of keys and values",
    "prepare_in_int8_kwargs": "`train.method: qlora` prepares the base, and `train.gradient_checkpointing` decides",
    "dataset_kwargs": _PACKED,
    "dataset_num_proc": _PACKED,
    "dataset_batch_size": _PACKED,
    "shuffle_dataset": _PACKED,
    "num_of_sequences": _PACKED,
    "chars_per_token": _PACKED,
    "eos_token": "the tokenizer and the chat template of the stage `format` decide",
    "pad_token": "the tokenizer and the chat template of the stage `format` decide",
    "image_folder": "the stage `load` copies images to outs/load/images",
    "bf16_full_eval": "it converts the weights themselves, and the training would go on with rounded ones",
    "fp16_full_eval": "it converts the weights themselves, and the training would go on with rounded ones",
}
"""Option -> why neither a key nor `train.arguments` can set it."""


@dataclass(frozen=True)
class TrainingOption:
    """An option of `SFTConfig`.

    Args:
        name: Its name.
        types: Names of the types that it takes: bool, int, float, str, list or dict; empty for other objects.
        choices: Values that it takes, if it is one of several.
        default: Its default, as text.
    """

    name: str
    types: tuple[str, ...]
    choices: tuple[str, ...]
    default: str

    @property
    def key(self) -> str | None:
        """Key of params.yaml that states the option; None if there is none."""
        return KEYS.get(self.name)

    @property
    def refusal(self) -> str | None:
        """Why it can't be set; None if it is stated by a key or in `train.arguments`."""
        return REFUSED.get(self.name)


@cache
def training_options() -> dict[str, TrainingOption]:
    """Return all options of `SFTConfig` by name, as training_options.json lists them."""
    entries = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: TrainingOption(name, tuple(entry["types"]), tuple(entry["choices"]), entry["default"])
        for name, entry in entries.items()
    }


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Check that each entry of `train.arguments` is an option that may be set there, with a value of its type.

    Returns:
        The entries, with numbers that YAML reads as text (`1e-4`) converted.

    Raises:
        ValueError: Lists all problems.
    """
    checked, problems = {}, []
    for name, value in arguments.items():
        try:
            checked[name] = _check_argument(name, value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return checked


def _check_argument(name: str, value: Any) -> Any:
    options = training_options()
    option = options.get(name)
    if option is None:
        by_name = [option.name for option in options.values() if option.key is None and option.refusal is None]
        near = did_you_mean(name, list(options), otherwise=f"there are {', '.join(by_name)}")
        raise ValueError(f"{name} is not an option of SFTConfig; {near}")
    if option.key is not None:
        raise ValueError(f"{name} contradicts a key of params.yaml; state {option.key} instead")
    if option.refusal is not None:
        raise ValueError(f"{name} can't be set: {option.refusal}")
    kinds = tuple(kind for kind in WORDS if kind.__name__ in option.types)
    if value is not None and kinds:
        value = convert_value(name, value, kinds)
    if option.choices and value not in option.choices:
        near = did_you_mean(str(value), option.choices, otherwise=f"use one of {', '.join(option.choices)}", cutoff=0.5)
        raise ValueError(f"{name}={value!r}: {near}")
    return value
