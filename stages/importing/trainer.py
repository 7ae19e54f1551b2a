"""What becomes of each option of transformers.TrainingArguments, which LLaMA-Factory, trl and unsloth pass on.

Options that `train.arguments` takes by name are those of `stages.params.arguments`, so that a new option of
transformers has a rule here as soon as it is in that table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from stages.importing.draft import (
    Draft,
    Effect,
    Rule,
    approach,
    argument,
    by_name,
    ignore,
    is_on,
    keep,
    part_of,
    refuse,
)
from stages.params.arguments import KEYS, REFUSED, training_options
from stages.params.schema import Params, leaf_fields
from stages.tracking.trackers import PACKAGES

DEFAULTS: dict[str, Any] = {
    "train.learning_rate": 5e-5,
    "train.num_train_epochs": 3.0,
    "train.max_steps": -1,
    "train.per_device_train_batch_size": 8,
    "train.gradient_accumulation_steps": 1,
    "train.lr_scheduler_type": "linear",
    "train.warmup_ratio": 0.0,
    "train.optim": "adamw_torch_fused",
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_epsilon": 1e-8,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.mixed_precision": "no",
    "train.gradient_checkpointing": False,
    "train.logging_steps": 500,
    "train.save_steps": 500,
    "train.seed": 42,
    "train.select.metric": None,
}
"""Values of the trainer for what a configuration does not state."""

ROWS_AS_THERE: dict[str, Any] = {
    "load.checks.duplicate": "warn",
    "load.checks.in_eval": "warn",
    "load.checks.empty_answer": "warn",
    "format.not_printed": "warn",
    "format.special_text": "warn",
}
"""Checks that drop or change rows are set to warn, since the other projects train on these rows as they are."""


def number(value: Any) -> float:
    """Return a number that YAML 1.1 reads as text, such as `1e-4`."""
    return float(value)


def whole(value: Any) -> int:
    """Return a whole number."""
    return int(float(value))


def batch_of_all_steps(draft: Draft) -> float:
    """Return the passes over the data that the source states."""
    return number(draft.get("num_train_epochs", "num_epochs", default=draft.defaults.get("train.num_train_epochs", 1)))


def per_epoch(draft: Draft, times: float = 1.0) -> float:
    """Return a number of times per epoch as a fraction of all steps."""
    return min(1.0, 1.0 / (times * batch_of_all_steps(draft)))


def fraction_or_steps(value: Any) -> float:
    """Return steps: a number, or below 1 a fraction."""
    amount = number(value)
    if amount < 1:
        return amount
    return int(amount)


def steps_of(target: str, strategy: str) -> Rule:
    """Return the rule of `save_steps` or `eval_steps`, which a strategy may switch off."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if draft.source.get(strategy) in ("epoch", "no", False):
            draft.irrelevant(key, value, f"{strategy}: {draft.source[strategy]} decides")
        else:
            draft.same(key, value, "", **{target.replace(".", "__"): _below_one(fraction_or_steps(value))})

    return rule


def _below_one(value: float) -> float:
    return 0.999 if value == 1.0 and isinstance(value, float) else value


def strategy_of(target: str, is_needed: str) -> Rule:
    """Return the rule of `save_strategy` or `eval_strategy`."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value == "epoch":
            fraction = per_epoch(draft)
            draft.same(key, value, "as a fraction of all steps", **{target: 0.999 if fraction >= 1 else fraction})
        elif value == "steps":
            draft.same(key, value)
        elif value == "best":
            draft.same(key, value, "the best evaluated step is shipped", train__select__metric="eval_loss")
        else:
            draft.irrelevant(key, value, is_needed)

    return rule


def warmup(draft: Draft, key: str, value: Any) -> None:
    """Warm-up in steps, or below 1 as a fraction of all steps."""
    amount = number(value)
    if amount < 1:
        draft.same(key, value, train__warmup_ratio=amount, train__warmup_steps=None)
    else:
        draft.same(key, value, train__warmup_steps=int(amount))


def warmup_ratio(draft: Draft, key: str, value: Any) -> None:
    """Warm-up as a fraction; `warmup_steps` goes first."""
    if draft.get("warmup_steps"):
        draft.irrelevant(key, value, "warmup_steps goes first, there as here")
    else:
        draft.same(key, value, train__warmup_ratio=number(value))


def optimizer(draft: Draft, key: str, value: Any) -> None:
    """The optimizer by its name in transformers."""
    name = str(getattr(value, "value", value))
    known = training_options()["optim"].choices
    if name in known and not name.endswith("_layerwise"):
        draft.same(key, value, train__optim=name)
    elif name.endswith("_layerwise"):
        draft.nearest(key, value, "not layerwise, so that it can be resumed", train__optim=name[: -len("_layerwise")])
    elif name == "adamw_hf":
        draft.same(key, value, "the same update", train__optim="adamw_torch")
    else:
        draft.unsupported(key, value, f"transformers has no optimizer of this name; there are {', '.join(known)}")


def optim_args(draft: Draft, key: str, value: Any) -> None:
    """Further arguments of the optimizer, as a text or a mapping."""
    pairs = value if isinstance(value, dict) else dict(part.split("=", 1) for part in str(value).split(",") if part)
    draft.same(key, value, train__optim_args={name.strip(): _plain(item) for name, item in pairs.items()})


def _plain(item: Any) -> Any:
    if not isinstance(item, str):
        return item
    if item.strip().lower() in ("true", "false"):
        return item.strip().lower() == "true"
    try:
        return float(item)
    except ValueError:
        return item.strip()


def scheduler(draft: Draft, key: str, value: Any) -> None:
    """The schedule by its name in transformers."""
    name = str(getattr(value, "value", value))
    known = training_options()["lr_scheduler_type"].choices
    if name in known:
        draft.same(key, value, train__lr_scheduler_type=name)
    else:
        draft.nearest(key, value, f"transformers has no schedule {name}; cosine", train__lr_scheduler_type="cosine")


def checkpointing(draft: Draft, key: str, value: Any) -> None:
    """Whether activations are computed again."""
    draft.same(key, value, train__gradient_checkpointing=is_on(value))


def checkpointing_kwargs(draft: Draft, key: str, value: Any) -> None:
    """Arguments of checkpointing, which need it to be on."""
    if draft.values.get("train.gradient_checkpointing") or draft.is_on("gradient_checkpointing"):
        argument(draft, key, value, "gradient_checkpointing_kwargs")
    else:
        draft.irrelevant(key, value, "no activations are computed again")


def precision(draft: Draft, key: str, value: Any) -> None:
    """bf16 or fp16; without either, matrix products have the precision of model.dtype."""
    if not is_on(value):
        draft.same(key, value, "off")
    elif key == "bf16":
        draft.same(key, value, train__mixed_precision="bf16")
    elif draft.is_on("bf16"):
        draft.irrelevant(key, value, "bf16 goes first")
    else:
        draft.same(
            key, value, "its loss scaling skips bad updates", train__mixed_precision="fp16", train__on_bad_loss=None
        )


def sampling(draft: Draft, key: str, value: Any) -> None:
    """The order of rows."""
    if key == "group_by_length" or value == "group_by_length":
        if is_on(value):
            draft.irrelevant(key, value, "rows are joined or packed, so that nothing is padded")
        else:
            draft.same(key, value, "off, as here")
    else:
        draft.same(key, value, train__order="sequential" if value == "sequential" else "shuffled")


def hub_id(draft: Draft, key: str, value: Any) -> None:
    """The repository on the hub that is uploaded to."""
    if key == "hub_model_id" and "push_to_hub" in draft.source and not draft.is_on("push_to_hub"):
        draft.same(key, value, "push_to_hub is off")
    elif key == "push_to_hub":
        _push(draft, key, value)
    elif str(value).count("/") == 1 and "<" not in str(value):
        draft.same(key, value, "uploaded by `publish`, after the gate", publish__push_to_hub=str(value))
    else:
        draft.nearest(key, value, "state publish.push_to_hub: OWNER/NAME")


def _push(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.same(key, value, "off, as here")
    elif draft.get("hub_model_id"):
        draft.same(key, value, "with hub_model_id")
    else:
        draft.nearest(key, value, "state publish.push_to_hub: OWNER/NAME")


def best_metric(draft: Draft, key: str, value: Any) -> None:
    """The figure by which the best step is chosen."""
    if not draft.is_on("load_best_model_at_end", "early_stopping_patience", "early_stopping_steps"):
        draft.irrelevant(key, value, "no best step is loaded")
    elif value in ("loss", "eval_loss", True, False):
        draft.same(key, value)
    else:
        draft.nearest(key, value, "eval_loss decides; see train.select.metric", train__select__metric="eval_loss")


def best_at_end(draft: Draft, key: str, value: Any) -> None:
    """Whether the best evaluated step is the result."""
    draft.same(key, value, train__select__metric="eval_loss" if is_on(value) else None)


def early_stopping(draft: Draft, key: str, value: Any) -> None:
    """Evaluations without an improvement after which training stops."""
    if is_on(value):
        draft.same(
            key,
            value,
            "the best step is shipped",
            train__select__metric="eval_loss",
            train__select__patience=whole(value),
        )
    else:
        draft.same(key, value, "off, as here")


def kept_checkpoints(draft: Draft, key: str, value: Any) -> None:
    """How many checkpoints stay on disk."""
    if is_on(value) and whole(value) > 2:
        draft.nearest(key, value, "two are kept, for resuming")
    else:
        draft.irrelevant(key, value, "two are kept, so that a damaged one costs little")


def trackers(draft: Draft, key: str, value: Any) -> None:
    """Services that get the record."""
    names = [value] if isinstance(value, str) else list(value or [])
    known = [name for name in names if name in PACKAGES]
    others = [name for name in names if name not in ("none", "mlflow", "all", *PACKAGES)]
    if not known and not others:
        draft.irrelevant(
            key, value, "MLflow has the record, on this machine unless publish.tracking_uri says otherwise"
        )
    elif others:
        draft.nearest(key, value, f"not {', '.join(others)}; MLflow has the record", **tracked_by(draft, *known))
    else:
        draft.same(key, value, "beside MLflow", **tracked_by(draft, *known))


def tracked_by(draft: Draft, *names: str) -> dict[str, Any]:
    """Return `train.report_to` with further trackers, as an argument of the methods of `Draft`."""
    before = draft.values.get("train.report_to", ["mlflow"])
    return {"train__report_to": [*before, *(name for name in names if name not in before)]}


def tracker(name: str) -> Rule:
    """Return the rule of a switch for a tracker beside MLflow."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if is_on(value):
            draft.same(key, value, "beside MLflow", **tracked_by(draft, name))
        else:
            draft.same(key, value, "off, as here")

    return rule


def tracker_project(name: str) -> Rule:
    """Return the rule of a tracker's project, which here has the name of MLflow's experiment."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        written = {"publish__experiment": str(value), **tracked_by(draft, name)}
        draft.same(key, value, "MLflow's experiment has the same name", **written)

    return rule


def resume(draft: Draft, key: str, value: Any) -> None:
    """The checkpoint from which a training goes on."""
    if isinstance(value, bool) or not is_on(value):
        draft.same(key, value, "an interrupted training goes on by itself")
    else:
        draft.unsupported(key, value, "a training goes on from its own checkpoints alone")


ENGINE_FILE = "accelerate.yaml"

FSDP_NOTES = {
    "version": "FSDP2 shards as FSDP1 does",
    "limit_all_gathers": "FSDP2 limits them itself",
    "sync_module_states": "FSDP2 always does",
    "use_orig_params": "FSDP2 always does",
    "transformer_layer_cls_to_wrap": "the layers are found in the model",
    "state_dict_type": "checkpoints are sharded, and the result is written whole",
    "final_state_dict_type": "the result is written whole",
    "auto_wrap_policy": "the layers are found in the model",
    "min_num_params": "the layers are found in the model",
    "forward_prefetch": "a matter of speed",
    "backward_prefetch": "a matter of speed",
    "backward_prefetch_policy": "a matter of speed",
    "cpu_ram_efficient_loading": "how weights are read does not change them",
    "cpu_offload_pin_memory": "a matter of speed",
    "mixed_precision_policy": "train.mixed_precision decides",
    "xla": "an option of TPUs",
    "xla_fsdp_v2": "an option of TPUs",
    "xla_fsdp_settings": "an option of TPUs",
}
"""Option of FSDP that does not change the result -> why."""


def fsdp(draft: Draft, key: str, value: Any) -> None:
    """Record an option of FSDP, or a mapping of them with a row for each."""
    if key == "fsdp_config" and isinstance(value, Mapping):
        _use(draft)
        for name, item in value.items():
            _fsdp_option(draft, f"{key}.{name}", str(name).removeprefix("fsdp_"), item)
        if not value:
            draft.same(key, value, "all defaults", train__launch__engine=draft.values["train.launch.engine"])
        return
    if key == "fsdp":
        if not is_on(value):
            draft.same(key, value, "off")
            return
        words = value.split() if isinstance(value, str) else [str(item) for item in value] if value is not True else []
        _use(draft)
        if "offload" in words:
            _offload(draft)
        if {"shard_grad_op", "hybrid_shard", "hybrid_shard_zero2", "no_shard"} & set(words):
            draft.nearest(key, value, "parameters are sharded, too", train__launch__engine="fsdp2")
        else:
            draft.same(key, value, train__launch__engine=draft.values["train.launch.engine"])
        return
    _fsdp_option(draft, key, key.removeprefix("fsdp_"), value)


def _use(draft: Draft) -> None:
    draft.values.setdefault("train.launch.engine", "fsdp2")
    if draft.processes == 1:
        _say(
            draft,
            "it shards a model among processes: state the number of GPUs by --processes or train.launch.processes",
        )


def _say(draft: Draft, hint: str) -> None:
    if hint not in draft.hints:
        draft.hints.append(hint)


def _offload(draft: Draft) -> None:
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": draft.values.get("fsdp.reshard_after_forward", True),
            "fsdp_offload_params": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
    }
    draft.values["train.launch.engine"] = ENGINE_FILE
    draft.files[ENGINE_FILE] = json.dumps(settings, indent=2) + "\n"


def _fsdp_option(draft: Draft, key: str, name: str, value: Any) -> None:
    if name == "offload_params":
        if is_on(value):
            _offload(draft)
            draft.same(key, value, f"in {ENGINE_FILE}", train__launch__engine=ENGINE_FILE)
        else:
            draft.same(key, value, "off, as here")
    elif name == "activation_checkpointing":
        if is_on(value):
            draft.same(key, value, train__gradient_checkpointing=True)
        else:
            draft.same(key, value, "off")
    elif name == "reshard_after_forward":
        if is_on(value):
            draft.same(key, value, "as fsdp2 does")
        else:
            draft.nearest(key, value, "parameters are sharded again after the forward pass, which saves memory")
    elif name == "sharding_strategy":
        if str(value) in ("FULL_SHARD", "1"):
            draft.same(key, value, "as fsdp2 does")
        else:
            draft.nearest(key, value, "parameters are sharded, too")
    elif name in FSDP_NOTES:
        draft.irrelevant(key, value, FSDP_NOTES[name])
    else:
        draft.unsupported(key, value, "not an option of FSDP that is known here")


def deepspeed(draft: Draft, key: str, value: Any) -> None:
    """Record DeepSpeed's configuration: a stage by the file's name, or the file itself if it lies in data/."""
    if not is_on(value):
        draft.same(key, value, "off")
        return
    _say(
        draft, "DeepSpeed needs its package (pip install deepspeed); fsdp2 also shards the model, and is part of torch"
    )
    stage, offloads = _stage(value)
    if stage is None:
        draft.nearest(
            key, value, "its stage is not known from its name; ZeRO 3", train__launch__engine="deepspeed_zero3"
        )
    elif stage in (0, 1):
        note = "ZeRO 0 shards nothing" if stage == 0 else "ZeRO 2 also shards gradients; the updates are the same"
        draft.same(key, value, note, train__launch__engine="ddp" if stage == 0 else "deepspeed_zero2")
    elif offloads:
        config = {"zero_stage": stage, **offloads}
        if stage == 3:
            config |= {"zero3_init_flag": True, "zero3_save_16bit_model": True}
        settings = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": config,
        }
        draft.files[ENGINE_FILE] = json.dumps(settings, indent=2) + "\n"
        draft.same(key, value, f"stage {stage} with offloading, in {ENGINE_FILE}", train__launch__engine=ENGINE_FILE)
    else:
        draft.same(key, value, train__launch__engine=f"deepspeed_zero{stage}")


def _stage(value: Any) -> tuple[int | None, dict[str, str]]:
    """Return the ZeRO stage of a configuration, and what it offloads to the host's memory."""
    if isinstance(value, Mapping):
        zero = value.get("zero_optimization", {})
        places = {
            f"offload_{part}_device": str(zero[f"offload_{what}"].get("device", "cpu"))
            for part, what in (("optimizer", "optimizer"), ("param", "param"))
            if zero.get(f"offload_{what}")
        }
        return int(zero.get("stage", 0)), {name: place for name, place in places.items() if place != "none"}
    name = PurePosixPath(str(value)).name.lower()
    stage = next((int(mark[-1]) for mark in _MARKS if mark in name), None)
    if "offload" not in name:
        return stage, {}
    places = {"offload_optimizer_device": "cpu"}
    if stage == 3 and "optimizer" not in name:
        places["offload_param_device"] = "cpu"
    return stage, places


_MARKS = tuple(f"{word}{stage}" for stage in range(4) for word in ("zero", "z", "stage", "zero_", "stage_"))


NO_HELD_OUT = "held-out rows are scored all the same, which does not change the weights"

_IRRELEVANT = {
    "output_dir": "results are in outs/, checkpoints in .state/",
    "do_train": "stages are commands here",
    "do_eval": "held-out rows are always scored",
    "do_predict": "the stage `evaluate` answers the held-out prompts",
    "save_only_model": "checkpoints serve resuming only, and have what that needs",
    "save_on_each_node": "the first process writes them, into a folder that all machines share",
    "enable_jit_checkpoint": "a training that is stopped always saves a checkpoint",
    "ignore_data_skip": "a resumed training skips the rows that it has seen",
    "restore_callback_states_from_checkpoint": "they are always restored",
    "logging_strategy": "losses are logged every train.logging_steps steps",
    "logging_nan_inf_filter": "logs have what was measured",
    "include_num_input_tokens_seen": "tokens are counted",
    "include_tokens_per_second": "the speed is logged",
    "disable_tqdm": "progress lines replace its bar",
    "prediction_loss_only": "the stage `evaluate` scores answers",
    "include_for_metrics": "the stage `evaluate` scores answers",
    "batch_eval_metrics": "the stage `evaluate` scores answers",
    "eval_do_concat_batches": "the stage `evaluate` scores answers",
    "eval_use_gather_object": "the stage `evaluate` scores answers",
    "hub_token": "state it in the environment variable HF_TOKEN",
    "hub_private_repo": "a new repository is private",
    "hub_strategy": "the shipped model is uploaded once",
    "hub_always_push": "the shipped model is uploaded once",
    "local_rank": "the launcher sets it",
    "remove_unused_columns": "rows have only columns that are used",
    "label_names": "rows have labels",
    "length_column_name": "lengths are known",
    "use_cache": "a training reads no cache of keys and values",
    "dataset_num_proc": "format.num_proc and pack.num_proc do not change the rows",
    "dataset_batch_size": "it does not change the rows",
    "bf16_full_eval": "weights are evaluated as they are trained",
    "fp16_full_eval": "weights are evaluated as they are trained",
}

_OWN: dict[str, Rule] = {
    "save_strategy": strategy_of("train__save_steps", "checkpoints serve resuming, and are always written"),
    "eval_strategy": strategy_of("train__eval_steps", NO_HELD_OUT),
    "save_total_limit": kept_checkpoints,
    "load_best_model_at_end": best_at_end,
    "metric_for_best_model": best_metric,
    "greater_is_better": best_metric,
    "report_to": trackers,
    "resume_from_checkpoint": resume,
    "hub_revision": approach("`publish` uploads to the main branch"),
    "per_device_train_batch_size": keep("train.per_device_train_batch_size", whole),
    "num_train_epochs": keep("train.num_train_epochs", number),
    "max_steps": keep("train.max_steps", whole),
    "learning_rate": keep("train.learning_rate", number),
    "lr_scheduler_type": scheduler,
    "lr_scheduler_kwargs": keep("train.lr_scheduler_kwargs", dict),
    "weight_decay": keep("train.weight_decay", number),
    "adam_beta1": keep("train.adam_beta1", number),
    "adam_beta2": keep("train.adam_beta2", number),
    "adam_epsilon": keep("train.adam_epsilon", number),
    "gradient_accumulation_steps": keep("train.gradient_accumulation_steps", whole),
    "max_grad_norm": keep("train.max_grad_norm", number),
    "gradient_checkpointing": checkpointing,
    "activation_checkpointing": checkpointing,
    "gradient_checkpointing_kwargs": checkpointing_kwargs,
    "use_liger_kernel": keep("train.use_liger_kernel", is_on),
    "use_liger": keep("train.use_liger_kernel", is_on),
    "neftune_noise_alpha": keep("train.neftune_noise_alpha", number),
    "logging_steps": keep("train.logging_steps", lambda value: max(1, whole(value))),
    "eval_steps": steps_of("train.eval_steps", "eval_strategy"),
    "save_steps": steps_of("train.save_steps", "save_strategy"),
    "seed": keep("train.seed", whole),
    "warmup_ratio": warmup_ratio,
    "warmup_steps": warmup,
    "optim": optimizer,
    "optim_args": optim_args,
    "label_smoothing_factor": keep("train.label_smoothing_factor", number),
    "torch_compile": keep("train.torch_compile", is_on),
    "bf16": precision,
    "fp16": precision,
    "train_sampling_strategy": sampling,
    "group_by_length": sampling,
    "auto_find_batch_size": lambda draft, key, value: draft.same(
        key, value, train__on_oom="halve" if is_on(value) else "fail"
    ),
    "deepspeed": deepspeed,
    "fsdp": fsdp,
    "fsdp_config": fsdp,
    "fsdp_transformer_layer_cls_to_wrap": fsdp,
    "fsdp_min_num_params": ignore("the layers of the model are sharded"),
    "parallelism_config": refuse("FSDP2 shards the model; context and tensor parallelism are not here"),
    "push_to_hub": hub_id,
    "hub_model_id": hub_id,
    "project": keep("publish.experiment", str),
    "evaluation_strategy": strategy_of("train__eval_steps", NO_HELD_OUT),
    "overwrite_output_dir": ignore("results are in outs/, and DVC keeps earlier ones"),
    "eval_accumulation_steps": by_name,
    "logging_dir": ignore("MLflow has the record"),
    "no_cuda": ignore("the device is found"),
    "use_mps_device": ignore("the device is found"),
    "push_to_hub_token": ignore("state it in the environment variable HF_TOKEN"),
    "push_to_hub_model_id": hub_id,
    "push_to_hub_organization": approach("state publish.push_to_hub: OWNER/NAME"),
    "save_safetensors": ignore("weights are written as safetensors"),
    "tpu_num_cores": refuse("TPUs are not supported"),
    "jit_mode_eval": ignore("a matter of speed"),
    "use_ipex": ignore("a matter of speed"),
    "half_precision_backend": ignore("the backend is chosen"),
    "fp16_opt_level": ignore("an option of Apex"),
    "fp16_backend": ignore("the backend is chosen"),
    "sharded_ddp": refuse("state train.launch.engine: fsdp2"),
    "torchdynamo": refuse("state train.torch_compile: true"),
    "ray_scope": ignore("sweeps are `sft sweep`"),
    "past_index": refuse("models without a memory of past states"),
    "predict_with_generate": ignore("the stage `evaluate` answers the held-out prompts"),
    "generation_max_length": approach("in tokens of the answer", "evaluate.max_new_tokens", whole),
    "generation_num_beams": approach("answers are greedy"),
    "generation_config": approach("answers are greedy"),
    "sortish_sampler": ignore("rows are joined, so that nothing is padded"),
    "eval_on_start": by_name,
}


def trainer_rules() -> dict[str, Rule]:
    """Return the rule of each option of TrainingArguments, those of former releases included."""
    options = training_options()
    rules: dict[str, Rule] = {name: by_name for name in options if name not in KEYS and name not in REFUSED}
    rules |= {name: ignore(note) for name, note in _IRRELEVANT.items()}
    rules |= {name: refuse(reason) for name, reason in REFUSED.items() if name not in rules and name not in _OWN}
    rules |= _OWN
    keys = leaf_fields(Params)
    for name in options:
        target = KEYS.get(name)
        if name not in rules and target in keys:
            rules[name] = keep(str(target))
        elif name not in rules:
            rules[name] = part_of(str(target))
    rules["run_name"] = ignore("`publish` names the run of MLflow")
    rules["log_level"] = rules["log_level_replica"] = ignore("messages of the libraries do not change the result")
    return rules


__all__ = ["DEFAULTS", "ROWS_AS_THERE", "Effect", "trainer_rules"]
