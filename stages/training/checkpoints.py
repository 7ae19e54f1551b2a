"""Checkpoints of an unfinished training: found again only by a training of the very same params, data and code.

A checkpoint counts once its seal is there: the list of its files with sizes and digests, written when all of them are
on the disk. A kill at any moment, a full disk or a damaged file leaves the one before it as the last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import sft
import stages
from stages.checkout.artifacts import read_json, write_json
from stages.checkout.full_disk import is_full_disk
from stages.checkout.paths import Paths
from stages.params.schema import Params, TrainSection

FINISHED = "finished"
SEAL = "seal.json"
PICKLED_ARGUMENTS = "training_args.bin"


@dataclass(frozen=True)
class TrainingState:
    """The folder of one training's checkpoints.

    It lies outside the outs: DVC would delete an out before a rerun, and with `persist` a changed learning rate would
    go on from the old run's weights. It stays until DVC has recorded the stage; the next training clears it away.
    """

    folder: Path

    @classmethod
    def of(cls, params: Params, paths: Paths) -> TrainingState:
        """The folder for exactly these params, rows, base model and code; how many processes share a step is open."""
        digest = hashlib.sha256()
        values = [params.model.model_dump(), what_counts(params.train)]
        digest.update(json.dumps(values, sort_keys=True).encode())
        for path in fingerprint_files(paths):
            with path.open("rb") as file:
                digest.update(named(path, paths).encode() + hashlib.file_digest(file, "sha256").digest())
        return cls(paths.state / "train" / digest.hexdigest()[:16])

    @classmethod
    def open(cls, params: Params, paths: Paths) -> TrainingState:
        """The folder, made where it is missing; finished ones of other trainings are removed."""
        state = cls.of(params, paths)
        for other in state.folder.parent.glob("*"):
            if other != state.folder and (other / FINISHED).exists():
                shutil.rmtree(other)
        state.folder.mkdir(parents=True, exist_ok=True)
        return state

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; newer ones that are not, left by a kill or damaged since, are removed."""
        numbered = [path for path in self.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            problem = what_is_wrong(path)
            if problem is None:
                return path
            print(f"removing {path.name}: {problem}", flush=True)
            shutil.rmtree(path)
        return None

    def mark_finished(self) -> None:
        """Let the next training clear the folder away."""
        (self.folder / FINISHED).touch()


def what_counts(section: TrainSection) -> dict[str, Any]:
    """The section as far as it decides the updates: rows an update, not who computes which of them."""
    shared_out = {"launch", "per_device_train_batch_size", "gradient_accumulation_steps"}
    may_change = {"on_bad_loss", "bad_loss_factor", "on_oom"}  # on the way
    values = section.model_dump(exclude=shared_out | may_change)
    shares = section.gradient_accumulation_steps * section.launch.processes
    rows = section.per_device_train_batch_size * shares
    return {**values, "rows_an_update": rows, "engine": section.launch.engine}  # each engine has its own files


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint as soon as all processes have written their part of it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the others; the first process seals."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)  # nothing reads it, and it is a pickle
            seal(folder)


def seal(checkpoint: Path) -> None:
    """Write down whose it is, and its files with sizes and digests, when they are safely on the disk."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    write_json(checkpoint / SEAL, {**belongs_to(checkpoint), "files": files})


def belongs_to(checkpoint: Path) -> dict[str, str]:
    """The training and the step of a checkpoint, by where it lies."""
    return {"training": checkpoint.parent.name, "checkpoint": checkpoint.name}


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be resumed; None when it is as it was sealed."""
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
        return f"it is {sealed.get('checkpoint')} of training {sealed.get('training')}, put here by hand"
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
    """Turn whatever a full disk raises inside the block into one message; half a checkpoint is removed.

    Raises:
        ValueError: The disk is full; names the checkpoint to go on from.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error, state.folder):
            raise
        last = state.last_checkpoint()
        kept = f"{last.name} is whole" if last is not None else "there is no whole checkpoint yet"
        raise ValueError(
            f"no space left for a checkpoint in {state.folder}; {kept}. Free some space and type the command again to "
            "go on"
        ) from error


def fingerprint_files(paths: Paths) -> Iterator[Path]:
    """What a training's result depends on besides its params: packed rows, tokenizer, base model, the code."""
    yield paths.out("load", "base_model.json")
    for folder in (paths.out("pack", "train"), paths.out("pack", "eval"), paths.out("format", "tokenizer")):
        yield from sorted(path for path in folder.rglob("*") if path.is_file())
    library, training = Path(sft.__file__).resolve().parent, Path(stages.__file__).resolve().parent
    yield from sorted(library.rglob("*.py"))
    yield training / "train.py"
    yield from sorted((training / "training").glob("*.py"))


def named(path: Path, paths: Paths) -> str:
    """The name under which a file enters the digest: relative to what it belongs to, so that no two share one."""
    for root in (paths.root, Path(sft.__file__).resolve().parent.parent):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name
