"""NEFTune's noise has the size of the paper for each document, and is only added in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from sft.batches.layout import document_layout
from sft.train import neftune
from sft.train.neftune import embedding_noise
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

ALPHA, WIDTH = 5.0, 16


def noise_of(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """What is added to each embedding, `(batch, length, width)`; read after the hook that adds the noise."""
    seen: list[torch.Tensor] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[0] - embedding.weight[inputs["input_ids"]].detach()


def largest(noise: torch.Tensor) -> float:
    return noise.abs().max().item()


def limit(length: int) -> float:
    return ALPHA / (length * WIDTH) ** 0.5


def assert_scaled(noise: torch.Tensor, length: int) -> None:
    """Uniform up to the limit: never beyond it, close to it somewhere, half of it on average."""
    assert 0.9 * limit(length) < largest(noise) <= limit(length) * (1 + 1e-5)
    assert noise.abs().mean().item() == pytest.approx(limit(length) / 2, rel=0.2)


def test_noise_of_a_row_is_scaled_by_its_length() -> None:
    model = tiny_model().train()
    with embedding_noise(model, ALPHA):
        noise = noise_of(model, input_ids=torch.ones(2, 20, dtype=torch.long))
    assert_scaled(noise, 20)


def test_noise_in_packed_rows_is_scaled_by_each_documents_length() -> None:
    model = tiny_model(attn_implementation="sft_documents").train()
    ids, places = torch.ones(1, 70, dtype=torch.long), torch.cat([torch.arange(10), torch.arange(60)])[None]
    with embedding_noise(model, ALPHA), document_layout([10, 60]):
        noise = noise_of(model, input_ids=ids, position_ids=places)
    assert_scaled(noise[:, :10], 10)
    assert_scaled(noise[:, 10:], 60)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
def test_padding_does_not_count_as_length(adapted: bool) -> None:
    model = tiny_model().train()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).train()
    mask = torch.zeros(2, 60, dtype=torch.long)
    mask[0, :60], mask[1, :10] = 1, 1
    with embedding_noise(model, ALPHA):
        noise = noise_of(model, input_ids=torch.ones(2, 60, dtype=torch.long), attention_mask=mask)
    assert_scaled(noise[0], 60)
    assert_scaled(noise[1, :10], 10)


def test_evaluation_is_without_noise() -> None:
    model = tiny_model().eval()
    with embedding_noise(model, ALPHA):
        assert largest(noise_of(model, input_ids=torch.ones(1, 20, dtype=torch.long))) == 0


def test_hooks_are_removed_after_the_block_even_after_an_error() -> None:
    model = tiny_model().train()
    with pytest.raises(ZeroDivisionError), embedding_noise(model, ALPHA):
        raise ZeroDivisionError
    assert largest(noise_of(model, input_ids=torch.ones(1, 20, dtype=torch.long))) == 0
    assert not model._forward_pre_hooks
    assert not model.get_input_embeddings()._forward_hooks


def test_alpha_of_none_adds_no_noise_and_one_below_zero_is_refused() -> None:
    model = tiny_model().train()
    with embedding_noise(model, None):
        assert largest(noise_of(model, input_ids=torch.ones(1, 20, dtype=torch.long))) == 0
    with pytest.raises(ValueError, match="above 0, found -1"), embedding_noise(model, -1):
        pass


def test_trainer_adds_noise_in_training_steps_only_and_leaves_no_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy: list[torch.Tensor] = []
    lengths_of = neftune.document_length_of_tokens

    def watched(*args: Any) -> torch.Tensor:
        noisy.append(lengths_of(*args))
        return noisy[-1]

    monkeypatch.setattr(neftune, "document_length_of_tokens", watched)
    rows = Dataset.from_dict({"input_ids": [[5] * 6, [7] * 10]})
    config = quiet_config(
        tmp_path,
        save_strategy="no",
        packing=True,
        max_length=16,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        neftune_noise_alpha=ALPHA,
    )
    model = tiny_model()
    trainer = SFTTrainer(model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    assert [lengths.tolist() for lengths in noisy] == [[[10.0] * 10 + [6.0] * 6]] * 2
    assert not model.get_input_embeddings()._forward_hooks
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert len(noisy) == 2


def test_noise_can_be_added_by_hand_as_the_trainer_of_transformers_4_did(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    config = quiet_config(tmp_path, neftune_noise_alpha=ALPHA, max_steps=1)
    trainer = SFTTrainer(tiny_model(), config, train_dataset=rows, processing_class=tiny_tokenizer())
    model = trainer._activate_neftune(trainer.model).train()
    ids = torch.tensor([[1, 0, 1]])
    assert largest(noise_of(model, input_ids=ids)) > 0
    trainer.neftune_hook_handle.remove()
    assert largest(noise_of(model, input_ids=ids)) == 0
