"""Parameters that a training leaves as they are, or that no loss reaches, are named; healthy trainings have none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from sft.config import SFTConfig
from sft.optimizers.untrained import UNTRAINED
from sft.train.trainer import SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_moe import MOE_FAMILIES

ROWS = [{"prompt": f"What is {number}?", "completion": f" It is {number}."} for number in range(24)]
LORA = LoraConfig(r=2, target_modules="all-linear")


def make_trainer(
    folder: Path, model: PreTrainedModel | None = None, adapter: Any = None, tokenizer: Any = None, **options: Any
) -> SFTTrainer:
    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 7, "learning_rate": 1e-2, "save_strategy": "no", "max_length": 32, **options},
    )
    return SFTTrainer(
        model or tiny_model(),
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer or tiny_tokenizer(),
        peft_config=adapter,
    )


def trained(trainer: SFTTrainer, **arguments: Any) -> SFTTrainer:
    trainer.train(**arguments)
    return trainer


def found(trainer: SFTTrainer) -> list[tuple[int, str, int, str]]:
    """Step, modules, number of modules and problem of each finding."""
    entries = [entry for entry in trainer.state.log_history if UNTRAINED in entry]
    return [(e["step"], row["modules"], row["count"], row["problem"]) for e in entries for row in e[UNTRAINED]]


def after(module: nn.Module, change: Any) -> None:
    """Change what a module returns."""
    module.register_forward_hook(lambda module, inputs, output: change(output))


def test_a_detached_module_has_no_gradient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        after(layer.mlp.up_proj, torch.Tensor.detach)
    with caplog.at_level(logging.WARNING, logger="sft.optimizers.untrained"):
        trainer = trained(make_trainer(tmp_path, model))
    number = len(model.model.layers)
    assert found(trainer) == [(5, "model.layers.*.mlp.up_proj", number, "no gradient")]
    assert [record.getMessage() for record in caplog.records] == [
        "after 5 updates, parameters that are to be trained have no gradient (the loss does not depend on them): "
        f"model.layers.*.mlp.up_proj ({number} modules)"
    ]


def test_an_adapter_whose_layer_counts_for_nothing_has_a_gradient_of_zero(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, adapter=LORA)
    after(trainer.model.base_model.model.model.layers[1].self_attn.q_proj, lambda output: output * 0)
    attention = "base_model.model.model.layers.*.self_attn"
    assert found(trained(trainer)) == [
        (5, f"{attention}.q_proj", 1, "a gradient of exactly zero"),
        (5, f"{attention}.k_proj", 1, "a gradient of exactly zero"),  # which only the queries read
    ]


def test_without_a_learning_rate_nothing_changes_and_fail_ends_the_training(tmp_path: Path) -> None:
    problems = found(trained(make_trainer(tmp_path, adapter=LORA, learning_rate=0.0)))
    # LoRA's first matrix has no gradient as long as the second one is zero
    assert {problem for *_, problem in problems} == {"a gradient of exactly zero", "weights that do not change"}
    assert {modules.rpartition(".")[2] for _, modules, *_ in problems} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    failing = make_trainer(tmp_path, learning_rate=0.0, on_untrained="fail")
    with pytest.raises(
        ValueError, match=r"^after 5 updates, .* have weights that do not change .*on_untrained to warn"
    ):
        failing.train()
    assert failing.state.global_step == 5


@pytest.mark.parametrize("max_steps", [1, 2, 7])
@pytest.mark.parametrize("kind", ["full", "lora", "experts", "expert modules", "warm-up"])
def test_healthy_trainings_have_no_finding(kind: str, max_steps: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": max_steps, "on_untrained": "fail"}
    model, adapter = tiny_model(), LORA if kind in ("lora", "warm-up") else None
    if kind == "experts":
        model = tiny_model("mixtral", **MOE_FAMILIES["mixtral"])
    if kind == "expert modules":
        model.model.layers[0].mlp = Experts(model.model.layers[0].mlp)
    if kind == "warm-up" and max_steps > 1:
        options["warmup_steps"] = max_steps - 1
    assert found(trained(make_trainer(tmp_path, model, adapter, **options))) == []


class Experts(nn.Module):
    """Three copies of an MLP, of which all rows use the second one alone."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([type(mlp)(mlp.config) for _ in range(3)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.experts[1](states)


def test_weights_of_one_in_bfloat16_do_not_change_with_a_small_rate(tmp_path: Path) -> None:
    norms = {"model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm", "model.norm"}
    problems = found(trained(make_trainer(tmp_path, tiny_model().to(torch.bfloat16), learning_rate=1e-4)))
    assert {(modules, problem) for _, modules, _, problem in problems} == {
        (name, "weights that do not change") for name in norms
    }


def test_one_update_under_a_warm_up_trains_nothing(tmp_path: Path) -> None:
    problems = found(trained(make_trainer(tmp_path, max_steps=1, warmup_steps=1)))
    assert problems
    assert {problem for *_, problem in problems} == {"weights that do not change"}


def test_rows_of_tokens_are_untrained_if_no_row_of_the_training_has_them(tmp_path: Path) -> None:
    there, absent = tiny_tokenizer()("What")["input_ids"][0], tiny_tokenizer().convert_tokens_to_ids("<|endoftext|>")

    def adapter(*ids: int) -> LoraConfig:
        return LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=list(ids))

    def untied() -> PreTrainedModel:
        return tiny_model(tie_word_embeddings=False)  # a tied head has all tokens at every place

    assert found(trained(make_trainer(tmp_path, untied(), adapter(there, absent)))) == []
    ((step, modules, count, problem),) = found(trained(make_trainer(tmp_path, untied(), adapter(absent))))
    assert (step, count, problem) == (7, 1, "a gradient of exactly zero")
    assert modules.startswith("base_model.model.model.embed_tokens")


@pytest.mark.parametrize("save_steps", [3, 5, 6])
def test_a_resumed_training_finds_what_an_uninterrupted_one_finds(save_steps: int, tmp_path: Path) -> None:
    def make(**options: Any) -> SFTTrainer:
        trainer = make_trainer(
            tmp_path, adapter=LORA, save_strategy="steps", save_steps=save_steps, save_total_limit=None, **options
        )
        after(trainer.model.base_model.model.model.layers[0].mlp.down_proj, lambda output: output * 0)
        return trainer

    whole = trained(make(logging_steps=1))
    resumed = trained(make(logging_steps=1), resume_from_checkpoint=str(tmp_path / f"checkpoint-{save_steps}"))
    assert found(resumed) == found(whole)
    assert len(found(whole)) == 3  # an MLP's layers
