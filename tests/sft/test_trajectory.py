"""Twenty training steps give the losses and weights of a plain loop, however an update is divided into batches."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback

from sft.config import SFTConfig
from sft.train.trainer import SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_moe import tiny_moe

pytestmark = pytest.mark.numerics

NUM_STEPS = 20
LEARNING_RATE = 3e-3
ROWS = [
    {"prompt": f"What is {number} and {number}?", "completion": f" It is {2 * number}." * (1 + number % 3)}
    for number in range(8)
]

OPTIONS = {
    "num_train_epochs": NUM_STEPS,
    "max_length": 64,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def plain_tokens() -> list[tuple[list[int], int]]:
    """Return the ids of each row and how many of them belong to the prompt, from the tokenizer alone."""
    tokenizer = tiny_tokenizer()
    rows = []
    for row in ROWS:
        encoded = tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True)
        num_prompt = sum(start < len(row["prompt"]) for start, _ in encoded["offset_mapping"])
        rows.append(([*encoded["input_ids"], tokenizer.eos_token_id], num_prompt))
    return rows


@cache
def plain_loop(label_smoothing: float = 0.0, dft: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train row by row with torch's cross entropy and AdamW, and a learning rate that falls to 0."""
    model, rows = tiny_model().train(), plain_tokens()
    num_targets = sum(len(ids) - num_prompt for ids, num_prompt in rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / NUM_STEPS)
        total = 0.0
        for ids, num_prompt in rows:
            logits = model(torch.tensor([ids])).logits[0, num_prompt - 1 : -1]
            targets = torch.tensor(ids[num_prompt:])
            each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
            each = each * torch.exp(-each.detach()) if dft else each
            (each.sum() / num_targets).backward()
            total += each.sum().item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / num_targets)
    return losses, {name: value.detach().clone() for name, value in model.named_parameters()}


def make(folder: Path, model: Any = None, **options: Any) -> SFTTrainer:
    """Return a trainer that makes one update per epoch, on all rows."""
    config = SFTConfig(output_dir=str(folder), use_cpu=True, **{**OPTIONS, **options})
    return SFTTrainer(
        model or tiny_model(), args=config, train_dataset=Dataset.from_list(ROWS), processing_class=tiny_tokenizer()
    )


def logged(trainer: SFTTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


WHOLE = {"per_device_train_batch_size": 8}
PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    "layout",
    [
        WHOLE,
        PARTS,
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        {**WHOLE, "padding_free": True},
        {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"packing": True, "packing_strategy": "bfd_split", "per_device_train_batch_size": 2, "max_length": 128}
        | {"gradient_accumulation_steps": 8},
        {**WHOLE, "gradient_checkpointing": True},
        {**WHOLE, "padding_free": True, "gradient_checkpointing": True},
        {**WHOLE, "optim": "adamw_torch"},
    ],
    ids=str,
)
def test_losses_and_weights_are_those_of_a_plain_loop(tmp_path: Path, layout: dict[str, Any]) -> None:
    trainer = make(tmp_path, **layout)
    trainer.train()
    losses, weights = plain_loop()
    assert logged(trainer) == pytest.approx(losses, abs=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("options", "reference"),
    [({"label_smoothing_factor": 0.1}, {"label_smoothing": 0.1}), ({"loss_type": "dft"}, {"dft": True})],
    ids=["label smoothing", "dft"],
)
@pytest.mark.parametrize("layout", [WHOLE, {**WHOLE, "padding_free": True}], ids=["padded", "flat"])
def test_label_smoothing_and_dft_equal_a_plain_loop_with_their_formulas(
    tmp_path: Path, layout: dict[str, Any], options: dict[str, Any], reference: dict[str, Any]
) -> None:
    trainer = make(tmp_path, **layout, **options)
    trainer.train()
    assert logged(trainer) == pytest.approx(plain_loop(**reference)[0], abs=1e-5)


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first update."""

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        if not hasattr(self, "gradients"):
            self.gradients = {name: value.grad.clone() for name, value in model.named_parameters()}


def test_accumulated_gradients_are_those_of_one_big_batch(tmp_path: Path) -> None:
    gradients = []
    for layout in (WHOLE, PARTS, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}):
        trainer, kept = make(tmp_path, max_grad_norm=0.0, max_steps=1, **layout), FirstGradients()
        trainer.add_callback(kept)
        trainer.train()
        gradients.append(kept.gradients)
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_logged_losses_weigh_tokens_and_not_updates(tmp_path: Path) -> None:
    trainer = make(tmp_path, per_device_train_batch_size=3, max_steps=3, logging_steps=3, learning_rate=0.0)
    trainer.train()
    assert logged(trainer) == pytest.approx([plain_loop()[0][0]], abs=1e-5)


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}], ids=["padded", "flat"])
def test_tokens_seen_do_not_count_padding_and_continue_after_a_resume(tmp_path: Path, layout: dict[str, Any]) -> None:
    options = {**layout, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2}
    num_tokens = sum(len(ids) for ids, _ in plain_tokens())
    whole = make(tmp_path / "whole", **options, max_steps=6)
    whole.train()
    stopped = make(tmp_path / "stopped", **options, max_steps=6)
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(whole, "num_tokens")[2] == num_tokens  # an epoch is three batches
    assert logged(whole, "num_tokens")[-1] == 2 * num_tokens
    assert logged(stopped, "num_tokens") == logged(whole, "num_tokens")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_full_training_of_experts_is_resumed_from_weights_saved_under_other_names(tmp_path: Path, family: str) -> None:
    options = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    whole, resumed = (make(folder, model=tiny_moe(family), **options) for folder in folders)
    whole.train()
    resumed.train(resume_from_checkpoint=str(folders[0] / "checkpoint-2"))
    expected = whole.model.state_dict()
    start = tiny_moe(family).state_dict()
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert (expected["model.embed_tokens.weight"] - start["model.embed_tokens.weight"]).abs().max() > 1e-3


def test_tokens_are_counted_with_their_padding_or_not_at_all_when_asked(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "padding_free": False}
    padded = 8 * max(len(ids) for ids, _ in plain_tokens())
    counted = make(tmp_path, include_num_input_tokens_seen="all", **options)
    silent = make(tmp_path, include_num_input_tokens_seen="no", **options)
    for trainer in (counted, silent):
        trainer.train()
    assert logged(counted, "num_tokens") == [padded]
    assert not any("num_tokens" in entry for entry in silent.state.log_history)


def test_accuracy_and_entropy_are_means_over_tokens(tmp_path: Path) -> None:
    entries = []
    for layout in (WHOLE, PARTS, {**WHOLE, "padding_free": True}):
        trainer = make(tmp_path, **layout, log_entropy=True, max_steps=1)
        trainer.train()
        entries.append([logged(trainer, name)[0] for name in ("mean_token_accuracy", "entropy")])
    # an entropy of 6 is known to 5e-7 in single precision: whatever is closer than a few of those is the same
    assert all(entry == pytest.approx(entries[0], rel=1e-6) for entry in entries)
    assert 0 < entries[0][1] < math.log(tiny_model().config.vocab_size)
