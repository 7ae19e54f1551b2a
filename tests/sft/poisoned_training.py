"""`python -m tests.sft.poisoned_training FOLDER POLICY`: one part of one update is not a number, on one process."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from sft.config import SFTConfig
from sft.train.bad_updates import BAD_UPDATE
from sft.train.trainer import SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"What is {number}?", "completion": f" It is {number}."} for number in range(64)]
BAD_STEP = 4


class Poisoned(SFTTrainer):
    """Trainer in which the second part of update 4 is not a number, on the last process."""

    parts = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step + 1 != BAD_STEP:
            return loss
        self.parts += 1
        is_bad = self.parts == 2 and self.args.process_index == self.args.world_size - 1
        return loss * (math.nan if is_bad else 1.0)


def main(folder: str, policy: str) -> None:
    """Train 8 updates of two parts each; every process writes its results."""
    config = SFTConfig(
        output_dir=str(Path(folder) / "checkpoints"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        max_length=32,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        on_bad_loss=policy,
    )
    trainer = Poisoned(
        tiny_model(), args=config, train_dataset=Dataset.from_list(ROWS), processing_class=tiny_tokenizer()
    )
    error = None
    try:
        trainer.train()
    except ValueError as stopped:
        error = str(stopped)
    weights = torch.cat([value.detach().flatten() for value in trainer.model.parameters()])
    found = {
        "error": error,
        "bad": [(entry["step"], entry["action"]) for entry in trainer.state.log_history if BAD_UPDATE in entry],
        "losses": [entry["step"] for entry in trainer.state.log_history if "loss" in entry],
        "finite": bool(weights.isfinite().all()),
        "sum": float(weights.double().abs().sum()),
        "step": trainer.state.global_step,
    }
    (Path(folder) / f"{config.process_index}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
