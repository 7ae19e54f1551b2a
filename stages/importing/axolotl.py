"""What becomes of each key of an Axolotl configuration.

Source: Axolotl's pydantic schemas (`axolotl/utils/schemas/`, `axolotl/integrations/*/args.py`, 0.19) and the trainer
builder that reads them; keys of former releases as its deprecation notes describe them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.importing import trainer
from stages.importing.axolotl_data import chat_template, dataset_list, eval_split, new_tokens, special_tokens
from stages.importing.draft import (
    Draft,
    Rule,
    always,
    approach,
    argument,
    by_name,
    ignore,
    is_on,
    keep,
    part_of,
    refuse,
)
from stages.importing.draft import finish as agree
from stages.importing.trainer import deepspeed, fsdp, number, tracker, tracker_project, whole

DEFAULTS: dict[str, Any] = {
    **trainer.DEFAULTS,
    **trainer.ROWS_AS_THERE,
    "load.require_alternation": False,
    "train.method": "full",
    "train.lora_dropout": 0.0,
    "train.learning_rate": 2e-4,
    "train.num_train_epochs": 1.0,
    "train.per_device_train_batch_size": 1,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_ratio": 0.03,
    "train.mixed_precision": "bf16",
    "model.dtype": "bfloat16",
    "train.logging_steps": 10,
    "train.eval_steps": 0.25,
    "train.save_steps": 0.25,
    "pack.max_length": 512,
    "pack.strategy": "none",
    "pack.overflow": "drop",
}
"""Values of Axolotl for what a configuration does not state."""

OTHER_TASKS = {
    "rl": "preference or reinforcement learning",
    "reward_model": "a reward model",
    "process_reward_model": "a process reward model",
    "kd_trainer": "distillation",
    "diffusion": "a diffusion language model",
    "ebft": "energy-based fine-tuning",
}
"""Switch -> the task that it asks for instead of SFT."""


def check_task(source: Mapping[str, Any]) -> None:
    """Check that a configuration is one of supervised fine-tuning.

    Raises:
        ValueError: It is another task.
    """
    for key, task in OTHER_TASKS.items():
        if is_on(source.get(key)):
            raise ValueError(f"{key}: {source[key]!r} asks for {task}; this pipeline does supervised fine-tuning alone")


def _adapter(draft: Draft, key: str, value: Any) -> None:
    kinds = {"lora": "lora", "qlora": "qlora"}
    if value in kinds and draft.is_on("load_in_4bit"):
        draft.same(key, value, train__method="qlora")
    elif value in kinds and draft.is_on("load_in_8bit"):
        draft.same(key, value, "on a base without quantization; see load_in_8bit", train__method="lora")
    elif value in kinds:
        draft.same(key, value, train__method=kinds[value])
    elif value == "llama-adapter":
        draft.unsupported(key, value, "its prompts can't be merged into the weights")
    else:
        draft.unsupported(key, value, "LoRA, QLoRA and the types of train.adapter are here")


def _four_bits(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.same(key, value, "off, as here")
    elif draft.get("adapter"):
        draft.same(key, value, "nf4, double quantization", train__method="qlora")
    else:
        draft.unsupported(key, value, "all weights can't be trained in 4 bits")


def _eight_bits(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.same(key, value, "off, as here")
    elif draft.get("adapter"):
        draft.nearest(key, value, "the base is in 16 bits, which is more exact and takes twice the memory")
    else:
        draft.unsupported(key, value, "all weights can't be trained in 8 bits")


def _target_linear(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.same(key, value, "off")
    elif draft.get("lora_target_modules"):
        draft.same(
            key, value, "lora_target_modules are among the linear layers", train__lora_target_modules="all-linear"
        )
    else:
        draft.same(key, value, train__lora_target_modules="all-linear")


def _target_modules(draft: Draft, key: str, value: Any) -> None:
    if draft.is_on("lora_target_linear"):
        draft.same(key, value, "lora_target_linear adds all others")
    elif value in ("all-linear", ["all-linear"]):
        draft.same(key, value, train__lora_target_modules="all-linear")
    else:
        draft.same(
            key,
            value,
            train__lora_target_modules=value,
            train__lora_target_parameters=draft.get("lora_target_parameters", default=[]),
        )


def _target_parameters(draft: Draft, key: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else list(value)
    if draft.get("lora_dropout"):
        draft.nearest(
            key,
            value,
            "matrices on parameters have no dropout; lora_dropout is 0",
            train__lora_target_parameters=names,
            train__lora_dropout=0.0,
        )
    else:
        draft.same(key, value, train__lora_target_parameters=names)


def _dropout(draft: Draft, key: str, value: Any) -> None:
    if draft.get("lora_target_parameters") and number(value):
        draft.nearest(key, value, "matrices on parameters have no dropout", train__lora_dropout=0.0)
    else:
        draft.same(key, value, train__lora_dropout=number(value))


def _bf16(draft: Draft, key: str, value: Any) -> None:
    if value == "auto" or is_on(value):
        note = "bf16, which all GPUs since 2020 have" if value == "auto" else ""
        draft.same(key, value, note, train__mixed_precision="bf16", model__dtype="bfloat16")
    elif draft.is_on("fp16", "float16"):
        draft.same(key, value, "off")
    else:
        draft.same(key, value, "off", train__mixed_precision="no", model__dtype="float32")


def _fp16(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.same(key, value, "off")
    elif draft.is_on("bf16", "bfloat16") or draft.source.get("bf16") == "auto":
        draft.irrelevant(key, value, "bf16 goes first")
    else:
        draft.same(
            key,
            value,
            "its loss scaling skips bad updates",
            train__mixed_precision="fp16",
            model__dtype="float16" if draft.get("adapter") else "float32",
            train__on_bad_loss=None,
        )


ATTENTION = {
    "xformers": ("sdpa", "sdpa computes the same attention"),
    "sage": ("sdpa", ""),
    "s2": ("sdpa", ""),
    "fp8": ("sdpa", ""),
    "flash": ("flash_attention_2", ""),
    "sdp": ("sdpa", ""),
    "flex": ("flex_attention", ""),
}
INEXACT = ("sage", "s2", "fp8")
KNOWN_ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def attention(draft: Draft, key: str, value: Any) -> None:
    """The attention implementation by its name."""
    name = str(value)
    if name in KNOWN_ATTENTION:
        draft.same(key, value, model__attn_implementation=name)
    elif "flash-attn3" in name or "flash_attn3" in name or name == "flash_attention_4":
        note = "flash attention 3, installed as a package or from the hub, computes the same"
        draft.same(key, value, note, model__attn_implementation="flash_attention_3")
    elif "flash" in name:
        draft.same(key, value, "computes the same", model__attn_implementation="flash_attention_2")
    elif name in INEXACT or "sage" in name:
        draft.nearest(key, value, "exact attention", model__attn_implementation="sdpa")
    elif name in ATTENTION:
        draft.same(key, value, ATTENTION[name][1], model__attn_implementation=ATTENTION[name][0])
    else:
        draft.nearest(key, value, "not known here; chosen by the model and device", model__attn_implementation="auto")


def _attention_switch(name: str) -> Rule:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if not is_on(value):
            draft.same(key, value, "off")
        elif draft.get("attn_implementation"):
            draft.irrelevant(key, value, "attn_implementation goes first")
        else:
            attention(draft, key, name)
            draft.rows[-1] = type(draft.rows[-1])(key, value, *_rest(draft.rows[-1]))

    return rule


def _rest(row: Any) -> tuple[Any, ...]:
    return row.effect, row.written, row.note


OPTIMIZERS = {
    "adamw_hf": "adamw_torch",
    "ao_adamw_4bit": "adamw_torch_4bit",
    "ao_adamw_8bit": "adamw_torch_8bit",
    "optimi_adamw": "adamw_torch",
    "muon": "muon",
    "flash_adamw": "adamw_torch_fused",
    "flash_sgd": "sgd",
    "flash_lion": "lion_32bit",
}
NEAR_OPTIMIZERS = {
    "ao_adamw_fp8": "adamw_torch_8bit",
    "adopt_adamw": "adamw_torch_fused",
    "adamc": "adamw_torch_fused",
    "came_pytorch": "adafactor",
    "dion": "muon",
    "q_galore_adamw8bit": "galore_adamw_8bit",
    "flash_adam": "adamw_torch_fused",
    "flash_sgdw": "sgd",
    "polora": "adamw_torch_fused",
    "sinkgd": "adamw_torch_fused",
}


def _optimizer(draft: Draft, key: str, value: Any) -> None:
    name = str(value)
    if name in NEAR_OPTIMIZERS:
        draft.nearest(key, value, f"{NEAR_OPTIMIZERS[name]} instead", train__optim=NEAR_OPTIMIZERS[name])
    elif name in OPTIMIZERS:
        note = "" if OPTIMIZERS[name] == name else "the same update"
        draft.same(key, value, note, train__optim=OPTIMIZERS[name])
    else:
        trainer.optimizer(draft, key, value)


def _scheduler(draft: Draft, key: str, value: Any) -> None:
    floor = draft.get("cosine_min_lr_ratio")
    if value in ("rex", "one_cycle"):
        draft.nearest(key, value, "cosine instead", train__lr_scheduler_type="cosine")
    elif value == "cosine" and floor and not draft.is_on("cosine_constant_lr_ratio"):
        draft.same(
            key,
            value,
            "with the floor of cosine_min_lr_ratio",
            train__lr_scheduler_type="cosine_with_min_lr",
            train__lr_scheduler_kwargs={"min_lr_rate": number(floor)},
        )
    else:
        trainer.scheduler(draft, key, value)


def _constant_ratio(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.nearest(key, value, "the rate falls until the end instead of staying at its floor")
    else:
        draft.same(key, value, "off, as here")


def _warmup_steps(draft: Draft, key: str, value: Any) -> None:
    amount = number(value)
    trainer.warmup(draft, key, 2 if amount == 1 else value)
    if amount == 1:
        draft.rows[-1] = type(draft.rows[-1])(key, value, *_rest(draft.rows[-1]))


def _batch_size(draft: Draft, key: str, value: Any) -> None:
    passes = max(1, whole(value) // whole(draft.get("micro_batch_size", default=1)))
    if draft.get("gradient_accumulation_steps"):
        draft.irrelevant(key, value, "gradient_accumulation_steps goes first")
    else:
        draft.same(key, value, "as passes per step", train__gradient_accumulation_steps=passes)


def _micro_batch_size(draft: Draft, key: str, value: Any) -> None:
    note = "as many packed rows, which Axolotl joins to one" if draft.is_on("sample_packing") else ""
    draft.same(key, value, note, train__per_device_train_batch_size=whole(value))


def _packing(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        in_order = draft.is_on("sample_packing_sequentially", "curriculum_sampling")
        strategy = "in_order" if in_order else "bfd"
        draft.same(key, value, "documents of a row do not see each other", pack__strategy=strategy)
    else:
        draft.same(key, value, pack__strategy="none")


def _overflow(draft: Draft, key: str, value: Any) -> None:
    kinds = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    if value in kinds:
        draft.same(key, value, pack__overflow=kinds[value])
    else:
        draft.unsupported(key, value, f"there are {', '.join(kinds)}")


def _checkpointing(draft: Draft, key: str, value: Any) -> None:
    if value in ("offload", "unsloth", "offload_disk"):
        note = "activations are kept in the host's memory" if value != "offload_disk" else "in memory, not on disk"
        record = draft.same if value != "offload_disk" else draft.nearest
        record(key, value, note, train__gradient_checkpointing=True, train__activation_offloading=True)
    else:
        trainer.checkpointing(draft, key, value)


def _offloading(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.same(key, value, "off, as here")
    else:
        draft.same(key, value, "in the host's memory", train__activation_offloading=True)


def _per_epoch(target: str) -> Rule:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if not is_on(value):
            draft.irrelevant(key, value, trainer.NO_HELD_OUT if "eval" in target else "the last step is always saved")
            return
        fraction = trainer.per_epoch(draft, number(value))
        draft.same(key, value, "as a fraction of all steps", **{target: 0.999 if fraction >= 1 else fraction})

    return rule


def _eval_steps(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.irrelevant(key, value, trainer.NO_HELD_OUT)
    else:
        trainer.steps_of("train.eval_steps", "eval_strategy")(draft, key, value)


def _loftq(draft: Draft, key: str, value: Any) -> None:
    options = value if isinstance(value, Mapping) else {}
    for name, item in options.items():
        if name == "loftq_config":
            bits = item.get("loftq_bits", 4) if isinstance(item, Mapping) else 4
            if bits == 4 and not draft.is_on("load_in_4bit"):
                draft.same(f"{key}.{name}", item, train__init_lora_weights="loftq")
            else:
                draft.nearest(f"{key}.{name}", item, "LoftQ with 4 bits", train__init_lora_weights="loftq")
        else:
            draft.unsupported(f"{key}.{name}", item, "not an option of peft that is known here")
    if not options:
        draft.same(key, value, "not set")


def _loftq_bits(draft: Draft, key: str, value: Any) -> None:
    _loftq(draft, "peft", {"loftq_config": value})


PLUGINS = {
    "CutCrossEntropyPlugin": "the head and the loss are computed in pieces here, without all logits in memory",
    "LigerPlugin": "see the keys liger_*",
    "KernelsPlugin": "kernels of experts; a matter of speed",
    "SpectrumPlugin": "see spectrum_top_fraction",
    "LMEvalPlugin": "see lm_eval_tasks",
    "GrokfastPlugin": "see grokfast_alpha",
    "KDPlugin": "see kd_trainer",
    "SwanLabPlugin": "MLflow has the record",
    "DenseMixerPlugin": "see dense_mixer",
    "ExpertParallelPlugin": "see expert_parallel_size",
    "LLMCompressorPlugin": "see llmcompressor",
    "DiffusionPlugin": "see diffusion",
}


def _plugins(draft: Draft, key: str, value: Any) -> None:
    for index, plugin in enumerate(value if isinstance(value, list) else [value]):
        name = str(plugin).rpartition(".")[2]
        place = f"{key}[{index}]"
        if name == "CutCrossEntropyPlugin":
            draft.same(place, plugin, PLUGINS[name])
        elif name in PLUGINS:
            draft.irrelevant(place, plugin, PLUGINS[name])
        else:
            draft.unsupported(place, plugin, "plugins of Axolotl are not run")
    if not value:
        draft.same(key, value, "none")


def _liger(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.same(key, value, train__use_liger_kernel=True)
    else:
        draft.same(key, value, "off")


def _bnb_config(draft: Draft, key: str, value: Any) -> None:
    ours = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    for name, item in value.items() if isinstance(value, Mapping) else ():
        if ours.get(name) == item or str(item).removeprefix("torch.") == ours.get(name):
            draft.same(f"{key}.{name}", item, "as here")
        elif name in ("bnb_4bit_quant_storage", "llm_int8_skip_modules"):
            draft.irrelevant(f"{key}.{name}", item, "how the weights are stored")
        else:
            draft.nearest(f"{key}.{name}", item, f"{ours.get(name, 'the default of bitsandbytes')} here")


def _unfrozen(draft: Draft, key: str, value: Any) -> None:
    patterns = [str(item).split("[", 1)[0] if _has_slice(str(item)) else str(item) for item in value]
    if any(_has_slice(str(item)) for item in value):
        draft.nearest(key, value, "a part of a parameter's rows can't be frozen; the whole parameter is trained")
    else:
        draft.same(key, value, "all others are frozen")
    joined = "|".join(patterns)
    draft.values["train.parameter_groups"] = [{"pattern": f"^(?!.*({joined}))", "frozen": True}]


def _has_slice(pattern: str) -> bool:
    head, _, rest = pattern.rpartition("[")
    return bool(head) and ":" in rest


def _lr_groups(draft: Draft, key: str, value: Any) -> None:
    groups = [
        {"pattern": "|".join(map(str, group["modules"])), "learning_rate": number(group["lr"])} for group in value
    ]
    draft.same(key, value, train__parameter_groups=groups)


def _embedding_scale(draft: Draft, key: str, value: Any) -> None:
    if draft.get("embedding_lr"):
        draft.irrelevant(key, value, "embedding_lr goes first")
    else:
        rate = number(value) * number(draft.get("learning_rate", default=DEFAULTS["train.learning_rate"]))
        draft.same(key, value, train__embedding_learning_rate=rate)


def _peft_init(draft: Draft, key: str, value: Any) -> None:
    draft.same(key, value, train__init_lora_weights=value)


def _lora_embedding_rate(draft: Draft, key: str, value: Any) -> None:
    if draft.get("loraplus_lr_ratio"):
        draft.nearest(key, value, "embeddings have the rate of LoRA's second matrices")
    else:
        draft.irrelevant(key, value, "loraplus_lr_ratio is not set")


def _watchdog(draft: Draft, key: str, value: Any) -> None:
    if key == "loss_watchdog_threshold":
        draft.nearest(
            key, value, "a loss 10 times the median of the last 50 stops the training", train__bad_loss_factor=10.0
        )
    else:
        draft.nearest(key, value, "the first such loss stops the training")


def _mlflow(target: str) -> Rule:
    return keep(target, str)


def _use_kernels(draft: Draft, key: str, value: Any) -> None:
    draft.same(key, value, train__use_kernels=is_on(value))


def _quantization_config(draft: Draft, key: str, value: Any) -> None:
    if value in ("Mxfp4Config", "mxfp4"):
        draft.same(key, value, "mxfp4 weights are converted to model.dtype when they are loaded")
    else:
        draft.nearest(key, value, "the checkpoint's own quantization is read as it is")


def _model_config(draft: Draft, key: str, value: Any) -> None:
    for name, item in value.items() if isinstance(value, Mapping) else ():
        if name == "output_router_logits" and is_on(item):
            note = "the weight of the model's config.json is usual; 0.001 here"
            draft.same(f"{key}.{name}", item, note, train__router_aux_loss_coef=0.001)
        elif name == "router_aux_loss_coef":
            draft.same(f"{key}.{name}", item, train__router_aux_loss_coef=number(item))
        elif name == "use_cache":
            draft.irrelevant(f"{key}.{name}", item, "a training reads no cache")
        else:
            draft.unsupported(f"{key}.{name}", item, "values of config.json are those of the checkpoint")
    if not isinstance(value, Mapping):
        draft.unsupported(key, value, "the configuration is that of the base model")


def _world(draft: Draft, key: str, value: Any) -> None:
    if number(value) > 1:
        draft.processes = max(draft.processes, whole(value))
        draft.same(key, value, train__launch__processes=draft.processes)
    else:
        draft.same(key, value, "one, as here")


def _shards(draft: Draft, key: str, value: Any) -> None:
    if whole(value) > 1:
        draft.processes = max(draft.processes, whole(value) * whole(draft.get("dp_replicate_size", default=1)))
        draft.values.setdefault("train.launch.engine", "fsdp2")
        draft.same(
            key,
            value,
            train__launch__processes=draft.processes,
            train__launch__engine=draft.values["train.launch.engine"],
        )
    else:
        draft.same(key, value, "one, as here")


def _one_only(note: str) -> Rule:
    return refuse(note, off=(1, "1"))


def _remove_columns(draft: Draft, key: str, value: Any) -> None:
    draft.irrelevant(key, value, "columns that are not used are removed, images stay")


def _ray(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.same(key, value, train__launch__launcher="ray")
    else:
        draft.same(key, value, "off, as here")


_SPEED = "a matter of speed; layers are fused where that gives the same result"
_RL = "an option of preference or reinforcement learning"
_TRACK = "MLflow has the record"
_ELSEWHERE = "an option of a web page or server, not of the training"
_CACHE = "DVC keeps what was computed"

RULES: dict[str, Rule] = {
    **{
        name: rule
        for name, rule in trainer.trainer_rules().items()
        if name
        in (
            "learning_rate",
            "lr_scheduler_kwargs",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "max_grad_norm",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_strategy",
            "save_total_limit",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "save_only_model",
            "seed",
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "dataloader_pin_memory",
            "dataloader_num_workers",
            "dataloader_prefetch_factor",
            "dataloader_drop_last",
            "accelerator_config",
            "ddp_timeout",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_find_unused_parameters",
            "torch_empty_cache_steps",
            "optim_target_modules",
            "hub_model_id",
            "hub_strategy",
            "hub_revision",
            "resume_from_checkpoint",
            "local_rank",
            "warmup_ratio",
            "neftune_noise_alpha",
            "optim_args",
            "output_dir",
            "group_by_length",
            "auto_find_batch_size",
            "include_tokens_per_second",
            "gradient_checkpointing_kwargs",
            "save_safetensors",
            "tf32",
            "eval_strategy",
            "run_name",
            "label_smoothing_factor",
            "logging_first_step",
        )
    },
    # model
    "base_model": keep("model.name_or_path", str),
    "revision_of_model": keep("model.revision", str),
    "trust_remote_code": keep("model.trust_remote_code", is_on),
    "base_model_config": ignore("the configuration lies beside the weights"),
    "cls_model_config": ignore("the class is found in the checkpoint"),
    "tokenizer_config": approach("the tokenizer is that of the base model"),
    "tokenizer_use_fast": ignore("fast tokenizers are used"),
    "tokenizer_legacy": ignore("fast tokenizers have no former behaviour"),
    "tokenizer_use_mistral_common": approach("the tokenizer of transformers, with the same vocabulary"),
    "tokenizer_type": ignore("the class is found in the checkpoint"),
    "model_type": ignore("the class is found in the checkpoint"),
    "type_of_model": ignore("the class is found in the checkpoint"),
    "processor_type": ignore("the processor is that of the base model"),
    "processor_kwargs": approach("the processor is that of the base model"),
    "tokenizer_save_jinja_files": ignore("the template is saved with the tokenizer"),
    "experimental_skip_move_to_device": ignore("how weights get to the device does not change them"),
    "use_kernels": _use_kernels,
    "model_quantization_config": _quantization_config,
    "model_quantization_config_kwargs": part_of("model_quantization_config"),
    "use_onebitllms": refuse("weights of 1 bit are not trained"),
    "model_config": _model_config,
    "overrides_of_model_config": _model_config,
    "overrides_of_model_kwargs": approach("the base model is loaded as it is"),
    "base_model_ignore_patterns": ignore("only the weights that are needed are downloaded"),
    "is_falcon_derived_model": ignore("the model's class is known"),
    "is_llama_derived_model": ignore("the model's class is known"),
    "is_mistral_derived_model": ignore("the model's class is known"),
    "is_qwen_derived_model": ignore("the model's class is known"),
    "low_cpu_mem_usage": ignore("weights are always read so"),
    "device_map": ignore("each process has its device"),
    "device": ignore("the device is found"),
    "max_memory": ignore("each process has its device"),
    "gpu_memory_limit": ignore("each process has its device"),
    "hf_use_auth_token": ignore("log in by `hf auth login`, or set HF_TOKEN"),
    "reinit_weights": refuse("a training starts from the weights of the base model"),
    "num_labels": refuse("classifiers are not trained", off=(1,)),
    "resize_token_embeddings_to_32x": ignore("how many rows without a token the embeddings have"),
    "shrink_embeddings": ignore("rows without a token stay"),
    "mean_resizing_embeddings": always("new rows begin as the mean of the others"),
    "embeddings_skip_upcast": ignore("embeddings have the precision of model.dtype"),
    "fix_untrained_tokens": approach(
        "new tokens begin as the mean of the others; give their ids by train.trainable_token_indices"
    ),
    "added_tokens_overrides": approach("state new tokens in format.add_special_tokens"),
    # precision
    "bf16": _bf16,
    "bfloat16": _bf16,
    "fp16": _fp16,
    "float16": _fp16,
    "float32": ignore("bf16 and fp16 decide"),
    "fp8": refuse("bf16 instead"),
    "fp8_config": refuse("bf16 instead"),
    "fp8_enable_fsdp_float8_all_gather": refuse("bf16 instead"),
    "fp32_norms": ignore("norms are computed in float32"),
    "fp32_norm_classes": ignore("norms are computed in float32"),
    "gradient_checkpointing": _checkpointing,
    "selective_checkpointing": approach(
        "all but matrix products and attention", "train.gradient_checkpointing", lambda value: "selective"
    ),
    "activation_offloading": _offloading,
    "layer_offloading": refuse("activations can be offloaded, weights by the engine"),
    "ple_cpu_offload": refuse("weights are offloaded by the engine"),
    "freeze_mm_modules": always("without images in the rows, the image tower stays as it is"),
    "unfrozen_parameters": _unfrozen,
    # adapters
    "adapter": _adapter,
    "load_in_4bit": _four_bits,
    "load_in_8bit": _eight_bits,
    "lora_model_dir": refuse("a training starts from the base model; merge the adapter first and name the result"),
    "lora_r": keep("train.lora_r", whole),
    "lora_alpha": keep("train.lora_alpha", whole),
    "lora_dropout": _dropout,
    "lora_target_modules": _target_modules,
    "lora_target_parameters": _target_parameters,
    "lora_target_linear": _target_linear,
    "lora_modules_to_save": keep("train.modules_to_save", list),
    "lora_rank_pattern": keep("train.rank_pattern", dict),
    "lora_alpha_pattern": keep("train.alpha_pattern", dict),
    "lora_fan_in_fan_out": ignore("peft knows it from the layer's class"),
    "lora_on_cpu": ignore("where the adapter is read does not change it"),
    "lora_mlp_kernel": ignore(_SPEED),
    "lora_qkv_kernel": ignore(_SPEED),
    "lora_o_kernel": ignore(_SPEED),
    "lora_embedding_kernel": ignore(_SPEED),
    "lora_bias": approach("biases are not trained"),
    "peft": _loftq,
    "peft_layers_to_transform": keep("train.layers_to_transform", list),
    "peft_layers_pattern": ignore("the layers are found in the model"),
    "peft_use_dora": keep("train.use_dora", is_on),
    "peft_use_rslora": keep("train.use_rslora", is_on),
    "peft_layer_replication": refuse("layers are not repeated"),
    "peft_init_lora_weights": _peft_init,
    "peft_trainable_token_indices": keep("train.trainable_token_indices", list),
    "peft_ensure_weight_tying": ignore("tied embeddings stay tied"),
    "peft_autocast_adapter_dtype": always("adapters are in float32"),
    "qlora_sharded_model_loading": ignore("how weights are read does not change them"),
    "gptq": refuse("QLoRA on nf4 instead"),
    "gptq_groupsize": ignore("an option of a former GPTQ loader"),
    "gptq_model_v1": ignore("an option of a former GPTQ loader"),
    "gptq_disable_exllama": ignore("an option of a former GPTQ loader"),
    "bnb_config_kwargs": _bnb_config,
    "loraplus_lr_ratio": keep("train.loraplus_lr_ratio", number),
    "loraplus_lr_embedding": _lora_embedding_rate,
    "merge_lora": ignore("the stage `merge` always does"),
    "merge_method": ignore("the stage `merge` checks its result"),
    "relora": refuse("an adapter is merged once, after the training"),
    "relora_prune_ratio": refuse("relora is not here"),
    "relora_prune_method": refuse("relora is not here"),
    "relora_cpu_offload": refuse("relora is not here"),
    "relora_steps": refuse("relora is not here"),
    "relora_warmup_steps": refuse("relora is not here"),
    "jagged_restart_steps": refuse("the rate is not restarted; cosine_with_restarts is the nearest schedule"),
    "jagged_restart_warmup_steps": refuse("the rate is not restarted"),
    "jagged_restart_anneal_steps": refuse("the rate is not restarted"),
    "lisa_n_layers": refuse("the trained layers do not change during a training"),
    "lisa_step_interval": refuse("the trained layers do not change during a training"),
    "lisa_layers_attribute": refuse("the trained layers do not change during a training"),
    # data
    "datasets": dataset_list,
    "test_datasets": eval_split,
    "val_set_size": eval_split,
    "pretraining_dataset": dataset_list,
    "shuffle_merged_datasets": always("packed rows are shuffled in each epoch"),
    "shuffle_before_merging_datasets": ignore("packed rows are shuffled in each epoch"),
    "dataset_prepared_path": ignore(_CACHE),
    "dataset_shard_num": approach("load.sources[].max_rows or weight take a part of the rows"),
    "dataset_shard_idx": approach("load.sources[].max_rows or weight take a part of the rows"),
    "num_dataset_shards_to_save": ignore(_CACHE),
    "skip_prepare_dataset": ignore("rows with images are read batch by batch"),
    "dataset_processes": ignore("format.num_proc and pack.num_proc do not change the rows"),
    "dataset_num_proc": ignore("format.num_proc and pack.num_proc do not change the rows"),
    "dataset_keep_in_memory": ignore(_CACHE),
    "dataset_exact_deduplication": lambda draft, key, value: draft.same(
        key, value, load__checks__duplicate="drop" if is_on(value) else "warn"
    ),
    "push_dataset_to_hub": refuse("data is not uploaded"),
    "remove_unused_columns": _remove_columns,
    "is_preprocess": ignore(_CACHE),
    "preprocess_iterable": ignore(_CACHE),
    "preprocess_shards": ignore(_CACHE),
    "total_num_tokens": ignore("they are counted"),
    "total_supervised_tokens": ignore("they are counted"),
    "streaming": part_of("datasets"),
    "streaming_multipack_buffer_size": ignore("all rows are packed at once"),
    "pretrain_multipack_buffer_size": ignore("all rows are packed at once"),
    "pretrain_multipack_attn": always("documents of a row do not see each other"),
    "pretraining_sample_concatenation": lambda draft, key, value: draft.same(
        key, value, **({"pack__strategy": "wrapped"} if is_on(value) else {})
    ),
    "special_tokens": special_tokens,
    "tokens": new_tokens,
    "chat_template": chat_template,
    "chat_template_jinja": part_of("chat_template"),
    "chat_template_kwargs": keep("format.chat_template_kwargs", dict),
    "eot_tokens": always("the token that ends a turn is found in the template, and trained"),
    "default_system_message": keep("format.system_message", str),
    "train_on_inputs": lambda draft, key, value: draft.same(
        key, value, format__train_on="all" if is_on(value) else draft.values.get("format.train_on", "assistant")
    ),
    "sequence_len": keep("pack.max_length", whole),
    "excess_length_strategy": _overflow,
    "eval_sequence_len": approach("held-out rows have pack.max_length, too"),
    "min_sample_len": approach("short rows are trained, too"),
    "max_prompt_len": ignore(_RL),
    "sample_packing": _packing,
    "sample_packing_group_size": ignore("all rows are packed at once"),
    "sample_packing_bin_size": ignore("all rows are packed at once"),
    "sample_packing_sequentially": part_of("sample_packing"),
    "sample_packing_mp_start_method": ignore("how processes are started"),
    "sample_packing_eff_est": ignore("rows are packed before the training, so nothing is estimated"),
    "sample_packing_seq_len_multiplier": ignore("a matter of speed"),
    "eval_sample_packing": ignore("the loss per token does not depend on it"),
    "pad_to_sequence_len": ignore("padding is not part of the loss"),
    "pad_to_multiple_of": by_name,
    "curriculum_sampling": lambda draft, key, value: draft.same(
        key, value, train__order="sequential" if is_on(value) else "shuffled"
    ),
    "multipack_real_batches": ignore("rows of a batch do not see each other"),
    "batch_flattening": always("rows are joined instead of padded"),
    "use_pose": refuse("positions are those of the rows"),
    "pose_split_on_token_ids": refuse("positions are those of the rows"),
    "pose_max_context_len": refuse("positions are those of the rows"),
    "pose_num_chunks": refuse("positions are those of the rows"),
    "max_packed_sequence_len": approach("the newer sample_packing", "pack.strategy", lambda value: "bfd"),
    # attention and kernels
    "attn_implementation": attention,
    "flash_attention": _attention_switch("flash_attention_2"),
    "flash_attention_2": _attention_switch("flash_attention_2"),
    "xformers_attention": _attention_switch("xformers"),
    "sdp_attention": _attention_switch("sdpa"),
    "flex_attention": _attention_switch("flex_attention"),
    "sage_attention": _attention_switch("sage"),
    "s2_attention": _attention_switch("s2"),
    "eager_attention": _attention_switch("eager"),
    "flash_optimum": _attention_switch("sdpa"),
    "flex_attn_compile_kwargs": ignore("a matter of speed"),
    "flash_attn_cross_entropy": ignore("the head and the loss are computed together"),
    "flash_attn_rms_norm": ignore(_SPEED),
    "flash_attn_fuse_mlp": ignore(_SPEED),
    "flash_attn_fuse_qkv": ignore(_SPEED),
    "flash_attn_d512": ignore(_SPEED),
    "gemma4_hybrid_attn_impl": ignore("each layer's attention is chosen by what it supports"),
    "large_head_attention": ignore("the attention is chosen by what it supports"),
    "sdpa_varlen": always("documents of a row do not see each other"),
    "fused_attn_kernel": ignore(_SPEED),
    "experts_implementation": ignore(_SPEED),
    "quantize_moe_experts": always("experts are quantized, too, under method: qlora"),
    "scaling_softmax": refuse("attention is that of the model"),
    "scaling_softmax_factor": refuse("attention is that of the model"),
    "scaling_softmax_bias": refuse("attention is that of the model"),
    "chunked_cross_entropy": always("the head and the loss are computed in pieces"),
    "chunked_cross_entropy_num_chunks": ignore("the head and the loss are computed in pieces"),
    "cut_cross_entropy": always("the head and the loss are computed in pieces"),
    "use_eaft": refuse("the loss is nll or dft"),
    "eaft_alpha": refuse("the loss is nll or dft"),
    "eaft_k": refuse("the loss is nll or dft"),
    "tiled_mlp": ignore("a matter of memory; gradient checkpointing is the nearest"),
    "tiled_mlp_num_shards": ignore("a matter of memory"),
    "tiled_mlp_use_original_mlp": ignore("a matter of memory"),
    "llama4_linearized_experts": ignore("experts are adapted as parameters"),
    "plugins": _plugins,
    **dict.fromkeys(
        (
            "liger_rope",
            "liger_rms_norm",
            "liger_rms_norm_gated",
            "liger_layer_norm",
            "liger_swiglu",
            "liger_glu_activation",
            "liger_cross_entropy",
            "liger_fused_linear_cross_entropy",
        ),
        _liger,
    ),
    "liger_use_token_scaling": refuse("the loss is nll or dft"),
    "liger_kernel_impl": ignore(_SPEED),
    "unsloth_cross_entropy_loss": ignore(_SPEED),
    "unsloth_lora_mlp": ignore(_SPEED),
    "unsloth_lora_qkv": ignore(_SPEED),
    "unsloth_lora_o": ignore(_SPEED),
    "unsloth_rms_norm": ignore(_SPEED),
    "unsloth_rope": ignore(_SPEED),
    "use_scattermoe": ignore(_SPEED),
    "use_sonicmoe": ignore(_SPEED),
    "use_dsv4_kernels": ignore(_SPEED),
    "use_glm_dsa_kernels": ignore(_SPEED),
    "moe_grouped_backend": ignore(_SPEED),
    "moe_dequant_chunk_size": ignore(_SPEED),
    "moe_bnb_fast": ignore(_SPEED),
    "expert_backend": ignore(_SPEED),
    "nonexpert_quantization": approach("all linear layers are quantized under method: qlora"),
    "dsv4_fp8_nonexpert_mode": approach("weights are quantized to nf4 or not at all"),
    "dsv4_fp8_lora_kernel": ignore(_SPEED),
    "dsv4_shared_mlp_lora_kernel": ignore(_SPEED),
    "dsv4_bf16_all": ignore("weights have model.dtype"),
    "dsv4_fp4_grouped_mode": ignore(_SPEED),
    "gemma4_fp8_nonexpert": approach("weights are quantized to nf4 or not at all"),
    "gemma4_nf4_nonexpert": always("linear layers are quantized to nf4 under method: qlora"),
    "nvfp4_merge_aware": refuse("weights are quantized to nf4"),
    "nvfp4_merge_aware_start_step": refuse("weights are quantized to nf4"),
    "dense_mixer": refuse("gradients of routers are those of the model"),
    "spectrum_top_fraction": refuse("state the layers in train.parameter_groups"),
    "spectrum_model_name": refuse("state the layers in train.parameter_groups"),
    "grokfast_alpha": refuse("gradients are not filtered"),
    "grokfast_lamb": refuse("gradients are not filtered"),
    "mora": refuse("state another adapter of peft in train.adapter"),
    "hatchery": refuse("training is on this machine or its cluster"),
    # distribution
    "deepspeed": deepspeed,
    "deepcompile": ignore("a matter of speed"),
    "fsdp": fsdp,
    "fsdp_config": fsdp,
    "fsdp_version": fsdp,
    "fsdp_final_state_dict_type": fsdp,
    "dp_shard_size": _shards,
    "dp_replicate_size": _one_only("parameters are sharded over all processes"),
    "sequence_parallel_degree": _one_only("context parallelism is not here; shorten pack.max_length"),
    "context_parallel_size": _one_only("context parallelism is not here; shorten pack.max_length"),
    "heads_k_stride": ignore("an option of context parallelism"),
    "ring_attn_func": ignore("an option of context parallelism"),
    "tensor_parallel_size": _one_only("tensor parallelism is not here; FSDP2 shards the model"),
    "expert_parallel_size": _one_only("expert parallelism is not here; FSDP2 shards the model"),
    "expert_parallel_backend": refuse("expert parallelism is not here"),
    "expert_parallel_num_nvl_bytes": ignore("an option of expert parallelism"),
    "expert_parallel_num_rdma_bytes": ignore("an option of expert parallelism"),
    "expert_parallel_token_capacity": ignore("an option of expert parallelism"),
    "expert_parallel_fallback_on_unsupported": ignore("an option of expert parallelism"),
    "world_size": _world,
    "ddp": ignore("several processes are DDP unless train.launch.engine says otherwise"),
    "use_ray": _ray,
    "ray_num_workers": _world,
    "ray_run_name": ignore("`publish` names the run"),
    "resources_per_worker": ignore("a process has a GPU"),
    # training
    "micro_batch_size": _micro_batch_size,
    "batch_size": _batch_size,
    "eval_batch_size": lambda draft, key, value: argument(draft, key, whole(value), "per_device_eval_batch_size"),
    "num_epochs": keep("train.num_train_epochs", number),
    "max_steps": keep("train.max_steps", whole),
    "warmup_steps": _warmup_steps,
    "optimizer": _optimizer,
    "lr_scheduler": _scheduler,
    "adam_epsilon": keep("train.adam_epsilon", number),
    "adam_eps": keep("train.adam_epsilon", number),
    "adam_epsilon2": refuse("CAME is not here"),
    "adam_beta3": refuse("CAME is not here"),
    "torchdistx_path": ignore("adamw_anyprecision is imported as a package"),
    "embedding_lr": keep("train.embedding_learning_rate", number),
    "embedding_lr_scale": _embedding_scale,
    "lr_groups": _lr_groups,
    "lr_quadratic_warmup": approach("the warm-up is linear"),
    "cosine_min_lr_ratio": part_of("lr_scheduler"),
    "cosine_constant_lr_ratio": _constant_ratio,
    "lr_div_factor": refuse("one_cycle is not here"),
    "log_sweep_min_lr": refuse("`sft sweep` compares rates"),
    "log_sweep_max_lr": refuse("`sft sweep` compares rates"),
    "eta_min": approach("a key of a former schedule; see train.lr_scheduler_kwargs"),
    **{
        name: refuse("Dion is not here")
        for name in ("dion_lr", "dion_momentum", "dion_rank_fraction", "dion_rank_multiple_of")
    },
    **{
        f"qgalore_{name}": refuse("Q-GaLore is not here")
        for name in (
            "rank",
            "update_proj_gap",
            "scale",
            "proj_type",
            "proj_quant",
            "proj_bits",
            "proj_group_size",
            "cos_threshold",
            "gamma_proj",
            "queue_size",
        )
    },
    "noisy_embedding_alpha": keep("train.neftune_noise_alpha", number),
    "torch_compile_options": ignore("a matter of speed"),
    "auto_resume_from_checkpoints": always("an interrupted training goes on from its last checkpoint"),
    "evals_per_epoch": _per_epoch("train__eval_steps"),
    "saves_per_epoch": _per_epoch("train__save_steps"),
    "eval_steps": _eval_steps,
    "save_steps": trainer.steps_of("train.save_steps", "save_strategy"),
    "evaluation_strategy": trainer.strategy_of("train__eval_steps", trainer.NO_HELD_OUT),
    "save_first_step": ignore("checkpoints serve resuming"),
    "early_stopping_patience": trainer.early_stopping,
    "loss_watchdog_threshold": _watchdog,
    "loss_watchdog_patience": _watchdog,
    "gc_steps": ignore("memory is freed by Python"),
    "gc_collect_steps": ignore("memory is freed by Python"),
    "profiler_steps": ignore("the speed is logged"),
    "profiler_steps_start": ignore("the speed is logged"),
    "include_tkps": ignore("the speed is logged"),
    "dynamic_checkpoint": ignore("SIGTERM saves a checkpoint"),
    "trainer_cls": refuse("the trainer is this library's"),
    "strict": ignore("unknown keys are always errors in params.yaml"),
    "debug": ignore("`sft preview` shows the rows"),
    "axolotl_config_path": ignore("the name of the file"),
    "plugins_config": ignore("plugins are not run"),
    "input_transform": refuse("functions of Axolotl are not run"),
    "capabilities": ignore("what the machine can do is found"),
    "env_capabilities": ignore("what the machine can do is found"),
    "loftq_config": _loftq_bits,
    "recipe": refuse("pruning is not here"),
    "save_compressed": refuse("pruning is not here"),
    # evaluation
    "do_causal_lm_eval": ignore("`evaluate` answers the held-out prompts and measures their perplexity"),
    "eval_causal_lm_metrics": approach("state evaluate.task: chrf, bleu, rouge, ...; perplexity is always measured"),
    "eval_table_size": ignore("the report shows answers"),
    "eval_max_new_tokens": keep("evaluate.max_new_tokens", whole),
    "do_bench_eval": approach("state evaluate.lm_eval.tasks: [mmlu]"),
    "bench_dataset": approach("state evaluate.lm_eval.tasks"),
    "bench_split": ignore("evaluate.lm_eval.tasks decides"),
    "bench_source_max_len": ignore("evaluate.lm_eval.tasks decides"),
    "lm_eval_tasks": keep("evaluate.lm_eval.tasks", list),
    "lm_eval_batch_size": keep("evaluate.lm_eval.batch_size", whole),
    "lm_eval_post_train": always("tasks run in the stage `evaluate`"),
    "lm_eval_model": ignore("base, tuned and shipped model are measured"),
    "generate_samples": always("held-out prompts are answered during the training (train.samples)"),
    "num_generation_samples": keep("train.samples.count", whole),
    "generation_max_new_tokens": keep("train.samples.max_new_tokens", whole),
    **{
        f"generation_{name}": ignore("answers are greedy, so that they can be compared")
        for name in ("temperature", "top_p", "top_k", "prompt_ratio", "do_sample")
    },
    # quantization after training
    "qat": refuse("quantization is a stage after the training: quantize.method"),
    "quantization": approach("state quantize.method: gptq, int8 or nf4"),
    "llmcompressor": refuse("pruning is not here"),
    # tracking
    "use_mlflow": always("MLflow has the record"),
    "mlflow_tracking_uri": _mlflow("publish.tracking_uri"),
    "mlflow_experiment_name": _mlflow("publish.experiment"),
    "mlflow_run_name": ignore("`publish` names the run"),
    "hf_mlflow_log_artifacts": ignore("`publish` records the results"),
    **{f"wandb_{name}": ignore(_TRACK) for name in ("name", "run_id", "entity", "watch", "log_model", "mode", "run")},
    "use_wandb": tracker("wandb"),
    "wandb_project": tracker_project("wandb"),
    "use_tensorboard": tracker("tensorboard"),
    "use_trackio": tracker("trackio"),
    "trackio_project_name": tracker_project("trackio"),
    **{
        name: ignore(_TRACK)
        for name in (
            "use_comet",
            "comet_api_key",
            "comet_workspace",
            "comet_project_name",
            "comet_experiment_key",
            "comet_mode",
            "comet_online",
            "comet_experiment_config",
            "trackio_run_name",
            "trackio_space_id",
            "use_otel_metrics",
            "otel_metrics_host",
            "otel_metrics_port",
            "use_swanlab",
            "swanlab_project",
            "swanlab_experiment_name",
            "swanlab_description",
            "swanlab_mode",
            "swanlab_workspace",
            "swanlab_api_key",
            "swanlab_log_model",
            "swanlab_web_host",
            "swanlab_api_host",
            "swanlab_lark_webhook_url",
            "swanlab_lark_secret",
            "swanlab_log_completions",
            "swanlab_completion_log_interval",
            "swanlab_completion_max_buffer",
        )
    },
    **{
        f"gradio_{name}": ignore(_ELSEWHERE)
        for name in ("title", "share", "server_name", "server_port", "max_new_tokens", "temperature")
    },
    # images
    "image_size": approach(
        "the longer side, before the model's processor",
        "load.images.max_side",
        lambda value: int(max(value) if isinstance(value, list) else value),
    ),
    "image_resize_algorithm": ignore("the model's processor resizes"),
    "role_boundaries": always("turns are found by rendering"),
    # other tasks
    **{
        name: ignore(_RL)
        for name in (
            "trl",
            "vllm",
            "center_rewards_coefficient",
            "dpo_use_weighting",
            "dpo_label_smoothing",
            "precompute_ref_log_probs",
            "dpo_use_liger_kernel",
            "dpo_padding_free",
            "dpo_loss_type",
            "dpo_loss_weights",
            "dpo_beta",
            "dpo_use_logits_to_keep",
            "dpo_generate_during_eval",
            "dpo_norm_loss",
            "rpo_alpha",
            "orpo_alpha",
            "simpo_gamma",
            "cpo_alpha",
            "kto_desirable_weight",
            "kto_undesirable_weight",
            "rl_beta",
            "remove_columns",
            "rl",
            "reward_model",
            "process_reward_model",
            "ebft",
        )
    },
    **{
        f"kd_{name}": refuse("distillation is not here")
        for name in (
            "trainer",
            "ce_alpha",
            "alpha",
            "temperature",
            "beta",
            "normalize_topk",
            "online_server_base_url",
            "online_topk",
            "online_server",
            "online_timeout",
            "temperature_min",
        )
    },
    "diffusion": refuse("diffusion language models are not trained"),
    "rope_scaling": refuse("positions are those of the base model's config.json"),
    **{
        f"nemo_gym_{name}": ignore(_RL)
        for name in (
            "enabled",
            "dir",
            "auto_clone",
            "config_paths",
            "head_port",
            "server_timeout",
            "verify_timeout",
            "run_timeout",
            "datasets",
            "auto_start",
            "model_name",
            "multi_turn",
            "max_turns",
        )
    },
}
"""Key of an Axolotl configuration -> what becomes of it."""


def finish(draft: Draft) -> None:
    """Make the values agree after all keys have been read."""
    if draft.is_on("train_on_inputs"):
        draft.values["format.train_on"] = "all"
    if draft.values.get("train.method") == "qlora":
        draft.values.setdefault("model.dtype", "bfloat16")
    agree(draft)
