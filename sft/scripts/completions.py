"""Callback that generates answers to evaluation prompts while a model is trained, and logs them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig, Trainer, TrainerCallback

from sft.evaluate.generation import generate_batch
from sft.inner_model import evaluating
from sft.labels import IGNORE_INDEX
from sft.scripts.conversations import maybe_apply_chat_template

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256

FILE_NAME = "completions.jsonl"
"""File in the output folder that gets every answer."""


class LogCompletionsCallback(TrainerCallback):
    """Callback that answers evaluation prompts every `freq` steps and logs prompts and answers.

    The answers are appended to `completions.jsonl` in the output folder, one object per line with `step`, `prompt` and
    `completion`. They are also sent to Weights & Biases and Comet where `report_to` names them.

    The prompts are the column `prompt` of the evaluation rows, as text or messages. Rows that `SFTTrainer` has prepared
    have no such column: there, the prompt of a row is what comes before its last trained tokens.

    Args:
        trainer: Its evaluation rows are answered, and its tokenizer is used.
        generation_config: How answers are generated, one by one; None = greedily, up to 256 tokens, in batches.
        num_prompts: Number of prompts, the first ones; None = all.
        freq: Steps between two logs; None = `eval_steps`.

    Raises:
        ValueError: There are no evaluation rows, no prompts in them, no steps to log at, or the model is in parts on
            several processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
    ) -> None:
        self.trainer = trainer
        self.generation_config = generation_config
        self.freq = freq
        self.table: list[tuple[str, str, str]] = []
        self._last_logged_step = -1
        if trainer.eval_dataset is None:
            raise ValueError("LogCompletionsCallback answers evaluation rows: give the trainer an eval_dataset")
        if not (freq or trainer.args.eval_steps):
            raise ValueError("LogCompletionsCallback has no steps to log at: give freq, or eval_steps in the options")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "LogCompletionsCallback needs the whole model in each process, and FSDP and DeepSpeed divide it; "
                "generate from a saved checkpoint instead"
            )
        tokenizer = trainer.processing_class
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.prompts = _prompts(trainer.eval_dataset, self.tokenizer, num_prompts)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Generate and log answers if it is time to."""
        freq = self.freq or state.eval_steps
        # the method may be called several times in a step; `eval_steps` below 1 is a share of all steps
        every = max(1, round(freq * state.max_steps)) if freq < 1 else int(freq)
        if state.global_step == self._last_logged_step or state.global_step % every:
            return
        self._last_logged_step = state.global_step
        accelerator = self.trainer.accelerator
        with accelerator.split_between_processes(self.prompts) as prompts:
            answers = self._answers(prompts, args.per_device_eval_batch_size)
            rows = [
                (str(state.global_step), self.tokenizer.decode(prompt), answer)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        rows = gather_object(rows)
        if accelerator.is_main_process:
            self.table += rows
            self._log(rows, Path(args.output_dir), args.report_to)

    def _answers(self, prompts: Sequence[Sequence[int]], batch_size: int) -> list[str]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.generation_config is None:
            with evaluating(model):
                answers = generate_batch(model, self.tokenizer, prompts, DEFAULT_NEW_TOKENS, batch_size)
            return [answer.text for answer in answers]
        texts = []
        with evaluating(model), torch.no_grad():
            for prompt in prompts:  # one by one: without padding, any configuration and any model can be used
                ids = torch.tensor([prompt], device=model.device)
                output = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.generation_config
                )
                texts.append(self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
        return texts

    def _log(self, rows: Sequence[tuple[str, str, str]], folder: Path, report_to: Sequence[str]) -> None:
        names = ("step", "prompt", "completion")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE_NAME).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
        logger.info("step %s: %d answers in %s", rows[0][0] if rows else "?", len(rows), folder / FILE_NAME)
        if "wandb" in report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({"completions": wandb.Table(columns=list(names), data=[list(row) for row in self.table])})
        if "comet_ml" in report_to:
            import comet_ml
            import pandas as pd

            experiment = comet_ml.get_running_experiment()
            if experiment is not None:
                experiment.log_table("completions.csv", tabular_data=pd.DataFrame(self.table, columns=list(names)))


def _prompts(dataset: Any, tokenizer: Any, num_prompts: int | None) -> list[list[int]]:
    """Return the token ids of the prompts of evaluation rows.

    Raises:
        ValueError: The rows are a stream, or have neither prompts nor tokens that come before a trained one.
    """
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"LogCompletionsCallback reads its prompts again and again, and the evaluation rows are a "
            f"{type(dataset).__name__}; give a Dataset"
        )
    if "prompt" in dataset.column_names:
        kept = dataset if num_prompts is None else dataset.select(range(min(num_prompts, len(dataset))))
        texts = [maybe_apply_chat_template({"prompt": prompt}, tokenizer)["prompt"] for prompt in kept["prompt"]]
        are_chats = [not isinstance(prompt, str) for prompt in kept["prompt"]]
        return [
            tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
            for text, is_chat in zip(texts, are_chats, strict=True)
        ]
    found: list[list[int]] = []
    if "input_ids" in dataset.column_names and "labels" in dataset.column_names:
        for row in dataset:
            found += _prompts_of_row(row)
            if num_prompts is not None and len(found) >= num_prompts:
                break
    if not found:
        raise ValueError(
            f"the evaluation rows have the columns {dataset.column_names} and no prompts: give prompt and completion, "
            "or conversations with assistant_only_loss=True"
        )
    return found[:num_prompts]


def _prompts_of_row(row: dict[str, Any]) -> list[list[int]]:
    """Return for each document of a row the tokens before its last run of trained ones, where there are some."""
    ids, labels = row["input_ids"], row["labels"]
    prompts, start = [], 0
    for length in row.get("seq_lengths") or [len(ids)]:
        trained = [place for place in range(start, start + length) if labels[place] != IGNORE_INDEX]
        place = trained[-1] if trained else start
        while place > start and labels[place - 1] != IGNORE_INDEX:
            place -= 1
        if trained and place > start:
            prompts.append(list(ids[start:place]))
        start += length
    return prompts
