"""Paths of every input and output of the pipeline, relative to the repository's root."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

IMAGE_INDEX = "index.json"
"""File in the folder of images with a list of them. The folder always has it, and it is never an empty file, of which
DVC warns."""

STREAM = "stream.json"
"""File of `load`, `format` and `pack` that tells `train` how to read and prepare a stream, if there is one."""

CURRICULUM = "curriculum.jsonl"
"""File of `load` with the number by which each training row is sorted, if params.yaml states a column of numbers."""

EVAL_SOURCES = "eval_sources.json"
"""File of `load` with the source of each held-out row, and of `pack` with those of each packed one, if several have
some."""

EXPERIMENTS = (".dvc", "tmp", "exps")
"""Folder of a checkout in which DVC makes the temporary folders of `dvc exp run --temp` and of its queue."""


@dataclass(frozen=True)
class Paths:
    """All paths of one checkout.

    Args:
        root: The folder that contains params.yaml and dvc.yaml.
    """

    root: Path

    def out(self, stage: str, *parts: str) -> Path:
        """Return a path in a stage's output folder, e.g. `out("pack", "train")`."""
        return self.root.joinpath("outs", stage, *parts)

    def metrics(self, stage: str) -> Path:
        """Return the DVC metrics file of a stage: figures that depend on the result alone."""
        return self.root / "reports" / "metrics" / f"{stage}.json"

    def timings(self, stage: str) -> Path:
        """Return the file of a stage's wall times and speeds, which differ between runs: neither an out nor in git."""
        return self.root / "reports" / "timings" / f"{stage}.json"

    @property
    def images(self) -> Path:
        """Folder of the images of rows, written by `load`."""
        return self.out("load", "images")

    def has_images(self) -> bool:
        """Return whether `load` wrote rows with images."""
        index = self.images / IMAGE_INDEX
        return index.is_file() and json.loads(index.read_text(encoding="utf-8")) != []

    @property
    def params(self) -> Path:
        """The file of the parameters."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """The only folder that local sources are read from."""
        return self.root / "data"

    @property
    def evaluation_page(self) -> Path:
        """The page of results without what only `publish` knows, written by `evaluate`."""
        return self.root / "reports" / "evaluation.html"

    @property
    def report(self) -> Path:
        """The page of results, completed by `publish` at the end of a run."""
        return self.root / "reports" / "report.html"

    @property
    def data_page(self) -> Path:
        """The page that shows the training data, written before the training begins."""
        return self.root / "reports" / "data.html"

    @property
    def state(self) -> Path:
        """Checkpoints of unfinished trainings, ignored by git and DVC. Worktrees share them through SFT_STATE_DIR."""
        return Path(os.environ.get("SFT_STATE_DIR") or self.root / ".state")


def cache_folder() -> Path:
    """Return the folder of models and copies of data outside the repository: $SFT_CACHE, or ~/.cache/sft."""
    return Path(os.environ.get("SFT_CACHE") or "~/.cache/sft").expanduser().absolute()


def main_checkout(root: Path) -> Path:
    """Return the checkout that a folder belongs to, which contains what runs share, such as models and the record.

    Args:
        root: A checkout.

    Returns:
        The main checkout of a git worktree, the checkout in which an experiment of DVC was started, or the folder
        itself if it is neither. If the project is a subfolder of its git repository, so is the returned folder.
    """
    starter = _starter_of_experiment(root)
    if starter is not None:
        return main_checkout(starter)
    found = _git(root, "rev-parse", "--path-format=absolute", "--git-common-dir", "--show-prefix")
    if found is None:
        return root
    common, _, prefix = found.partition("\n")
    return Path(common).parent / prefix.rstrip("\n") if Path(common).name == ".git" else root


def _starter_of_experiment(root: Path) -> Path | None:
    """Return the folder in which `dvc exp run` was started that made this temporary folder; None if it is none."""
    parts = root.parts
    places = [i for i in range(len(parts) - len(EXPERIMENTS)) if parts[i : i + len(EXPERIMENTS)] == EXPERIMENTS]
    return Path(*parts[: places[-1]]) if places else None


def _git(root: Path, *arguments: str) -> str | None:
    """Return the output of a git command, None if git is not installed or the command fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return os.fsdecode(done.stdout) if done.returncode == 0 else None
