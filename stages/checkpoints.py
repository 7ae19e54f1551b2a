"""Checkpoints of an unfinished training: found again only by a training of the very same params, data and code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.params import Params
from stages.paths import Paths

FINISHED = "finished"


@dataclass(frozen=True)
class TrainingState:
    """The folder of one training's checkpoints.

    It lies outside the outs: DVC would delete an out before a rerun, and with `persist` a changed learning rate would
    go on from the old run's weights. It stays until DVC has recorded the stage; the next training clears it away.
    """

    folder: Path

    @classmethod
    def open(cls, params: Params, paths: Paths) -> TrainingState:
        """The folder for exactly these params, rows, base model and code; finished ones of others are removed."""
        digest = hashlib.sha256()
        digest.update(json.dumps([params.model.model_dump(), params.train.model_dump()], sort_keys=True).encode())
        for path in fingerprint_files(paths):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        folder = paths.state / "train" / digest.hexdigest()[:16]
        for other in folder.parent.glob("*"):
            if other != folder and (other / FINISHED).exists():
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; half-written ones, left by a kill, are removed."""
        whole = []
        for path in self.folder.glob("checkpoint-*"):
            if is_whole(path):
                whole.append(path)
            else:
                print(f"removing half-written {path.name}", flush=True)
                shutil.rmtree(path)
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def mark_finished(self) -> None:
        """Let the next training clear the folder away."""
        (self.folder / FINISHED).touch()


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that a resume reads is there; transformers writes the state last."""
    if not checkpoint.name.rpartition("-")[2].isdigit():
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / "optimizer.pt").exists() and (checkpoint / "scheduler.pt").exists()


def fingerprint_files(paths: Paths) -> Iterator[Path]:
    """What a training's result depends on besides its params: packed rows, tokenizer, base model, the code."""
    yield paths.out("load", "base_model.json")
    for folder in (paths.out("pack", "train"), paths.out("pack", "eval"), paths.out("format", "tokenizer")):
        yield from sorted(path for path in folder.rglob("*") if path.is_file())
    package = Path(__file__).resolve().parent.parent / "sft"
    yield from sorted(package.glob("*.py"))
    yield Path(__file__).resolve().parent / "train.py"
