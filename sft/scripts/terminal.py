"""Output of training scripts in a terminal, drawn by `rich`: progress bars, and errors alone."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length


class RichProgressCallback(TrainerCallback):
    """Callback that draws the progress of training and evaluation, and the latest log line, with `rich`.

    Use it with `disable_tqdm=True`, else transformers draws its own bars, too.

    Raises:
        ImportError: `rich` is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("rich") is None:
            raise ImportError("RichProgressCallback draws with the package rich, which is missing: pip install rich")
        self.live: Any = None
        self.training_bar: Any = None
        self.evaluation_bar: Any = None
        self.training_task: Any = None
        self.evaluation_task: Any = None
        self.status: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw an empty bar for the training."""
        if not state.is_world_process_zero:
            return
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
        self.training_bar = Progress(*columns, TimeElapsedColumn(), "/", TimeRemainingColumn())
        self.evaluation_bar = Progress(*columns)
        self.training_task = self.training_bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self.status = None
        self._stop()  # of a training that was interrupted
        self.live = Live(self._drawing())
        self.live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar of the training."""
        if self.live is not None:
            self.training_bar.update(self.training_task, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Move the bar of the evaluation; the first batch draws it. Outside a training nothing is drawn."""
        if self.live is None or not has_length(eval_dataloader):
            return
        if self.evaluation_task is None:
            self.evaluation_task = self.evaluation_bar.add_task("evaluation", total=len(eval_dataloader))
        self.evaluation_bar.advance(self.evaluation_task)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar of the evaluation."""
        self._remove_evaluation()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Remove the bar of the prediction."""
        self._remove_evaluation()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Draw the figures of a log line as a table."""
        if self.live is None or not logs:
            return
        from rich.table import Table

        self.status = Table(title=f"step {state.global_step}")
        self.status.add_column("figure")
        self.status.add_column("value", justify="right")
        for name, value in logs.items():
            self.status.add_row(str(name), f"{value:.4g}" if isinstance(value, float) else str(value))
        self.live.update(self._drawing())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the last state and leave it in the terminal."""
        self._stop()

    def _remove_evaluation(self) -> None:
        if self.evaluation_task is not None:
            self.evaluation_bar.remove_task(self.evaluation_task)
            self.evaluation_task = None

    def _drawing(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel

        return Panel(Group(*(part for part in (self.training_bar, self.evaluation_bar, self.status) if part)))

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()
        self.live = self.evaluation_task = None


def init_zero_verbose() -> None:
    """Log errors alone, and warnings of Python as log messages; with `rich`, where it is installed, in colours.

    Call it before other imports, since modules set up their loggers when they are imported.
    """
    if importlib.util.find_spec("rich") is None:
        handler: logging.Handler = logging.StreamHandler()
    else:
        from rich.logging import RichHandler

        handler = RichHandler()
    logging.basicConfig(format="%(message)s", datefmt="[%X]", handlers=[handler], level=logging.ERROR)

    def log_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        logging.warning("%s:%s: %s: %s", filename, lineno, category.__name__, message)

    warnings.showwarning = log_warning
