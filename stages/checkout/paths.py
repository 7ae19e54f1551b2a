"""Where every input and output of the pipeline lies, relative to the repository's root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """All paths of one checkout.

    Args:
        root: The folder that holds params.yaml and dvc.yaml.
    """

    root: Path

    def out(self, stage: str, *parts: str) -> Path:
        """A path below a stage's own output folder, e.g. `out("pack", "train")`."""
        return self.root.joinpath("outs", stage, *parts)

    def metrics(self, stage: str) -> Path:
        """A stage's DVC metrics file: figures that are the same whenever the result is."""
        return self.root / "reports" / "metrics" / f"{stage}.json"

    def timings(self, stage: str) -> Path:
        """A stage's wall times and speeds: different at every run, so neither an out nor recorded in git."""
        return self.root / "reports" / "timings" / f"{stage}.json"

    @property
    def params(self) -> Path:
        """The parameters' file."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """The only folder that local sources are read from."""
        return self.root / "data"

    @property
    def report(self) -> Path:
        """The page that a run ends with."""
        return self.root / "reports" / "report.html"

    @property
    def data_page(self) -> Path:
        """The page on what is trained, there before training begins."""
        return self.root / "reports" / "data.html"

    @property
    def state(self) -> Path:
        """Checkpoints of unfinished trainings: ignored by git and DVC, shared by worktrees through SFT_STATE_DIR."""
        return Path(os.environ.get("SFT_STATE_DIR") or self.root / ".state")


def cache_folder() -> Path:
    """Where models and copies of data are kept outside the repository: $SFT_CACHE, or ~/.cache/sft."""
    return Path(os.environ.get("SFT_CACHE") or "~/.cache/sft").expanduser().absolute()
