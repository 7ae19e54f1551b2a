"""Stage `train`: packed rows and the base model to an adapter or full weights."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import load_from_disk

from sft.config import SFTConfig
from sft.folders import replacing_folder
from sft.models.adapters import count_parameters
from sft.models.checkpoint import copy_processor_files, save_tokenizer
from sft.models.weight_kinds import weight_shares
from sft.train.bad_updates import BAD_UPDATE
from sft.train.trainer import SFTTrainer
from stages.checkout.artifacts import file_digest, write_json, write_jsonl, write_text
from stages.checkout.paths import Paths
from stages.launch.lock import sole_training
from stages.launch.processes import (
    check_num_processes,
    in_launched_process,
    is_launched_by_stage,
    launch,
    needs_launcher,
)
from stages.launch.stopping import SavedAndStopped, delaying_sigterm, grace_s
from stages.models.base import name_base
from stages.params.schema import Params
from stages.progress import stage_progress
from stages.streaming.dataset import KeepPlace, StreamedRows, beginning_at_place
from stages.streaming.recipe import Recipe
from stages.tracking.trackers import check_trackers
from stages.training.checkpoints import SEAL, TrainingState, explaining_full_disk, what_is_wrong
from stages.training.curve import (
    MEMORY_TAG,
    ROUTER_COLUMNS,
    LiveCurve,
    Throughput,
    TrainingProgress,
    curve_csv,
    live_run,
    open_trackers,
    sample_columns,
    source_columns,
)
from stages.training.effect import effect_record
from stages.training.interruption import SaveAndStop
from stages.training.out_of_memory import OutOfMemory, describe_events, make_smaller, memory_figures, section_that_fits
from stages.training.samples import SamplePrompts, Samples, samples_by_prompt
from stages.training.selection import KeepBest, best_folder, is_exhausted, missing_best, selection_record
from stages.training.setup import make_sft_config, make_trainer

if TYPE_CHECKING:
    from stages.tracking.live_run import LiveRun
    from stages.tracking.trackers import Trackers


@stage_progress("train")
def run(params: Params, paths: Paths) -> None:
    """Write outs/train/model, the curve and the figures; an interrupted training is resumed from its last checkpoint.

    The params of later stages are checked first, as the training may take hours, and the devices are locked while it
    runs. A process that this stage launched does neither: it only trains. One of the user's own launcher, such as
    torchrun, locks the devices.

    Raises:
        ValueError: A later stage would refuse its params, a package of `train.report_to` is missing, a device is taken
            by another training, or this one failed.
    """
    check_trackers(params.train.report_to)
    if in_launched_process():
        check_num_processes(params.train.launch)
        with nullcontext() if is_launched_by_stage() else sole_training(paths.root):
            train(params, paths)
        return
    from stages.tools.check import check_later_stages  # launched processes need not load it

    check_later_stages(params, paths)
    with sole_training(paths.root):
        launch_or_train(params, paths)


def launch_or_train(params: Params, paths: Paths) -> None:
    """Train in this process, or launch as many as params.yaml states, again with smaller batches if out of memory."""
    if not needs_launcher(params.train.launch):
        train(params, paths)
        return
    state = TrainingState.of(params, paths)
    state.mark_stopped(None)
    while True:
        try:
            launch("train", params.train.launch, paths)
            return
        except OutOfMemory as error:
            problem = str(error)
        except (SystemExit, ValueError):
            step = state.stopped_at()
            if step is None:
                raise
            raise SavedAndStopped(step) from None
        make_smaller(params.train, state, problem)


def train(params: Params, paths: Paths) -> None:
    """Train in this process, which may be one of several; only the first one writes."""
    state = TrainingState.of(params, paths)
    first_process = make_sft_config(params.train, state.folder).process_index == 0  # connects to the other processes
    with (
        live_run(params, paths, state, first_process) as live,
        open_trackers(params, paths, state, first_process) as trackers,
    ):
        runs: list[LiveRun | Trackers] = []
        if live is not None:
            runs.append(live)
        if trackers is not None:
            runs.append(trackers)
        while (problem := attempt(params, paths, state, runs)) is not None:
            make_smaller(params.train, state, problem)
            clear_device_cache(garbage_collection=True)
            if live is not None:
                live.tag(MEMORY_TAG, describe_events(state))
    if first_process:
        state.mark_finished()
    PartialState().destroy_process_group()


def attempt(params: Params, paths: Paths, state: TrainingState, runs: list[LiveRun | Trackers]) -> str | None:
    """Train to the last step and write the results, unless memory runs out.

    Args:
        params: Values of params.yaml.
        paths: The checkout.
        state: Folder of the training's checkpoints.
        runs: What gets the curve while the model trains.

    Returns:
        None if the training is complete; otherwise in which step it ran out of memory, and with how many rows.

    Raises:
        OutOfMemory: One of several processes ran out of memory. The others wait for it, so all must be restarted.
        SavedAndStopped: SIGTERM was received, and a checkpoint was saved.
        ValueError: Not even model and adapter fit into memory, or the disk is full.
    """
    section = section_that_fits(params.train, state)
    config = make_sft_config(section, state.folder)
    checkpoint = agree_on_checkpoint(params, paths, config)
    throughput = Throughput(state.folder / "throughput.csv")
    recorders = [throughput, TrainingProgress(throughput), *(LiveCurve(run, throughput) for run in runs)]
    streamed = open_stream(params, paths, config, checkpoint)
    rows_per_update = config.train_batch_size * config.gradient_accumulation_steps
    if streamed is not None:
        recorders.append(KeepPlace(streamed, rows_per_update))
    try:
        trainer = make_trainer(params, paths, config, recorders, streamed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory before the first step: model and adapter alone are too large ({error}); try a smaller "
            "train.lora_r, train.method: qlora, model.dtype: bfloat16, or more devices with train.launch.engine: fsdp2"
        ) from None
    if trainer.is_world_process_zero():
        print(f"{trainer.attention}; {trainer.sharing}", flush=True)
    started = time.monotonic()
    trainer.weight_copies = int(section.select.metric is not None)  # those of the best step until then
    prompts = SamplePrompts.read(section.samples, paths, trainer.processing_class)
    samples = Samples(trainer, section, prompts) if prompts.rows else None
    save_best = partial(save_trained_model, trainer, paths)
    for callback in (samples, KeepBest(section.select, save_best)):  # answers may decide which step is the best
        if callback is not None:
            trainer.add_callback(callback)
    try:
        with delaying_sigterm(grace_s()) as is_asked, explaining_full_disk(state):
            stop = SaveAndStop(is_asked)
            trainer.add_callback(stop)
            with nullcontext() if streamed is None else beginning_at_place():
                trainer.train(resume_from_checkpoint=checkpoint)
        if stop.stopped and not is_exhausted(trainer.state.log_history, section.select):
            if trainer.is_world_process_zero():
                state.mark_stopped(trainer.state.global_step)
            raise SavedAndStopped(trainer.state.global_step)
        trainer.check_trained()  # a training that stopped early has not done so
        last = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
        if not any("eval_loss" in entry for entry in last):
            trainer.evaluate()  # the last step is not a multiple of eval_steps
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        rows = section.per_device_train_batch_size
        problem = f"out of memory in step {trainer.state.global_step + 1} with {rows} rows per forward pass"
        if config.world_size > 1:
            raise OutOfMemory(problem) from None
        return problem
    figures: dict[str, Any] = {**memory_figures(params.train, state)}
    if streamed is not None:
        num_trained = trainer.state.global_step * rows_per_update
        figures["stream"] = streamed.write_accounts(paths.out("train", "stream"), num_trained)
    save_results(trainer, params, paths, figures)
    if trainer.is_world_process_zero():
        write_jsonl(paths.out("train", "samples.jsonl"), samples_by_prompt(prompts, state.folder))
        seconds = time.monotonic() - started
        write_timings(paths, seconds, trainer.state.num_input_tokens_seen, throughput, samples)
    return None


def open_stream(params: Params, paths: Paths, config: SFTConfig, checkpoint: str | None) -> StreamedRows | None:
    """Return the training rows as a stream that begins at a checkpoint's place; None if `pack` wrote them all."""
    recipe = Recipe.read(paths, trust_remote_code=params.model.trust_remote_code)
    if recipe is None:
        return None
    rows_per_update = config.train_batch_size * config.gradient_accumulation_steps
    num_steps = 0 if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])
    return StreamedRows(
        recipe,
        paths,
        Path(str(config.output_dir)) / "stream",
        seed=params.train.seed if params.train.order == "shuffled" else None,
        with_weights="loss_weights" in load_from_disk(str(paths.out("pack", "train"))).column_names,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        num_trained=num_steps * rows_per_update,
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that a device, or the host, is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def agree_on_checkpoint(params: Params, paths: Paths, config: SFTConfig) -> str | None:
    """Find the checkpoint to resume from, the same for all processes.

    The first process looks for it, removes damaged checkpoints, and broadcasts the result.

    Returns:
        Path of the checkpoint; None if training starts at step 0.
    """
    found: list[str | None] = [None]
    if config.process_index == 0:
        state = TrainingState.open(params, paths)
        state.mark_stopped(None)
        checkpoint = state.last_checkpoint(lambda path: missing_best(path, params.train.select))
        if checkpoint is not None:
            print(f"resuming from {checkpoint.name}", flush=True)
            found = [str(checkpoint)]
    broadcast_object_list(found)
    return found[0]


def save_results(trainer: SFTTrainer, params: Params, paths: Paths, more: dict[str, Any]) -> None:
    """Write the shipped model, the curve, and the figures that are equal for every run of this training.

    Args:
        trainer: After its last step.
        params: Values of params.yaml.
        paths: The checkout.
        more: Figures to add to those of the trainer.

    Raises:
        ValueError: The last loss is not finite.
    """
    log, state = trainer.state.log_history, trainer.state
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if not losses or not math.isfinite(losses[-1]):
        last = losses[-1] if losses else "nothing"
        raise ValueError(f"training ended with loss {last}; lower train.learning_rate, or look at the data")
    shipped = selection_record(log, params.train.select, state.global_step, state.max_steps)
    ship(trainer, paths, shipped["step"])
    if not trainer.is_world_process_zero():
        return
    write_json(paths.out("train", "selection.json"), shipped)
    write_text(paths.out("train", "curve.csv"), curve_csv(log))
    effect = effect_record(log)
    write_json(paths.out("train", "effect.json"), effect)
    if effect["flat_loss"] is not None:
        print(f"warning: training has changed little. {effect['flat_loss']['sentence']}", flush=True)
    bad_updates = [entry for entry in log if BAD_UPDATE in entry]
    write_jsonl(paths.out("train", "bad_updates.jsonl"), bad_updates)
    shares = {share.kind: share.to_dict() for share in weight_shares(trainer.model)}
    write_json(paths.out("train", "weights.json"), shares)
    counts = count_parameters(trainer.model)
    metrics = {
        "loss": losses[-1],
        "eval_loss": logged_at(log, "eval_loss", shipped["step"]),
        "last_eval_loss": last_logged(log, "eval_loss"),
        "shipped_step": shipped["step"],
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "trainable_parameters": counts.num_trainable,
        "parameters": counts.num_total,
        "bad_updates": len(bad_updates),
        "untrained_modules": sum(row["count"] for row in effect["untrained"]),
        **{name: last_logged(log, name) for name in ROUTER_COLUMNS if any(name in entry for entry in log)},
        **{name: logged_at(log, name, shipped["step"]) for name in (*source_columns(log), *sample_columns(log))},
        **more,
    }
    write_json(paths.metrics("train"), metrics)


def last_logged(log: list[dict[str, Any]], name: str) -> float:
    """Return the last value of a figure in a trainer's log."""
    value: float = next(entry[name] for entry in reversed(log) if name in entry)
    return value


def logged_at(log: list[dict[str, Any]], name: str, step: int) -> float:
    """Return the value of a figure at a step, or the one before it if it was not logged there."""
    return last_logged([entry for entry in log if entry["step"] <= step], name)


def write_timings(
    paths: Paths, seconds: float, num_tokens: int, throughput: Throughput, samples: Samples | None
) -> None:
    """Write the training's times to reports/timings, with the digest of the curve that they belong to.

    DVC does not track this file. The digest shows readers when DVC has restored the outs of another training.

    Args:
        paths: The checkout.
        seconds: Duration of the training in this process, evaluations included.
        num_tokens: Tokens of the training, without padding.
        throughput: Clock of the training.
        samples: The answers during training, None if there were none.
    """
    timings = {
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "curve_sha256": file_digest(paths.out("train", "curve.csv")),
        "throughput": throughput.points,
    }
    if samples is not None:
        share = samples.seconds / seconds
        timings["samples"] = {"seconds": samples.seconds, "share": share, "skipped": samples.num_skipped}
        skipped = f", {samples.num_skipped} evaluations without answers" if samples.num_skipped else ""
        print(f"answers during training took {samples.seconds:.1f} s, {share:.1%} of the time{skipped}", flush=True)
    write_json(paths.timings("train"), timings)


def ship(trainer: SFTTrainer, paths: Paths, step: int) -> None:
    """Write the model of a step to outs/train/model: a copy of the best weights, or the trainer's own at its end."""
    target = paths.out("train", "model")
    if step == trainer.state.global_step:
        save_trained_model(trainer, paths, target)
    elif trainer.is_world_process_zero():
        kept = best_folder(Path(trainer.args.output_dir or "."), step)
        problem = what_is_wrong(kept)
        if problem is not None:
            raise ValueError(
                f"the weights of step {step}, the best one, can't be used: {problem}; delete {kept.parent}"
            )
        print(f"shipping step {step} of {trainer.state.global_step}, the best one evaluated", flush=True)
        with replacing_folder(target) as folder:
            shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SEAL))


def save_trained_model(trainer: SFTTrainer, paths: Paths, target: Path) -> None:
    """Write the model or adapter, gathered from all processes by the first one, with tokenizer and processor.

    Args:
        trainer: The trainer.
        paths: The checkout.
        target: Folder to write.
    """
    with whole_state_dict(trainer):
        if not trainer.is_world_process_zero():
            trainer.save_model(str(target))
            return
        with replacing_folder(target) as folder:
            trainer.save_model(str(folder))
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle with paths of this machine
            name_base(folder, paths.out("load", "base_model.json"))
            save_tokenizer(trainer.processing_class, folder)
            copy_processor_files(paths.out("format", "tokenizer"), folder)


@contextmanager
def whole_state_dict(trainer: SFTTrainer) -> Iterator[None]:
    """Make FSDP gather all weights for what is saved within the block; checkpoints have a file per process."""
    if not trainer.is_fsdp_enabled:
        yield
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before)
