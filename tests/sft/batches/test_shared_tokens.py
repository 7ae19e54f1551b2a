"""Shared beginnings are computed once, tokens after the last targets never, and the training step is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from sft.batches.collator import DataCollatorForSFT
from sft.batches.shared_tokens import share_tokens
from sft.labels import IGNORE_INDEX
from sft.train.batches import probe_sharing, refuse_sharing_reason
from sft.train.trainer import SFTTrainer
from tests.sft.test_families import FAMILIES, assert_same, first_step, make
from tests.tiny import quiet_config, tiny_tokenizer

pytestmark = pytest.mark.numerics

P, Q, A, B, C, R, D, E = range(10, 18)


def plan(documents: list[list[int]], targets: list[list[bool]], weights: list[float] | None = None) -> Any:
    """Return the plan for documents of which these tokens are targets."""
    input_ids = np.concatenate([np.array(document) for document in documents])
    is_target = np.concatenate([np.array(flags) for flags in targets])
    labels = np.where(is_target, input_ids, IGNORE_INDEX)
    lengths = np.array([len(document) for document in documents])
    return share_tokens(input_ids, labels, lengths, None if weights is None else np.array(weights))


def last_only(document: list[int]) -> list[bool]:
    return [False] * (len(document) - 1) + [True]


def test_common_beginnings_are_computed_once_and_last_targets_never() -> None:
    documents = [[P, Q, A, B], [P, Q, C], [P, R, D, E]]
    found = plan(documents, [last_only(document) for document in documents])
    assert found.computed.tolist() == [0, 1, 2, 8, 9]
    assert found.places.tolist() == [0, 1, 2, -1, 0, 1, -1, 0, 3, 4, -1]
    assert found.attended_lengths.tolist() == [3, 2, 3]


def test_tokens_after_the_last_target_are_cut() -> None:
    found = plan([[P, Q, A, B], [Q, C, D]], [[False, True, False, False], [False, False, False]])
    assert found.computed.tolist() == [0]
    assert found.places.tolist() == [0, -1, -1, -1, -1, -1, -1]
    assert found.attended_lengths.tolist() == [1]


def test_a_label_of_weight_zero_is_not_a_target() -> None:
    found = plan([[P, Q, A], [R, D, E]], [[False, True, True], [False, True, True]], [1, 1, 0, 1, 1, 1])
    assert found.attended_lengths.tolist() == [1, 2]


def test_beginnings_that_save_too_little_are_computed_again() -> None:
    documents = [[P, *range(20, 120)], [P, *range(140, 240)]]
    found = plan(documents, [last_only(document) for document in documents])
    assert found.computed.tolist() == [*range(100), *range(101, 201)]


def test_a_row_without_targets_has_no_plan() -> None:
    assert plan([[P, Q], [P, Q]], [[False, False], [False, False]]) is None


def shared_rows() -> list[dict[str, list[int]]]:
    """Return documents that share beginnings, one of them twice; some train all tokens, some the last ones only."""
    generator = torch.Generator().manual_seed(5)
    begin, question = (torch.randint(4, 300, (length,), generator=generator).tolist() for length in (9, 6))
    ends = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in (7, 3, 11, 5)]
    documents = [begin + question + ends[0], begin + ends[1], begin + question + ends[2], ends[3], begin + ends[1]]
    rows = []
    for number, ids in enumerate(documents):
        labels = ids if number % 2 else [IGNORE_INDEX] * (len(ids) - 3) + ids[-3:-1] + [IGNORE_INDEX]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trainer_for(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> SFTTrainer:
    peft_config = options.pop("peft_config", None)
    arguments = {"padding_free": True, "per_device_train_batch_size": 8, "max_steps": 1, **options}
    return SFTTrainer(
        model,
        args=quiet_config(folder, **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"loss_type": "dft"}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_step_equals_the_step_on_all_tokens(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    shared = first_step(trainer_for(make(name, None), tmp_path, shared_rows(), **options))
    whole = first_step(trainer_for(make(name, None), tmp_path, shared_rows(), share_tokens=False, **options))
    assert len(shared[2]["computed"]) < 0.7 * shared[2]["input_ids"].shape[1]
    assert "computed" not in whole[2]
    assert_same(shared[:2], whole[:2])


def test_adapters_and_weighted_tokens_give_the_same_step(tmp_path: Path) -> None:
    rows = [{**row, "loss_weights": [0.5 + place % 2 for place in range(len(row["labels"]))]} for row in shared_rows()]
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    steps = []
    for share in (True, False):
        steps.append(
            first_step(trainer_for(make("llama", None), tmp_path, rows, share_tokens=share, peft_config=config))
        )
    assert "computed" in steps[0][2]
    assert_same(steps[0][:2], steps[1][:2])


def test_evaluation_is_the_same_and_every_token_is_counted(tmp_path: Path) -> None:
    figures = []
    for share in (True, False):
        trainer = trainer_for(make("llama", None), tmp_path, shared_rows(), share_tokens=share)
        trainer.train()
        figures.append((trainer.evaluate(trainer.train_dataset)["eval_loss"], trainer.state.num_input_tokens_seen))
    assert figures[0][0] == pytest.approx(figures[1][0], rel=1e-5)
    assert figures[0][1] == figures[1][1] == sum(len(row["input_ids"]) for row in shared_rows())


def test_metrics_on_logits_get_those_of_every_token(tmp_path: Path) -> None:
    seen = []
    trainer = trainer_for(make("llama", None), tmp_path, shared_rows())
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions.shape) or {}
    trainer.evaluate(trainer.train_dataset)
    assert seen[0][:2] == (1, sum(len(row["input_ids"]) for row in shared_rows()))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {"share_tokens": False}, "share_tokens is off"),
        ("llama", {"neftune_noise_alpha": 5.0}, "NEFTune"),
        ("llama", {"padding_free": False}, "padded"),
    ],
)
def test_the_reason_against_sharing_is_stated(
    family: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    trainer = trainer_for(make(family, None), tmp_path, shared_rows(), **options)
    assert reason in trainer.sharing
    assert "computed" not in next(iter(trainer.get_train_dataloader()))


def test_dropout_speaks_against_sharing(tmp_path: Path) -> None:
    config = quiet_config(tmp_path, padding_free=True)
    collator = DataCollatorForSFT(pad_token_id=3, padding_free=True)
    model = make("llama", "sft_documents")
    assert refuse_sharing_reason(model, config, collator) is None
    model.config.attention_dropout = 0.1
    assert "dropout" in str(refuse_sharing_reason(model, config, collator))


def test_probe_finds_a_model_whose_layers_mix_neighbours() -> None:
    model = make("llama", "sft_documents")
    assert probe_sharing(model) is None
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1))
    assert "computing common beginnings once changes the logits of llama by" in str(probe_sharing(model))
