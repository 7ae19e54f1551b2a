"""Answers to a few held-out prompts at each evaluation of a training, with their scores.

Answers are greedy, and random number generators are left as they are, so that the trained weights do not depend on
whether there are samples.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback

from sft.evaluate.generation import Generation, generate_batch, reference_text
from sft.evaluate.tasks import Task
from sft.train.trainer import SFTTrainer
from stages.checkout.artifacts import read_jsonl, write_jsonl
from stages.checkout.foreign_text import as_code_block, for_markdown
from stages.checkout.paths import Paths
from stages.params.figures import STOP_RATE
from stages.params.schema import SamplesSection, TrainSection
from stages.params.tasks import load_tasks, task_names
from stages.progress import show_page
from stages.training.selection import SAMPLE_PREFIX

FILE = "samples.jsonl"
"""File with the answers, next to the checkpoints: one row per look at the model."""

ALWAYS_ALLOWED_S = 10.0
"""Seconds that answers may take whatever their share of the training time is."""


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts that are answered during training.

    Args:
        rows: Prompts with `id`, `prompt` and `reference`.
        token_ids: Token ids of the prompts.
        task: Scores the answers; None = they are not scored.
    """

    rows: list[dict[str, Any]]
    token_ids: list[list[int]]
    task: Task | None

    @classmethod
    def read(cls, section: SamplesSection, paths: Paths, tokenizer: PreTrainedTokenizerBase) -> SamplePrompts:
        """Choose prompts of held-out rows by the section's seed; prompts with images are not chosen.

        Raises:
            ValueError: The task can't score against a reference; names the row.
        """
        task = None if section.task is None else load_tasks(section.task, paths.root)
        file = paths.out("format", "prompts.jsonl")
        every = list(read_jsonl(file)) if section.count else []
        found = [row for row in every if not row.get("images")]
        if len(found) < len(every):
            print(
                f"note: train.samples answers prompts without images only, and {len(every) - len(found)} of "
                f"{len(every)} held-out rows have images",
                flush=True,
            )
        chosen = sorted(random.Random(section.seed).sample(range(len(found)), min(section.count, len(found))))
        rows = []
        for row in (found[number] for number in chosen):
            reference = reference_text(row["prompt"], row["reference"], tokenizer)
            try:
                if task is not None:
                    task.check_reference(reference)
            except ValueError as error:
                names = ", ".join(task_names(section.task or []))
                raise ValueError(f"train.samples.task is {names}, held-out row {row['id']}: {error}") from None
            rows.append({**row, "reference": reference})
        token_ids = [
            tokenizer(row["prompt"], add_special_tokens=row["add_special_tokens"])["input_ids"] for row in rows
        ]
        return cls(rows, token_ids, task)

    def scores(self, answers: Sequence[Generation]) -> list[dict[str, float]]:
        """Return the scores of each answer."""
        if self.task is None:
            return [{} for _ in answers]
        pairs = zip(answers, self.rows, strict=True)
        return [self.task.score(answer.text, row["reference"]) for answer, row in pairs]

    def figures(self, answers: Sequence[Generation], scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the figures of all answers, under the names of `evaluate`."""
        figures = {name: fmean(row[name] for row in scores) for name in (scores[0] if scores else {})}
        if self.task is not None:
            references = [row["reference"] for row in self.rows]
            of_all = self.task.summarize([answer.text for answer in answers], references)
            figures |= {name: figure.value for name, figure in of_all.items()}
        return {**figures, STOP_RATE: fmean(answer.stopped for answer in answers)}


class Samples(TrainerCallback):
    """Callback that answers the prompts before the first step and at each evaluation.

    Args:
        trainer: The trainer.
        section: Section `train` of params.yaml.
        prompts: The prompts.

    Attributes:
        seconds: Time that answers have taken in this process.
        num_skipped: Number of evaluations without answers, since they would have taken too long.
    """

    def __init__(self, trainer: SFTTrainer, section: TrainSection, prompts: SamplePrompts) -> None:
        self._trainer, self._section, self._prompts = trainer, section.samples, prompts
        self._limit = None if section.samples_decide() else section.samples.max_share
        self._file = Path(trainer.args.output_dir or ".") / FILE
        self._began, self._last = time.monotonic(), 0.0
        self.seconds, self.num_skipped = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Discard answers of steps that a resumed training repeats; answer before the first step of a new one."""
        self._began = time.monotonic()
        if state.is_world_process_zero:
            past = list(read_jsonl(self._file)) if self._file.exists() else []
            write_jsonl(self._file, [look for look in past if state.global_step and look["step"] <= state.global_step])
        if state.global_step == 0:
            self._look(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer the prompts and log the figures, unless the time is up."""
        if not self._has_time():
            self.num_skipped += 1
            return
        self._trainer.log({f"{SAMPLE_PREFIX}{name}": value for name, value in self._look(state).items()})

    def _has_time(self) -> bool:
        if self._limit is None:
            return True
        allowed = max(ALWAYS_ALLOWED_S, self._limit * (time.monotonic() - self._began))
        decision = [self.seconds + self._last <= allowed]
        broadcast_object_list(decision)  # the clocks of processes differ
        return decision[0]

    def _look(self, state: Any) -> dict[str, float]:
        started = time.monotonic()
        answers = self._answer()
        scores = self._prompts.scores(answers)
        if state.is_world_process_zero:
            rows = [
                {"text": answer.text, "stopped": answer.stopped, "scores": row}
                for answer, row in zip(answers, scores, strict=True)
            ]
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "answers": rows}, ensure_ascii=False) + "\n")
            show_page("samples", samples_markdown(self._prompts.rows, rows, state.global_step))
        self._last = time.monotonic() - started
        self.seconds += self._last
        return self._prompts.figures(answers, scores)

    def _answer(self) -> list[Generation]:
        """Answer all prompts; processes that have the whole model divide them."""
        trainer, prompts = self._trainer, self._prompts.token_ids
        accelerator = trainer.accelerator
        model = accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        rank, world = (0, 1) if is_sharded else (trainer.args.process_index, trainer.args.world_size)
        with unchanged_random_state(), accelerator.autocast():
            own = generate_batch(
                model,
                trainer.processing_class,
                prompts[rank::world],
                self._section.max_new_tokens,
                batch_size=max(1, len(prompts)),
            )
        if world == 1:
            return own
        numbered = gather_object([(rank + world * number, answer) for number, answer in enumerate(own)])
        return [answer for _, answer in sorted(numbered, key=lambda pair: pair[0])]


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Restore the states of all random number generators after the block."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def samples_markdown(prompts: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], step: int) -> str:
    """Return the answers of one look at the model as Markdown.

    Args:
        prompts: Prompts with `id` and `reference`.
        answers: Their answers with `text` and `scores`.
        step: Step of the training.
    """
    lines = [f"Answers after step {step}", ""]
    for prompt, answer in zip(prompts, answers, strict=True):
        scores = ", ".join(f"{name} {value:.4g}" for name, value in answer["scores"].items())
        lines += [f"**{for_markdown(str(prompt['id']))}** {for_markdown(scores)}".rstrip(), ""]
        lines += ["expected:", "", as_code_block(prompt["reference"]), "", "answered:", ""]
        lines += [as_code_block(answer["text"] or " "), ""]
    return "\n".join(lines)


def samples_by_prompt(prompts: SamplePrompts, folder: Path) -> list[dict[str, Any]]:
    """Return one row per prompt with its answers in the order of steps, for outs/train/samples.jsonl.

    Args:
        prompts: The prompts.
        folder: Folder of the training's checkpoints.
    """
    file = folder / FILE
    looks = list(read_jsonl(file)) if file.exists() else []
    return [
        {
            **{name: row[name] for name in ("id", "prompt", "reference")},
            "answers": [{"step": look["step"], **look["answers"][number]} for look in looks],
        }
        for number, row in enumerate(prompts.rows)
    ]
