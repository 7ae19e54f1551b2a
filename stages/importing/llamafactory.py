"""What becomes of each key of a LLaMA-Factory configuration.

Source: its argument classes (`llamafactory/hparams/`, 0.9.5 and the main branch of 2026) and the code that reads them.
Its data sets and templates are in `llamafactory_data.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.importing import trainer
from stages.importing.draft import (
    Draft,
    Rule,
    always,
    apply_rules,
    approach,
    argument,
    finish,
    ignore,
    is_on,
    keep,
    part_of,
    refuse,
)
from stages.importing.llamafactory_data import (
    cutoff,
    dataset_names,
    default_system,
    eval_names,
    held_out,
    mixture,
    own_template,
    packing,
    read_infos,
    template,
)
from stages.importing.trainer import fsdp, number, whole

DEFAULTS: dict[str, Any] = {
    **trainer.DEFAULTS,
    **trainer.ROWS_AS_THERE,
    "train.method": "lora",
    "train.lora_r": 8,
    "train.lora_alpha": 16,
    "train.lora_dropout": 0.0,
    "train.lora_target_modules": "all-linear",
    "train.gradient_checkpointing": True,
    "pack.max_length": 2048,
    "pack.strategy": "none",
    "pack.overflow": "truncate",
}
"""Values of LLaMA-Factory for what a configuration does not state."""


def fill(draft: Draft, file: Path, info: Path | None) -> None:
    """Read all keys.

    Args:
        draft: The import.
        file: The configuration, beside which `dataset_dir` may lie.
        info: dataset_info.json; None = in `dataset_dir`.

    Raises:
        ValueError: It is not of supervised fine-tuning, or names no data.
    """
    stage = draft.get("stage", default="sft")
    if stage != "sft":
        raise ValueError(f"stage: {stage!r} is not supervised fine-tuning (sft), which alone this pipeline does")
    infos = read_infos(draft, file, info)
    rules = {**RULES, "dataset": lambda one, key, value: dataset_names(one, key, value, infos)}
    rules["eval_dataset"] = lambda one, key, value: eval_names(one, key, value, infos)
    if draft.get("dataset") is None and draft.is_on("do_predict") and draft.get("eval_dataset"):
        draft.hints.append("do_predict without training: the pipeline trains, then `evaluate` answers the prompts")
        rules["eval_dataset"] = rules["dataset"]
    apply_rules(draft, rules)
    if not draft.is_on("template"):
        draft.hints.append("no template is stated: the model's own is used")
    alpha = draft.get("lora_rank", default=8)
    if draft.get("lora_alpha") is None:
        draft.values["train.lora_alpha"] = 2 * whole(alpha)
    own_template(draft)
    _dtype(draft)
    finish(draft)


def _dtype(draft: Draft) -> None:
    """Set the base model's precision: trained weights are float32 unless pure_bf16, others that of the products."""
    half = "bfloat16" if draft.is_on("bf16", "pure_bf16") else "float16" if draft.is_on("fp16") else "float32"
    full = draft.values.get("train.method") == "full"
    draft.values["model.dtype"] = half if not full or draft.is_on("pure_bf16") else "float32"


def _finetuning(draft: Draft, key: str, value: Any) -> None:
    if value == "lora":
        quantized = whole(draft.get("quantization_bit", default=16)) == 4
        draft.same(key, value, train__method="qlora" if quantized else "lora")
    elif value == "full":
        draft.same(key, value, train__method="full")
    elif value == "freeze":
        _freeze(draft, key, value)
    elif value == "oft":
        options: dict[str, Any] = {"type": "OFT"}
        if draft.get("oft_block_size", default=32):
            options["oft_block_size"] = whole(draft.get("oft_block_size", default=32))
        if whole(draft.get("oft_rank", default=0)):
            options |= {"r": whole(draft.get("oft_rank")), "oft_block_size": 0}
        target = draft.get("oft_target", default="all")
        options["target_modules"] = "all-linear" if target == "all" else _names(target)
        if number(draft.get("module_dropout", default=0)):
            options["module_dropout"] = number(draft.get("module_dropout"))
        quantized = whole(draft.get("quantization_bit", default=16)) == 4
        draft.same(key, value, train__method="qlora" if quantized else "lora", train__adapter=options)
    else:
        draft.unsupported(key, value, "lora, full, freeze and oft are here")


def _freeze(draft: Draft, key: str, value: Any) -> None:
    """All but the last layers are frozen; their number is known only with the model's configuration."""
    count = whole(draft.get("freeze_trainable_layers", default=2))
    note = (
        f"all weights are trained; to freeze all but {abs(count)} layers, state their numbers in "
        "train.parameter_groups, e.g. [{pattern: '^(?!.*layers[.](30|31)[.])', frozen: true}]"
    )
    draft.nearest(key, value, note, train__method="full")


def _names(value: Any) -> list[str]:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else [str(name) for name in value]


def _lora_target(draft: Draft, key: str, value: Any) -> None:
    if value == "all" or _names(value) == ["all"]:
        draft.same(key, value, train__lora_target_modules="all-linear")
    else:
        draft.same(key, value, train__lora_target_modules=_names(value))


def _bits(draft: Draft, key: str, value: Any) -> None:
    method = str(draft.get("quantization_method", default="bnb")).lower()
    if whole(value) == 4 and method in ("bnb", "bitsandbytes"):
        draft.same(key, value, train__method="qlora")
    elif whole(value) == 8:
        draft.nearest(key, value, "the base is in 16 bits, which is more exact and takes twice the memory")
    else:
        draft.nearest(key, value, "4 bits of bitsandbytes", train__method="qlora")


def _method(draft: Draft, key: str, value: Any) -> None:
    if str(value).lower() in ("bnb", "bitsandbytes"):
        draft.same(key, value)
    else:
        draft.nearest(key, value, "bitsandbytes")


def _double(draft: Draft, key: str, value: Any) -> None:
    if draft.get("quantization_bit") is None:
        draft.irrelevant(key, value, "nothing is quantized")
    elif is_on(value):
        draft.same(key, value, "as here")
    else:
        draft.nearest(key, value, "constants are quantized, too, which saves 0.4 bits per weight")


def _quantization_type(draft: Draft, key: str, value: Any) -> None:
    (draft.same if value == "nf4" else draft.nearest)(key, value, "nf4")


ATTENTION = {
    "auto": "auto",
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "flex": "flex_attention",
}


def _attention(draft: Draft, key: str, value: Any) -> None:
    name = ATTENTION.get("disabled" if value is False else str(value))
    if name is None:
        draft.nearest(key, value, "chosen by model and device", model__attn_implementation="auto")
    else:
        draft.same(key, value, model__attn_implementation=name)


def _no_checkpointing(draft: Draft, key: str, value: Any) -> None:
    draft.same(key, value, train__gradient_checkpointing=not is_on(value))


def _checkpointing(draft: Draft, key: str, value: Any) -> None:
    if "disable_gradient_checkpointing" in draft.source:
        draft.irrelevant(key, value, "disable_gradient_checkpointing decides")
    else:
        draft.same(key, value, train__gradient_checkpointing=is_on(value))


def _reentrant(draft: Draft, key: str, value: Any) -> None:
    if draft.is_on("disable_gradient_checkpointing"):
        draft.irrelevant(key, value, "no activations are computed again")
    else:
        draft.irrelevant(key, value, "both ways compute the same")


def _pissa(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        draft.same(key, value, "off, as here")
        return
    rounds = whole(draft.get("pissa_iter", default=16))
    start = "pissa" if rounds < 0 else f"pissa_niter_{rounds}"
    draft.same(key, value, train__init_lora_weights=start)


def _loraplus_embedding(draft: Draft, key: str, value: Any) -> None:
    if draft.get("loraplus_lr_ratio"):
        draft.nearest(key, value, "embeddings have the rate of LoRA's second matrices")
    else:
        draft.irrelevant(key, value, "loraplus_lr_ratio is not set")


def _low_rank(name: str) -> Rule:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if not is_on(value):
            draft.same(key, value, "off, as here")
            return
        default_rank, default_scale = 16, 2.0 if name == "galore" else 32.0
        options: dict[str, Any] = {
            "rank": whole(draft.get(f"{name}_rank", default=default_rank)),
            "update_proj_gap": whole(draft.get(f"{name}_update_interval", default=200)),
            "scale": number(draft.get(f"{name}_scale", default=default_scale)),
            "proj_type": str(draft.get(f"{name}_proj_type", default="std")),
        }
        if name == "apollo":
            options["proj"] = str(draft.get("apollo_proj", default="random"))
            options["scale_type"] = str(draft.get("apollo_scale_type", default="channel"))
        draft.same(key, value, train__optim=f"{name}_adamw", train__optim_args=options)
        target = draft.get(f"{name}_target", default="all")
        targets = [r".*(attn|attention|mlp).*"] if target in ("all", ["all"]) else _names(target)
        draft.values["train.arguments"] = {**draft.values.get("train.arguments", {}), "optim_target_modules": targets}

    return rule


def _layerwise(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.nearest(key, value, "not layerwise, which needs memory for all gradients, and can be resumed")
    else:
        draft.same(key, value, "off, as here")


def _muon(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.same(key, value, train__optim="muon")
    else:
        draft.same(key, value, "off")


def _dft(draft: Draft, key: str, value: Any) -> None:
    draft.same(key, value, train__loss_type="dft" if is_on(value) else "nll")


def _aux(draft: Draft, key: str, value: Any) -> None:
    draft.same(key, value, train__router_aux_loss_coef=number(value))


def _pure(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.same(key, value, "weights in bfloat16", train__mixed_precision="no", model__dtype="bfloat16")
    else:
        draft.same(key, value, "off")


def _processes(draft: Draft, key: str, value: Any) -> None:
    draft.processes = max(draft.processes, whole(value))
    if draft.processes > 1:
        draft.same(key, value, train__launch__processes=draft.processes, train__launch__launcher="ray")
    else:
        draft.same(key, value, "one, as here")


def _frozen(part: str) -> Rule:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if part == "language":
            refuse("state the language model's parameters as frozen in train.parameter_groups")(draft, key, value)
        elif is_on(value):
            draft.values["train.parameter_groups"] = (
                [
                    *draft.values.get("train.parameter_groups", []),
                    {"pattern": VISION[part], "frozen": True},
                ]
                if draft.get("finetuning_type") == "full"
                else draft.values.get("train.parameter_groups", [])
            )
            if draft.get("finetuning_type") == "full":
                draft.same(key, value, "train.parameter_groups")
            else:
                draft.values["train.exclude_modules"] = sorted(
                    {*draft.values.get("train.exclude_modules", []), *VISION_MODULES[part]}
                )
                draft.same(key, value, "train.exclude_modules")
        else:
            draft.same(key, value, "trained")

    return rule


VISION = {
    "tower": r"(visual\.(?!merger)|vision_tower|vision_model|image_newline)",
    "projector": r"(multi_modal_projector|visual\.merger|mm_projector)",
}
VISION_MODULES = {"tower": ["visual", "vision_tower", "vision_model"], "projector": ["multi_modal_projector", "merger"]}


def _pixels(draft: Draft, key: str, value: Any) -> None:
    side = int(whole(value) ** 0.5)
    draft.nearest(key, value, "as the longer side instead of the area", load__images__max_side=side)


def _video(draft: Draft, key: str, value: Any) -> None:
    draft.irrelevant(key, value, "rows with videos and audio are dropped")


def _early(draft: Draft, key: str, value: Any) -> None:
    trainer.early_stopping(draft, key, value)


def _split_special(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.nearest(key, value, "special tokens in messages are read as text", format__special_text="neutralise")
    else:
        draft.same(key, value, "off")


def _tokens(draft: Draft, key: str, value: Any) -> None:
    tokens = _names(value)
    draft.same(key, value, format__add_special_tokens=[*draft.values.get("format.add_special_tokens", []), *tokens])


def _hub_token(draft: Draft, key: str, value: Any) -> None:
    draft.irrelevant(key, value, "state it in the environment variable HF_TOKEN")


_GEN = "answers are greedy, so that they can be compared"
_SPEED = "a matter of speed"
_RL = "an option of preference or reinforcement learning"
_EXPORT = "an option of another command; here the stages `merge` and `quantize` export"
_SERVE = "an option of its server; here `sft serve`"
_MCA = "an option of Megatron; here FSDP2 shards the model"
_KT = "an option of KTransformers, which keeps experts on the CPU; here engines offload weights"
_EVAL_TASK = "an option of another command; see evaluate.lm_eval"

RULES: dict[str, Rule] = {
    **trainer.trainer_rules(),
    # model
    "model_name_or_path": keep("model.name_or_path", str),
    "model_revision": keep("model.revision", str),
    "trust_remote_code": keep("model.trust_remote_code", is_on),
    "adapter_name_or_path": refuse("a training starts from the base model; merge the adapter first"),
    "adapter_folder": refuse("a training starts from the base model; merge the adapter first"),
    "create_new_adapter": refuse("a training starts from the base model; merge the adapter first"),
    "cache_dir": ignore("HF_HOME says where models are kept"),
    "use_fast_tokenizer": ignore("fast tokenizers are used"),
    "resize_vocab": always("new tokens get embeddings"),
    "split_special_tokens": _split_special,
    "add_tokens": _tokens,
    "add_special_tokens": _tokens,
    "new_special_tokens_config": approach("new tokens begin as the mean of the others"),
    "init_special_tokens": ignore("new tokens begin as the mean of the others, nearly as with noise"),
    "low_cpu_mem_usage": ignore("weights are always read so"),
    "rope_scaling": refuse("positions are those of the base model's config.json"),
    "flash_attn": _attention,
    "shift_attn": refuse("attention is that of the model"),
    "block_diag_attn": always("documents of a row do not see each other"),
    "mixture_of_depths": refuse("the model's layers stay as they are"),
    "use_unsloth": ignore(f"{_SPEED}; layers are fused where that gives the same result"),
    "use_unsloth_gc": ignore(_SPEED),
    "enable_liger_kernel": keep("train.use_liger_kernel", is_on),
    "use_v1_kernels": ignore(_SPEED),
    "moe_aux_loss_coef": _aux,
    "disable_gradient_checkpointing": _no_checkpointing,
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs": _reentrant,
    "use_reentrant_gc": _reentrant,
    "upcast_layernorm": ignore("norms are computed in float32"),
    "upcast_lmhead_output": always("the loss is computed in float32"),
    "train_from_scratch": refuse("a training starts from the weights of the base model"),
    "infer_backend": ignore(_SERVE),
    "offload_folder": ignore(_SERVE),
    "use_kv_cache": ignore(_SERVE),
    "infer_dtype": ignore(_SERVE),
    "hf_hub_token": _hub_token,
    "ms_hub_token": refuse("models come from the Hugging Face hub or a folder"),
    "om_hub_token": refuse("models come from the Hugging Face hub or a folder"),
    "print_param_status": ignore("the log has the numbers of parameters"),
    "compute_dtype": ignore("bf16 and fp16 decide"),
    "device_map": ignore("each process has its device"),
    "model_max_length": ignore("cutoff_len decides"),
    "quantization_bit": _bits,
    "quantization_method": _method,
    "quantization_type": _quantization_type,
    "double_quantization": _double,
    "quantization_device_map": ignore("each process has its device"),
    # adapters and methods
    "stage": always("supervised fine-tuning"),
    "finetuning_type": _finetuning,
    "lora_rank": keep("train.lora_r", whole),
    "lora_alpha": keep("train.lora_alpha", whole),
    "lora_dropout": keep("train.lora_dropout", number),
    "lora_target": _lora_target,
    "additional_target": keep("train.modules_to_save", _names),
    "loraplus_lr_ratio": keep("train.loraplus_lr_ratio", number),
    "loraplus_lr_embedding": _loraplus_embedding,
    "use_rslora": keep("train.use_rslora", is_on),
    "use_dora": keep("train.use_dora", is_on),
    "pissa_init": _pissa,
    "pissa_iter": part_of("pissa_init"),
    "pissa_convert": ignore("what is shipped is the merged model"),
    "module_dropout": part_of("finetuning_type"),
    "oft_rank": part_of("finetuning_type"),
    "oft_block_size": part_of("finetuning_type"),
    "oft_target": part_of("finetuning_type"),
    "freeze_trainable_layers": part_of("finetuning_type"),
    "freeze_trainable_modules": part_of("finetuning_type"),
    "freeze_extra_modules": part_of("finetuning_type"),
    "use_llama_pro": refuse("the model's layers stay as they are"),
    "freeze_vision_tower": _frozen("tower"),
    "freeze_multi_modal_projector": _frozen("projector"),
    "freeze_language_model": _frozen("language"),
    "pure_bf16": _pure,
    "use_galore": _low_rank("galore"),
    **{f"galore_{name}": part_of("use_galore") for name in ("target", "rank", "update_interval", "scale", "proj_type")},
    "galore_layerwise": _layerwise,
    "use_apollo": _low_rank("apollo"),
    **{
        f"apollo_{name}": part_of("use_apollo")
        for name in ("target", "rank", "update_interval", "scale", "proj", "proj_type", "scale_type")
    },
    "apollo_layerwise": _layerwise,
    "apollo_scale_front": approach("the limiter is behind the scaling"),
    "use_badam": refuse("the trained blocks do not change during a training"),
    **{
        f"badam_{name}": refuse("BAdam is not here")
        for name in ("mode", "start_block", "switch_mode", "switch_interval", "update_ratio", "mask_mode", "verbose")
    },
    "use_adam_mini": approach(
        "AdamW with 8-bit state, which needs less memory, too", "train.optim", lambda value: "adamw_bnb_8bit"
    ),
    "use_muon": _muon,
    "use_dft_loss": _dft,
    "use_asft_loss": approach("dft, without the divergence from the base", "train.loss_type", lambda value: "dft"),
    "asft_alpha": refuse("the loss is nll or dft"),
    "use_eaft_loss": refuse("the loss is nll or dft"),
    "eaft_alpha": refuse("the loss is nll or dft"),
    "compute_accuracy": always("the accuracy of tokens is measured"),
    "disable_shuffling": lambda draft, key, value: draft.same(
        key, value, train__order="sequential" if is_on(value) else "shuffled"
    ),
    "early_stopping_steps": _early,
    "plot_loss": always("reports/report.html has the curve"),
    "include_effective_tokens_per_second": ignore("the speed is logged"),
    "use_mca": refuse(_MCA),
    "use_hyper_parallel": refuse(_MCA),
    "hyper_parallel_args": refuse(_MCA),
    # data
    "template": template,
    "dataset_dir": part_of("dataset"),
    "media_dir": approach("images lie in data/, beside the file that names them"),
    "cutoff_len": cutoff,
    "train_on_prompt": lambda draft, key, value: draft.same(
        key, value, format__train_on="all" if is_on(value) else "assistant"
    ),
    "mask_history": lambda draft, key, value: draft.same(
        key, value, format__train_on="last_assistant" if is_on(value) else "assistant"
    ),
    "streaming": part_of("dataset"),
    "buffer_size": ignore("rows of a stream are packed and shuffled as a whole"),
    "mix_strategy": mixture,
    "interleave_probs": part_of("dataset"),
    "overwrite_cache": ignore("DVC knows what is up to date"),
    "preprocessing_batch_size": ignore("it does not change the rows"),
    "preprocessing_num_workers": ignore("format.num_proc and pack.num_proc do not change the rows"),
    "max_samples": part_of("dataset"),
    "eval_num_beams": ignore(_GEN),
    "ignore_pad_token_for_loss": always("padding is not part of the loss"),
    "val_size": held_out,
    "eval_on_each_dataset": approach("held-out rows are scored together"),
    "packing": packing,
    "neat_packing": packing,
    "tool_format": approach("tools are printed by the model's own template"),
    "default_system": default_system,
    "enable_thinking": part_of("template"),
    "preserve_thinking": part_of("template"),
    "tokenized_path": ignore("outs/pack has the tokenized rows"),
    "data_shared_file_system": ignore("DVC knows what is up to date"),
    # images
    "image_max_pixels": _pixels,
    "image_min_pixels": ignore("the model's processor enlarges small images"),
    "image_do_pan_and_scan": approach("the model's processor decides"),
    "crop_to_patches": approach("the model's processor decides"),
    **dict.fromkeys(
        (
            "video_max_pixels",
            "video_min_pixels",
            "video_fps",
            "video_maxlen",
            "use_audio_in_video",
            "audio_sampling_rate",
        ),
        _video,
    ),
    # other commands
    **{
        name: ignore(_EXPORT)
        for name in (
            "export_dir",
            "export_size",
            "export_device",
            "export_quantization_bit",
            "export_quantization_dataset",
            "export_quantization_nsamples",
            "export_quantization_maxlen",
            "export_legacy_format",
            "export_hub_model_id",
        )
    },
    **{
        name: ignore(_SERVE)
        for name in (
            "vllm_maxlen",
            "vllm_gpu_util",
            "vllm_enforce_eager",
            "vllm_max_lora_rank",
            "vllm_config",
            "sglang_maxlen",
            "sglang_mem_fraction",
            "sglang_tp_size",
            "sglang_config",
            "sglang_lora_backend",
        )
    },
    **{
        name: refuse(_KT)
        for name in (
            "use_kt",
            "kt_weight_path",
            "kt_expert_checkpoint_path",
            "kt_use_lora_experts",
            "kt_lora_expert_num",
            "kt_lora_expert_intermediate_size",
            "kt_config",
            "kt_cpu_activation",
            "kt_non_expert_weight_path",
            "kt_maxlen",
            "kt_use_cuda_graph",
            "kt_mode",
            "kt_force_think",
            "kt_optimize_rule",
            "cpu_infer",
            "chunk_size",
        )
    },
    **{
        name: ignore(_RL)
        for name in (
            "pref_beta",
            "pref_ftx",
            "pref_bco_weight",
            "pref_loss",
            "dpo_label_smoothing",
            "kto_chosen_weight",
            "kto_rejected_weight",
            "simpo_gamma",
            "ppo_buffer_size",
            "ppo_epochs",
            "ppo_score_norm",
            "ppo_target",
            "ppo_whiten_rewards",
            "ref_model",
            "ref_model_adapters",
            "ref_model_quantization_bit",
            "reward_model",
            "reward_model_adapters",
            "reward_model_quantization_bit",
            "reward_model_type",
            "ld_alpha",
        )
    },
    **{
        name: ignore(_GEN)
        for name in (
            "do_sample",
            "temperature",
            "top_p",
            "top_k",
            "num_beams",
            "repetition_penalty",
            "length_penalty",
            "skip_special_tokens",
            "max_length",
        )
    },
    "max_new_tokens": keep("evaluate.max_new_tokens", whole),
    **{
        name: ignore(_EVAL_TASK)
        for name in ("task", "task_dir", "batch_size", "lang", "n_shot", "save_dir", "download_mode")
    },
    # tracking and machines
    "use_swanlab": ignore("MLflow has the record"),
    **{
        f"swanlab_{name}": ignore("MLflow has the record")
        for name in ("project", "workspace", "run_name", "mode", "api_key", "logdir", "lark_webhook_url", "lark_secret")
    },
    "ray_num_workers": _processes,
    "ray_run_name": ignore("`publish` names the run"),
    "ray_storage_path": ignore("checkpoints lie in .state/"),
    "ray_storage_filesystem": ignore("checkpoints lie in .state/"),
    "resources_per_worker": ignore("a process has a GPU"),
    "placement_strategy": ignore("Ray places the processes"),
    "ray_init_kwargs": ignore("state train.launch.address or RAY_ADDRESS"),
    "master_addr": ignore("state train.launch.address or MASTER_ADDR"),
    "master_port": ignore("state train.launch.port"),
    "enable_torch_profiler": ignore("the speed is logged"),
    **{
        f"profiler_{name}": ignore("the speed is logged")
        for name in (
            "output_dir",
            "wait_steps",
            "warmup_steps",
            "active_steps",
            "repeat",
            "record_shapes",
            "profile_memory",
            "with_stack",
        )
    },
    "profile_modules": ignore("the speed is logged"),
    "fp8": refuse("bf16 instead"),
    "fp8_backend": refuse("bf16 instead"),
    "fp8_enable_fsdp_float8_all_gather": refuse("bf16 instead"),
    "fsdp": fsdp,
    "fsdp_config": fsdp,
    "fsdp_transformer_layer_cls_to_wrap": fsdp,
    "bf16": trainer.precision,
    "per_device_eval_batch_size": lambda draft, key, value: argument(draft, key, whole(value), key),
    **{
        name: refuse(_MCA)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "context_parallel_size",
            "sequence_parallel",
            "virtual_pipeline_model_parallel_size",
            "expert_tensor_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
        )
    },
    **{
        name: ignore(_MCA)
        for name in (
            "bias_activation_fusion",
            "apply_rope_fusion",
            "use_distributed_optimizer",
            "overlap_param_gather",
            "overlap_grad_reduce",
            "moe_grouped_gemm",
            "moe_token_dispatcher_type",
            "recompute_granularity",
            "recompute_method",
            "recompute_num_layers",
            "variable_seq_lengths",
            "attention_backend",
            "cross_entropy_loss_fusion",
            "moe_router_dtype",
            "moe_permute_fusion",
            "gradient_accumulation_fusion",
        )
    },
}
"""Key of a LLaMA-Factory configuration -> what becomes of it."""
