"""Loading a checkpoint, and evaluating a model, leave its weights as they are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedModel

from sft.export.merge import merge_adapter
from sft.export.proof import logits_of
from sft.models.adapters import wrap_adapter
from sft.models.loading import keep_weights, load_model
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, random_model, tiny_tokenizer

ROWS = [list(range(5, 25)), list(range(60, 70))]
PADDING = tiny_tokenizer().pad_token_id


def rwkv() -> PreTrainedModel:
    """A model whose last two layers are divided by 2 and 4 in evaluations of transformers."""
    return random_model("rwkv", None, num_hidden_layers=3, rescale_every=1, attention_hidden_size=16)


def youtu() -> PreTrainedModel:
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    return random_model("youtu", None, num_key_value_heads=2, **sizes)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []


def test_row_of_the_padding_token_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    model = youtu()
    assert model.get_input_embeddings().weight[PADDING].abs().min() > 0
    model.save_pretrained(tmp_path)
    assert_equal(weights_of(load_model(tmp_path)), weights_of(model))


def test_weights_that_a_checkpoint_lacks_are_still_initialized(tmp_path: Path) -> None:
    model = youtu()
    model.save_pretrained(tmp_path)
    larger = load_model(tmp_path, vocab_size=400, ignore_mismatched_sizes=True)
    assert larger.get_input_embeddings().weight.shape == (400, 16)
    std = larger.get_input_embeddings().weight.std().item()
    assert std == pytest.approx(larger.config.embedding_initializer_range, rel=0.1)
    assert torch.equal(larger.model.norm.weight, model.model.norm.weight)


def test_layers_of_rwkv_are_not_divided_in_evaluations(tmp_path: Path) -> None:
    rwkv().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    plain = rwkv()
    # not closer: the epsilon of norms is not divided
    torch.testing.assert_close(logits_of(model, ROWS), logits_of(plain, ROWS), rtol=0, atol=1e-3)
    assert_equal(weights_of(model), weights_of(rwkv()))
    divided, whole = (each.rwkv.blocks[2].attention.output.weight for each in (plain, model))
    assert torch.equal(divided * 4, whole)


def test_layers_of_rwkv_that_were_divided_already_are_restored() -> None:
    model = rwkv()
    logits_of(model, ROWS)
    keep_weights(model)
    assert_equal(weights_of(model), weights_of(rwkv()))
    copied = copy.deepcopy(model)
    logits_of(copied, ROWS)
    assert_equal(weights_of(copied), weights_of(rwkv()))


def test_adapter_on_rwkv_computes_the_same_in_training_and_evaluation_and_merged(tmp_path: Path) -> None:
    rwkv().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["output", "key"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = wrap_adapter(rwkv(), config)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = model.train()(torch.tensor(ROWS[:1]), use_cache=False).logits[0]
    torch.testing.assert_close(logits_of(model, ROWS[:1])[0], trained, rtol=1e-5, atol=1e-5)
    report = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", ROWS, tolerance=1e-4)
    assert report.max_logit_diff < 1e-4 < report.adapter_effect
    torch.testing.assert_close(logits_of(load_model(tmp_path / "merged"), ROWS[:1])[0], trained, rtol=1e-4, atol=1e-4)


def test_checkpoint_of_rwkv_after_an_evaluation_holds_the_trained_weights(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": ROWS})
    trainer = SFTTrainer(
        rwkv(),
        args=quiet_config(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, save_steps=1),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    name = "rwkv.blocks.2.attention.output.weight"
    trained, before = (dict(each.named_parameters())[name] for each in (trainer.model, rwkv()))
    assert torch.equal(saved[name], trained)
    torch.testing.assert_close(trained, before, rtol=0, atol=1e-3)
