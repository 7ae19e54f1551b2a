"""`train`: packed rows and the base model -> an adapter or full weights."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import load_from_disk
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from sft.chat.formats import resize_embeddings
from sft.config import ModelConfig, SFTConfig
from sft.models.adapters import count_parameters, get_peft_config
from sft.models.kbit import get_quantization_config
from sft.models.loading import load_model, save_tokenizer
from sft.train.bad_updates import BAD_UPDATE
from sft.train.trainer import SFTTrainer
from stages.checkout.artifacts import file_digest, progress, read_json, write_json, write_jsonl, write_text
from stages.checkout.ledger import replacing_folder
from stages.checkout.paths import Paths
from stages.launch.processes import launch, needs_launcher
from stages.models.base import read_base_model
from stages.params.schema import ModelSection, Params, TrainSection
from stages.training.checkpoints import SealCheckpoints, TrainingState, explaining_full_disk
from stages.training.curve import MEMORY_TAG, LiveCurve, live_run
from stages.training.out_of_memory import OutOfMemory, figures, fitted, history, make_smaller
from stages.training.throughput import Throughput

if TYPE_CHECKING:
    from stages.tracking.live_run import LiveRun

CURVE_COLUMNS = (
    "step",
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "mean_token_accuracy",
    "eval_mean_token_accuracy",
    "num_input_tokens_seen",
)


def run(params: Params, paths: Paths) -> None:
    """Write outs/train/model, the curve and the figures; resume from .state when an earlier run was cut short."""
    if not needs_launcher(params.train.launch):
        train(params, paths)
        return
    while True:
        try:
            launch("train", params.train.launch, paths)
            return
        except OutOfMemory as error:
            problem = str(error)
        make_smaller(params.train, TrainingState.of(params, paths), problem)


def train(params: Params, paths: Paths) -> None:
    """Train in this process, perhaps as one of several; the first one alone writes."""
    state = TrainingState.of(params, paths)
    first_process = make_sft_config(params.train, state.folder).process_index == 0  # joins the other processes
    with live_run(params, paths, state, first_process) as live:
        while (problem := attempt(params, paths, state, live)) is not None:
            make_smaller(params.train, state, problem)
            clear_device_cache(garbage_collection=True)
            if live is not None:
                live.tag(MEMORY_TAG, history(state))
    if first_process:
        state.mark_finished()
    PartialState().destroy_process_group()


def attempt(params: Params, paths: Paths, state: TrainingState, live: LiveRun | None) -> str | None:
    """Train to the end and write the results; returns where memory did not suffice, None when it did.

    Raises:
        OutOfMemory: The same, in one of several processes: the others wait for it, and all have to begin anew.
    """
    section = fitted(params.train, state)
    config = make_sft_config(section, state.folder)
    checkpoint = agree_on_checkpoint(params, paths, config)
    throughput = Throughput(state.folder / "throughput.csv")
    recorders = [throughput, *([] if live is None else [LiveCurve(live, CURVE_COLUMNS)])]
    try:
        trainer = make_trainer(params, paths, config, recorders)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory before the first step: model and adapter alone are too large ({error}); try a smaller "
            "train.lora_r, train.method: qlora, model.dtype: bfloat16, or more devices with train.launch.engine: fsdp2"
        ) from None
    started = time.monotonic()
    try:
        with explaining_full_disk(state):
            trainer.train(resume_from_checkpoint=checkpoint)
        last = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
        if not any("eval_loss" in entry for entry in last):
            trainer.evaluate()  # the last step fell between two evaluations
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        rows = section.per_device_train_batch_size
        problem = f"out of memory in step {trainer.state.global_step + 1} with {rows} rows a forward pass"
        if config.world_size > 1:
            raise OutOfMemory(problem) from None
        return problem
    save_results(trainer, paths, figures(params.train, state))
    if trainer.is_world_process_zero():
        write_timings(paths, time.monotonic() - started, trainer.state.num_input_tokens_seen, throughput)
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory, or the processor's, did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def make_trainer(params: Params, paths: Paths, config: SFTConfig, recorders: list[TrainerCallback]) -> SFTTrainer:
    """Model, rows and callbacks together."""
    tokenizer = AutoTokenizer.from_pretrained(paths.out("format", "tokenizer"))
    model_config = make_model_config(params)
    trainer = SFTTrainer(
        load_base(params.model, model_config, tokenizer, paths),
        args=config,
        train_dataset=load_from_disk(str(paths.out("pack", "train"))),
        eval_dataset=load_from_disk(str(paths.out("pack", "eval"))),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[LogLastStep(), ProgressLines(), SealCheckpoints(), *recorders],
    )
    trainer.remove_callback(PrinterCallback)  # `ProgressLines` says it more briefly
    return trainer


def agree_on_checkpoint(params: Params, paths: Paths, config: SFTConfig) -> str | None:
    """The checkpoint to go on from: found, and the folder tidied up, by the first process, which tells the others."""
    found: list[str | None] = [None]
    if config.process_index == 0:
        checkpoint = TrainingState.open(params, paths).last_checkpoint()
        if checkpoint is not None:
            print(f"resuming from {checkpoint.name}", flush=True)
            found = [str(checkpoint)]
    broadcast_object_list(found)
    return found[0]


def make_model_config(params: Params) -> ModelConfig:
    """The base model and the adapter, as the library's options."""
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
        load_in_4bit=section.method == "qlora",
        use_bnb_nested_quant=section.method == "qlora",
    )


def load_base(
    section: ModelSection, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, paths: Paths
) -> PreTrainedModel:
    """Load the base model that `load` recorded, with rows for every token of the tokenizer."""
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
    """The section as the library's options; checkpoints go to `folder`."""
    return SFTConfig(
        output_dir=str(folder),
        learning_rate=section.learning_rate,
        num_train_epochs=section.num_train_epochs,
        max_steps=section.max_steps,
        per_device_train_batch_size=section.per_device_train_batch_size,
        per_device_eval_batch_size=section.per_device_train_batch_size,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        lr_scheduler_type=section.lr_scheduler_type,
        warmup_steps=section.warmup_ratio,
        weight_decay=section.weight_decay,
        adam_beta2=section.adam_beta2,
        max_grad_norm=section.max_grad_norm,
        neftune_noise_alpha=section.neftune_noise_alpha,
        loss_type=section.loss_type,
        gradient_checkpointing=section.gradient_checkpointing,
        use_liger_kernel=section.use_liger_kernel,
        on_bad_loss=section.on_bad_loss,
        bad_loss_factor=section.bad_loss_factor,
        logging_steps=section.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=section.eval_steps,
        save_strategy="steps",
        save_steps=section.save_steps,
        save_total_limit=2,
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=[],
        disable_tqdm=True,
        seed=section.seed,
    )


class LogLastStep(TrainerCallback):
    """Takes the figures of the last step, whatever `logging_steps` is: a short training would have none."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for them."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class ProgressLines(TrainerCallback):
    """A progress line at every point of the curve, with the loss and the time left."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; a resumed training does not begin at step 0."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        progress(state.global_step, state.max_steps, "training")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Say where training is."""
        if not state.is_world_process_zero or not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step) if done else math.nan
        figures = " ".join(f"{name} {logs[name]:.4f}" for name in ("loss", "eval_loss") if name in logs)
        progress(state.global_step, state.max_steps, f"{figures}, {left:.0f} s left")


def save_results(trainer: SFTTrainer, paths: Paths, more: dict[str, Any]) -> None:
    """Write the model, the curve, and the figures that are the same at every run; times go to a file of their own.

    Args:
        trainer: At the end of its training.
        paths: The checkout.
        more: Figures that it does not know.

    Raises:
        ValueError: The loss is not a number any more.
    """
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not losses or not math.isfinite(losses[-1]):
        last = losses[-1] if losses else "nothing"
        raise ValueError(f"training ended with loss {last}; lower train.learning_rate, or look at the data")
    save_trained_model(trainer, paths.out("train", "model"))
    if not trainer.is_world_process_zero():
        return
    write_text(paths.out("train", "curve.csv"), curve_csv(history))
    bad_updates = [entry for entry in history if BAD_UPDATE in entry]
    write_jsonl(paths.out("train", "bad_updates.jsonl"), bad_updates)
    counts = count_parameters(trainer.model)
    metrics = {
        "loss": losses[-1],
        "eval_loss": next(entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "trainable_parameters": counts.num_trainable,
        "parameters": counts.num_total,
        "bad_updates": len(bad_updates),
        **more,
    }
    write_json(paths.metrics("train"), metrics)


def write_timings(paths: Paths, seconds: float, num_tokens: int, throughput: Throughput) -> None:
    """Write times; with the digest of the curve, as the file stays when DVC restores another training."""
    timings = {
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "curve_sha256": file_digest(paths.out("train", "curve.csv")),
        "throughput": throughput.points,
    }
    write_json(paths.timings("train"), timings)


def save_trained_model(trainer: SFTTrainer, target: Path) -> None:
    """Write the whole model or adapter: every process gives its part, the first one writes."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if not trainer.is_world_process_zero():
        trainer.save_model(str(target))
        return
    with replacing_folder(target) as folder:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that holds this machine's paths
        save_tokenizer(trainer.processing_class, folder)


def curve_csv(history: list[dict[str, Any]]) -> str:
    """The log as CSV, one row a step, empty where a figure was not taken at that step."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        steps.setdefault(entry["step"], {}).update(entry)
    file = io.StringIO()
    writer = csv.DictWriter(file, CURVE_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps[step] for step in sorted(steps) if {"loss", "eval_loss"} & set(steps[step]))
    return file.getvalue()
