"""Checkpoints of an unfinished training, resumed only by a training with the same params, data and code.

A checkpoint is valid once it has a seal: the list of its files with sizes and digests, written after all of them are on
the disk. If a checkpoint is incomplete or damaged, by a kill or a full disk, training resumes from the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import sft
import stages
from stages.checkout.artifacts import read_json, write_json
from stages.checkout.full_disk import is_full_disk
from stages.checkout.paths import STREAM, Paths
from stages.params.schema import Params, TrainSection

FINISHED, STOPPED = "finished", "stopped.json"
SEAL = "seal.json"
PICKLED_ARGUMENTS = "training_args.bin"


@dataclass(frozen=True)
class TrainingState:
    """The folder of one training's checkpoints.

    It is not an out of DVC: DVC deletes an out before a rerun, and with `persist: true` a training with another
    learning rate would continue from the weights of the old one. The folder is kept after the training, until DVC has
    recorded the stage; the next training deletes it.

    Args:
        folder: Path of the folder.
    """

    folder: Path

    @classmethod
    def of(cls, params: Params, paths: Paths) -> TrainingState:
        """Return the folder for these params, rows, base model and code, whatever the number of processes."""
        digest = hashlib.sha256()
        values = [params.model.model_dump(), fingerprint_params(params.train)]
        digest.update(json.dumps(values, sort_keys=True).encode())
        for path in fingerprint_files(paths):
            with path.open("rb") as file:
                digest.update(name_in_digest(path, paths).encode() + hashlib.file_digest(file, "sha256").digest())
        return cls(paths.state / "train" / digest.hexdigest()[:16])

    @classmethod
    def open(cls, params: Params, paths: Paths) -> TrainingState:
        """Create the folder if it is missing, and delete those of other trainings that are finished."""
        state = cls.of(params, paths)
        for other in state.folder.parent.glob("*"):
            if other != state.folder and (other / FINISHED).exists():
                shutil.rmtree(other)
        state.folder.mkdir(parents=True, exist_ok=True)
        return state

    def last_checkpoint(self, what_else: Callable[[Path], str | None] = lambda path: None) -> Path | None:
        """Return the newest valid checkpoint, None if there is none, and delete invalid ones that are newer.

        Args:
            what_else: Returns what else is wrong with a checkpoint whose files are valid, None if nothing is.
        """
        numbered = [path for path in self.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            problem = what_is_wrong(path) or what_else(path)
            if problem is None:
                return path
            print(f"removing {path.name}: {problem}", flush=True)
            shutil.rmtree(path)
        return None

    def mark_stopped(self, step: int | None) -> None:
        """Record the step after which SIGTERM stopped the training; None = the training goes on."""
        if step is None:
            (self.folder / STOPPED).unlink(missing_ok=True)
        else:
            write_json(self.folder / STOPPED, {"step": step})

    def stopped_at(self) -> int | None:
        """Return the step after which SIGTERM stopped the last attempt, None if it ended in another way."""
        file = self.folder / STOPPED
        return int(read_json(file)["step"]) if file.exists() else None

    def mark_finished(self) -> None:
        """Mark the training as finished, so that the next training deletes the folder."""
        (self.folder / FINISHED).touch()


def fingerprint_params(section: TrainSection) -> dict[str, Any]:
    """Return the params that decide the updates: the rows per update, but not how processes divide them."""
    shared_out = {"launch", "per_device_train_batch_size", "gradient_accumulation_steps"}
    may_change = {
        "on_bad_loss",
        "bad_loss_factor",
        "on_untrained",
        "on_oom",
        "report_to",
    }  # between two attempts of one training
    values = section.model_dump(exclude=shared_out | may_change)
    shares = section.gradient_accumulation_steps * section.launch.processes
    rows = section.per_device_train_batch_size * shares
    return {**values, "rows_an_update": rows, "engine": section.launch.engine}  # engines write different checkpoints


class SealCheckpoints(TrainerCallback):
    """Callback that seals each checkpoint after all processes have written their parts."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for all processes; the first one seals the checkpoint."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)  # a pickle that nothing reads
            seal(folder)


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint's files to the disk, then write the seal: the training, the step, sizes and digests."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    write_json(checkpoint / SEAL, {**belongs_to(checkpoint), "files": files})


def belongs_to(checkpoint: Path) -> dict[str, str]:
    """Return the training and the step that a checkpoint's path names."""
    return {"training": checkpoint.parent.name, "checkpoint": checkpoint.name}


def what_is_wrong(checkpoint: Path) -> str | None:
    """Return why a checkpoint can't be resumed; None if it is as it was when it was sealed."""
    try:
        sealed = read_json(checkpoint / SEAL)
    except OSError:
        return "it was being written when the training ended"
    except ValueError:
        sealed = None
    files = sealed.get("files") if isinstance(sealed, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(entry, dict) for entry in files.values()):
        return f"{SEAL} is damaged"
    if any(sealed.get(name) != value for name, value in belongs_to(checkpoint).items()):
        return f"it is {sealed.get('checkpoint')} of training {sealed.get('training')}, moved here by hand"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.get("size"):
            return f"{name} has {path.stat().st_size} bytes instead of {expected.get('size')}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):
                return f"{name} is damaged"
    return None


@contextmanager
def explaining_full_disk(state: TrainingState) -> Iterator[None]:
    """Turn any error that a full disk causes in the block into one message, and delete the incomplete checkpoint.

    Raises:
        ValueError: The disk is full; names the checkpoint that training will resume from.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error, state.folder):
            raise
        last = state.last_checkpoint()
        kept = f"{last.name} is complete" if last is not None else "there is no complete checkpoint yet"
        raise ValueError(
            f"no space left for a checkpoint in {state.folder}; {kept}. Free some space and type the command again to "
            "resume"
        ) from error


def fingerprint_files(paths: Paths) -> Iterator[Path]:
    """Yield the files that decide a training besides its params: packed rows, tokenizer, base model, code."""
    yield paths.out("load", "base_model.json")
    prompts = paths.out("format", "prompts.jsonl")
    if prompts.exists():  # answered during training
        yield prompts
    folders = [paths.out("pack", "train"), paths.out("pack", "eval"), paths.out("format", "tokenizer")]
    for folder in (*folders, paths.out("load", "rehearsal")):
        yield from sorted(path for path in folder.rglob("*") if path.is_file())
    streams = [paths.out(stage, STREAM) for stage in ("format", "pack")]
    is_streaming = streams[-1].exists()
    if is_streaming:
        yield from streams
    library, training = Path(sft.__file__).resolve().parent, Path(stages.__file__).resolve().parent
    yield from sorted(library.rglob("*.py"))
    yield training / "train.py"
    for room in ("training", *(("loading", "shards", "streaming") if is_streaming else ())):
        yield from sorted((training / room).glob("*.py"))


def name_in_digest(path: Path, paths: Paths) -> str:
    """Return a file's path relative to the checkout or the code, so that files of equal name differ in the digest."""
    for root in (paths.root, Path(sft.__file__).resolve().parent.parent):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name
