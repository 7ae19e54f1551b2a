"""What scripts draw in a terminal."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from sft.scripts.terminal import RichProgressCallback
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

MAIN = SimpleNamespace(is_world_process_zero=True, max_steps=2, global_step=0)


def test_training_and_evaluation_are_drawn_twice_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Dataset.from_dict({"text": ["Paris is the capital of France."] * 4})
    args = quiet_config(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, logging_steps=1, save_strategy="no", packing=False
    )
    callback = RichProgressCallback()
    trainer = SFTTrainer(
        tiny_model(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )
    trainer.evaluate()  # before a training: nothing is drawn, and nothing fails
    for _ in range(2):
        trainer.train()
        assert callback.training_bar.tasks[0].completed == 2
        assert callback.evaluation_bar.tasks == []
        assert callback.live is None
    drawn = capsys.readouterr().out
    assert "training" in drawn
    assert "2/2" in drawn
    assert "train_loss" in drawn


def test_figures_of_the_log_are_not_changed() -> None:
    callback = RichProgressCallback()
    callback.on_train_begin(None, MAIN, None)
    logs = {"loss": 0.5, "total_flos": 3}
    callback.on_log(None, MAIN, None, logs=logs)
    callback.on_train_end(None, MAIN, None)
    assert logs == {"loss": 0.5, "total_flos": 3}


def test_other_processes_draw_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    callback, other = RichProgressCallback(), SimpleNamespace(is_world_process_zero=False, max_steps=2, global_step=1)
    for event in ("on_train_begin", "on_step_end", "on_evaluate", "on_log", "on_train_end"):
        getattr(callback, event)(None, other, None)
    assert capsys.readouterr().out == ""


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install rich"):
        RichProgressCallback()


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_quiet_script_logs_errors_and_warnings_alone(with_rich: bool) -> None:
    hide = "" if with_rich else "import importlib.util; importlib.util.find_spec = lambda name: None\n"
    code = (
        "import logging, warnings\nfrom sft import init_zero_verbose\n"
        f"{hide}init_zero_verbose()\n"
        "logging.warning('unimportant'); logging.error('important')\n"
        "print(type(logging.getLogger().handlers[0]).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == ("RichHandler" if with_rich else "StreamHandler")
    assert "important" in done.stdout + done.stderr
    assert "unimportant" not in done.stdout + done.stderr
    assert logging.getLogger().level != logging.ERROR


def test_drawing_holds_the_latest_figures() -> None:
    from rich.console import Console

    callback = RichProgressCallback()
    callback.on_train_begin(None, MAIN, None)
    callback.on_log(None, MAIN, None, logs={"loss": 0.123456})
    console: Any = Console(width=60)
    with console.capture() as drawn:
        console.print(callback._drawing())
    callback.on_train_end(None, MAIN, None)
    assert "0.1235" in drawn.get()
