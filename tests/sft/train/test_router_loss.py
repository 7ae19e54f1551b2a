"""The loss that balances the load of experts: the same for padded, joined and packed rows, and part of the figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F

from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer
from tests.tiny_moe import tiny_moe

pytestmark = pytest.mark.numerics

LENGTHS = (9, 4, 13, 6)
WEIGHT = 0.5
BALANCED = ("mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "granitemoe", "olmoe", "phimoe")
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "joined": {"padding_free": True},
    "packed": {"packing": True, "max_length": 20},
}


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def moe(family: str) -> Any:
    model = tiny_moe(family)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def trainer_of(folder: Path, model: Any, **options: Any) -> SFTTrainer:
    rows = Dataset.from_dict({"input_ids": documents()})
    given = {"per_device_train_batch_size": 4, "max_steps": 1, "router_aux_loss_coef": WEIGHT, **options}
    config = quiet_config(folder, save_strategy="no", **given)
    return SFTTrainer(model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer())


@contextmanager
def routers_recorded(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the logits `(tokens, experts)` of every router that runs inside the block."""
    recorded: list[torch.Tensor] = []
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(lambda *call: recorded.append(call[-1][0])) for router in routers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def by_definition(model: Any, batches: list[list[list[int]]]) -> float:
    """Compute cross entropy and balancing loss of an update in plain loops, document by document."""
    total_targets = sum(len(row) - 1 for batch in batches for row in batch)
    loss = torch.zeros(())
    for batch in batches:
        with routers_recorded(model) as routed:
            for row in batch:
                ids = torch.tensor(row)
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                loss = loss + F.cross_entropy(logits, ids[1:], reduction="sum") / total_targets
        num_targets = sum(len(row) - 1 for row in batch)
        loss = loss + WEIGHT * balance_of(torch.cat(routed)) * num_targets / total_targets
    loss.backward()
    return loss.item()


def balance_of(logits: torch.Tensor) -> torch.Tensor:
    """Compute the balancing loss of two chosen experts per token, from `(tokens of all layers, experts)`."""
    num_tokens, num_experts = logits.shape
    chosen, probability = [0] * num_experts, [torch.zeros(())] * num_experts
    for token in logits:
        probabilities = token.softmax(-1)
        for expert in probabilities.topk(2).indices.tolist():
            chosen[expert] += 1
        probability = [known + new for known, new in zip(probability, probabilities, strict=True)]
    pairs = zip(chosen, probability, strict=True)
    return num_experts * torch.stack([count / num_tokens * mass / num_tokens for count, mass in pairs]).sum()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def rows_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    if "seq_lengths" in batch:
        return [part.tolist() for part in batch["input_ids"][0].split(batch["seq_lengths"].tolist())]
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def one_update(trainer: SFTTrainer) -> tuple[float, list[list[list[int]]]]:
    """Run the forward and backward passes of an update of all batches; return its loss and its documents."""
    batches = list(trainer.get_train_dataloader())
    num_items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    losses = [trainer.training_step(trainer.model.train(), dict(batch), num_items).item() for batch in batches]
    return sum(losses), [rows_of(batch) for batch in batches]


def assert_as_defined(trainer: SFTTrainer, reference: Any) -> None:
    loss, batches = one_update(trainer)
    assert sorted(row for batch in batches for row in batch) == sorted(documents())
    assert loss == pytest.approx(by_definition(reference, batches), rel=1e-5)
    found = gradients(trainer.model)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", BALANCED)
def test_loss_and_gradients_are_those_of_the_definition(family: str, layout: str, tmp_path: Path) -> None:
    jitter = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0} if family == "phimoe" else {}
    model, reference = moe(family), moe(family)
    for module in [*model.modules(), *reference.modules()]:
        for name in set(jitter) & set(vars(module)):
            setattr(module, name, 0.0)
    assert_as_defined(trainer_of(tmp_path, model, **LAYOUTS[layout]), reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_of_several_batches_weighs_each_by_its_targets(layout: str, tmp_path: Path) -> None:
    options = {**LAYOUTS[layout], "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_as_defined(trainer_of(tmp_path, moe("qwen3_moe"), **options), moe("qwen3_moe"))


def test_checkpointed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, moe("qwen3_moe"), gradient_checkpointing=True, padding_free=True)
    trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    assert_as_defined(trainer, moe("qwen3_moe"))


def test_router_loss_is_part_of_the_figures(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, moe("mixtral"), logging_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    train, evaluation = trainer.state.log_history[:2]
    assert 0.9 * WEIGHT < train["aux_loss"] < 4 * WEIGHT
    assert evaluation["eval_aux_loss"] > 0
    without = trainer_of(tmp_path, moe("mixtral"), router_aux_loss_coef=0.0)
    assert "eval_aux_loss" not in without.evaluate()


def test_adapter_trains_with_the_loss_of_frozen_routers(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": documents()})
    trainer = SFTTrainer(
        moe("mixtral"),
        args=quiet_config(tmp_path, max_steps=1, router_aux_loss_coef=WEIGHT, logging_steps=1, save_strategy="no"),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0


def test_model_that_returns_no_loss_of_its_routers_is_refused(tmp_path: Path) -> None:
    for family in ("glm4_moe", "llama4_text"):
        with pytest.raises(ValueError, match=r"returns no load-balancing loss.*router_aux_loss_coef=0.5 would have no"):
            trainer_of(tmp_path, tiny_moe(family))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a Mixture-of-Experts model"):
        trainer_of(tmp_path, tiny_model())


def test_weight_has_another_name_in_some_configurations(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_moe("jetmoe"), padding_free=False)
    assert (trainer.router_aux_loss_coef, trainer.model.config.aux_loss_coef) == (WEIGHT, WEIGHT)
    assert trainer.evaluate()["eval_aux_loss"] > 0


def test_padding_that_the_loss_would_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pad_to_multiple_of=8 adds padding to joined rows"):
        trainer_of(tmp_path, moe("mixtral"), padding_free=True, pad_to_multiple_of=8)
    trainer_of(tmp_path, moe("mixtral"), padding_free=False, pad_to_multiple_of=8)


def test_loss_function_of_the_user_must_add_it_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.5 would be ignored, as compute_loss_func"):
        SFTTrainer(
            moe("mixtral"),
            args=quiet_config(tmp_path, router_aux_loss_coef=0.5),
            train_dataset=Dataset.from_dict({"input_ids": documents()}),
            processing_class=tiny_tokenizer(),
            compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum(),
        )
