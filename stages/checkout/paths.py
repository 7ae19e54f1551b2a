"""Paths of every input and output of the pipeline, relative to the repository's root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

IMAGE_INDEX = "index.jsonl"
"""File in the folder of images that lists them; the folder always has it."""


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
        return index.is_file() and index.stat().st_size > 0

    @property
    def params(self) -> Path:
        """The file of the parameters."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """The only folder that local sources are read from."""
        return self.root / "data"

    @property
    def report(self) -> Path:
        """The page of results, written at the end of a run."""
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
