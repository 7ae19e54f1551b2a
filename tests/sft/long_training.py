"""`python -m tests.sft.long_training FOLDER STEPS`: a tiny training that prints memory, open files and threads."""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import psutil
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from sft.config import SFTConfig
from sft.train.trainer import SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer

EVERY = 200


class Measure(TrainerCallback):
    """Prints one line of JSON every 200 steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            gc.collect()
            process = psutil.Process()
            figures = {
                "step": state.global_step,
                "bytes": process.memory_full_info().uss,
                "files": process.num_fds(),
                "threads": process.num_threads(),
            }
            print("FIGURES", json.dumps(figures), flush=True)


def main(folder: str, num_steps: int) -> None:
    """Train packed rows with LoRA, with logs, evaluations and checkpoints."""
    rows = [{"prompt": f"What is {n}?", "completion": f" It is {n}." * (1 + n % 3)} for n in range(64)]
    config = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=num_steps,
        packing=True,
        max_length=64,
        per_device_train_batch_size=1,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=100,
        save_steps=100,
        save_total_limit=2,
        on_bad_loss="skip",
        bad_loss_factor=10.0,
    )
    SFTTrainer(
        tiny_model(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[Measure()],
    ).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
