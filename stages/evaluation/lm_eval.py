"""Tasks of lm-eval in `evaluate`: those that params.yaml names, including the user's YAML files in tasks/."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.untrusted.templates import chat_templates_in_child
from stages.evaluation.results import ModelResult
from stages.params.figures import ANSWERING
from stages.params.schema import LmEvalSection
from stages.params.tasks import FOLDER

if TYPE_CHECKING:
    from sft.evaluate.lm_eval import Harness, HarnessResult

KEY = "evaluate.lm_eval"


def check_installed(section: LmEvalSection) -> None:
    """Check that lm-eval is installed if the section names tasks, without importing it.

    Raises:
        ValueError: It is not installed; names the key and the extra.
    """
    if section.tasks:
        from sft.evaluate.lm_eval import check_harness

        try:
            check_harness()
        except ValueError as error:
            raise ValueError(f"{KEY}.tasks: {error}") from None


def load_harness(section: LmEvalSection, root: Path) -> HarnessRun | None:
    """Load the tasks that params.yaml names, with their data.

    Args:
        section: Section `evaluate.lm_eval` of params.yaml.
        root: The checkout; paths in task files are relative to it.

    Returns:
        The tasks; None if params.yaml names none.

    Raises:
        ValueError: A task does not exist or can't be used; names the key.
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
    """The tasks of one evaluation.

    Args:
        harness: The loaded tasks.
        section: Section `evaluate.lm_eval` of params.yaml.
        root: The checkout.
        done: Result of the model that was measured last; None before the first one.
    """

    harness: Harness
    section: LmEvalSection
    root: Path
    done: HarnessResult | None = None

    def answers(self, name: str) -> bool:
        """Return whether a model is measured; the merged one is not, as it computes what the tuned one does."""
        return name in ANSWERING

    def measure(self, model: Any, tokenizer: Any, result: ModelResult) -> None:
        """Measure a model in all tasks and add the figures to its result."""
        from sft.evaluate.lm_eval import HarnessOptions

        options = HarnessOptions(**self.section.model_dump(exclude={"tasks"}))
        with contextlib.chdir(self.root), chat_templates_in_child():
            self.done = self.harness.measure(model, tokenizer, options)
        result.add_tasks(self.done.figures, self.done.errors)

    def notes(self) -> dict[str, str]:
        """Return task -> number of rows and of examples shown, as text."""
        if self.done is None:
            return {}
        words = {}
        for task, sizes in self.done.tasks.items():
            rows, shots = sizes["num_rows"], sizes["num_fewshot"]
            parts = [f"{rows} rows" if rows is not None else "a group", f"{shots}-shot" if shots is not None else ""]
            words[task] = ", ".join(part for part in parts if part)
        return words
