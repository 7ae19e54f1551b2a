"""lm-eval's tasks in `evaluate`: those that params.yaml names, and YAML files of your own in the folder tasks/."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.evaluation.results import Measured
from stages.params.figures import ANSWERING
from stages.params.schema import LmEvalSection
from stages.params.tasks import FOLDER

if TYPE_CHECKING:
    from sft.evaluate.lm_eval import Harness, HarnessResult

KEY = "evaluate.lm_eval"


def check_installed(section: LmEvalSection) -> None:
    """Look for lm-eval where tasks are named, without importing it.

    Raises:
        ValueError: Names the key and the extra.
    """
    if section.tasks:
        from sft.evaluate.lm_eval import check_harness

        try:
            check_harness()
        except ValueError as error:
            raise ValueError(f"{KEY}.tasks: {error}") from None


def load_harness(section: LmEvalSection, root: Path) -> HarnessRun | None:
    """The tasks that params.yaml names, their data read; None where it names none.

    Args:
        section: Of params.yaml.
        root: The checkout, from which paths in task files count.

    Raises:
        ValueError: Names the key and what is wrong.
    """
    if not section.tasks:
        return None
    from sft.evaluate.lm_eval import Harness  # an extra, and slow

    try:
        with contextlib.chdir(root):
            return HarnessRun(Harness(section.tasks, root / FOLDER), section, root)
    except ValueError as error:
        raise ValueError(f"{KEY}.tasks: {error}") from error


@dataclass
class HarnessRun:
    """The tasks of one evaluation, and what was done in them."""

    harness: Harness
    section: LmEvalSection
    root: Path
    done: HarnessResult | None = None

    def answers(self, name: str) -> bool:
        """Whether a model takes part: the merged one computes what the tuned one does."""
        return name in ANSWERING

    def measure(self, model: Any, tokenizer: Any, result: Measured) -> None:
        """Add what a model does in all tasks to its figures."""
        from sft.evaluate.lm_eval import HarnessOptions

        options = HarnessOptions(**self.section.model_dump(exclude={"tasks"}))
        with contextlib.chdir(self.root):
            self.done = self.harness.measure(model, tokenizer, options)
        result.add_tasks(self.done.figures, self.done.errors)

    def notes(self) -> dict[str, str]:
        """Task -> what was asked, in a few words."""
        if self.done is None:
            return {}
        words = {}
        for task, sizes in self.done.tasks.items():
            rows, shots = sizes["num_rows"], sizes["num_fewshot"]
            parts = [f"{rows} rows" if rows is not None else "a group", f"{shots}-shot" if shots is not None else ""]
            words[task] = ", ".join(part for part in parts if part)
        return words
