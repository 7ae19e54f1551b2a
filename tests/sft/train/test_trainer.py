"""The trainer gives the same losses and weights however its batches are laid out."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DeepseekV4Config, TrainerCallback
from transformers import trainer as trainer_module

from sft.config import SFTConfig
from sft.train.datasets import prepare_all
from sft.train.offloading import offloaded_activations
from sft.train.trainer import SFTTrainer, checkpointing_arguments, reading_only_version
from tests.tiny import tiny_model, tiny_tokenizer


class OwnForward(TrainerCallback):
    """Notes at each step whether a module runs its own forward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.is_own: list[bool] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.is_own.append("forward" not in vars(self.module))


ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Hello {number}"},
            {"role": "assistant", "content": f"answer {number * 7}" * (1 + number % 3)},
        ]
    }
    for number in range(8)
]


def make(folder: Path, *, streamed: bool = False, **options: Any) -> SFTTrainer:
    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=2,
        max_length=128,
        learning_rate=1e-2,
        assistant_only_loss=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    rows = Dataset.from_list(ROWS)
    return SFTTrainer(
        tiny_model(),
        args=config,
        train_dataset=rows.to_iterable_dataset() if streamed else rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize(
    "layout",
    [
        {"packing": True},
        {"padding_free": True},
        {"padding_free": True, "force_flash_sdp": True},
        {"packing": True, "force_flash_sdp": True},
    ],
)
def test_eval_loss_does_not_depend_on_the_layout_of_batches(tmp_path: Path, layout: dict[str, Any]) -> None:
    padded = make(tmp_path, per_device_eval_batch_size=3).evaluate()["eval_loss"]
    assert make(tmp_path, per_device_eval_batch_size=2, **layout).evaluate()["eval_loss"] == pytest.approx(
        padded, abs=1e-5
    )


def test_forced_flash_reaches_the_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, packing=True, force_flash_sdp=True)
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    class Watched:
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
            return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", Watched())
    for run in (trainer.train, trainer.evaluate):
        seen.clear()
        run()
        assert set(seen) == {(True, False)}


def test_forced_flash_needs_batches_without_padding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="force_flash_sdp=True cannot be used: it needs packing=True"):
        make(tmp_path, force_flash_sdp=True)


def test_adapter_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second = make(tmp_path, seed=3), make(tmp_path, seed=3)
    for (name, left), (_, right) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_train_dataset_shows_what_is_trained(tmp_path: Path) -> None:
    row = make(tmp_path).train_dataset[0]
    kept = [token for token in row["labels"] if token >= 0]
    assert tiny_tokenizer().decode(kept) == "answer 0<|im_end|>"


def test_unknown_dataset_kwargs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset_kwargs has unknown keys .*skip"):
        make(tmp_path, dataset_kwargs={"skip": True})


@pytest.mark.parametrize("streamed", [False, True])
def test_flat_and_streamed_batches_are_read_by_each_process(tmp_path: Path, streamed: bool) -> None:
    assert make(tmp_path, packing=not streamed, streamed=streamed).accelerator.dispatch_batches is False


class Watching:
    """Offloads from the CPU to the CPU, the way that activations take from an accelerator; keeps what was parked."""

    def __init__(self) -> None:
        self.num_bytes: list[int] = []

    @contextmanager
    def __call__(self, model: torch.nn.Module, *, enabled: bool) -> Iterator[None]:
        with offloaded_activations(model, enabled=enabled, devices=("cpu",)) as store:
            yield
        self.num_bytes.append(store.num_bytes if store is not None else 0)


def test_offloaded_activations_train_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching()
    monkeypatch.setattr("sft.train.trainer.offloaded_activations", watching)
    trainers = [make(tmp_path, activation_offloading=offloading) for offloading in (False, True)]
    for trainer in trainers:
        trainer.train()
    assert [size > 0 for size in watching.num_bytes] == [False, False, True, True]
    assert_same_weights(*trainers)


def assert_same_weights(first: SFTTrainer, second: SFTTrainer) -> None:
    for (name, left), (_, right) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(left, right), name


class Calls:
    """A hook that counts the runs of a module while it trains."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any) -> None:
        self.count += args[0].training


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}])
def test_checkpointed_layers_run_twice_and_train_the_same_adapter(
    tmp_path: Path, kwargs: dict[str, bool] | None
) -> None:
    plain = {"fused_lora": False, "fused_layers": False}  # these run the model to be proved
    trainers = [
        make(tmp_path, gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=kwargs, **plain)
        for checkpointing in (False, True)
    ]
    counts = [Calls(), Calls()]
    for trainer, calls in zip(trainers, counts, strict=True):
        trainer.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(calls)
        trainer.train()
    assert [calls.count for calls in counts] == [2, 4]
    assert trainers[1].args.activation_checkpointing_kwargs == (kwargs or {"use_reentrant": False})
    assert_same_weights(*trainers)


def test_tokens_seen_are_complete_at_the_end_even_if_nothing_was_logged(tmp_path: Path) -> None:
    trainer = make(tmp_path, per_device_train_batch_size=len(ROWS), logging_strategy="no")
    num_tokens = 2 * sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert trainer.train().metrics["num_input_tokens_seen"] == num_tokens


def test_tokens_seen_are_saved_in_a_checkpoint_even_if_nothing_was_logged(tmp_path: Path) -> None:
    make(tmp_path, per_device_train_batch_size=len(ROWS), logging_strategy="no", save_steps=1).train()
    states = [json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in (1, 2)]
    seen = [state["num_input_tokens_seen"] for state in states]
    assert seen[0] > 0
    assert seen[1] == 2 * seen[0]


@pytest.mark.parametrize("option", ["fused_lora", "fused_layers"])
def test_layers_are_fused_while_training_and_only_where_asked(tmp_path: Path, option: str) -> None:
    for asked in (True, False):
        trainer = make(tmp_path, **{option: asked})
        layer = trainer.model.get_base_model().model.layers[0]
        module = layer.self_attn.q_proj if option == "fused_lora" else layer.mlp
        watch = OwnForward(module)
        trainer.add_callback(watch)
        trainer.train()
        assert watch.is_own == [not asked, not asked]
        assert "forward" not in vars(module)


def test_preparation_of_a_kbit_base_knows_of_checkpointing(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert checkpointing_arguments(SFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)) == options
    plain = checkpointing_arguments(SFTConfig(output_dir=str(tmp_path), use_cpu=True))
    assert plain["gradient_checkpointing"] is False


@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"eval_packing": True}, {"padding_free": True}])
def test_raw_and_prepared_rows_are_evaluated_alike(tmp_path: Path, layout: dict[str, Any]) -> None:
    trainer = make(tmp_path, per_device_eval_batch_size=2, **layout)
    raw = Dataset.from_list(ROWS[:5])
    prepared = prepare_all(
        raw, name="eval", packing=False, tokenizer=tiny_tokenizer(), config=trainer.args, formatting_func=None
    )
    whole = trainer.evaluate()["eval_loss"]
    expected = make(tmp_path, **layout).evaluate(prepared)["eval_loss"]
    assert expected != pytest.approx(whole, rel=1e-4)
    for rows in (raw, raw.to_iterable_dataset(), prepared):
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate({"some": raw})["eval_some_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(raw).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)


def test_entropy_is_logged_when_asked_for(tmp_path: Path) -> None:
    logs = []
    for asked in (False, True):
        trainer = make(tmp_path, log_entropy=asked, logging_steps=1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert "entropy" not in logs[0]
    assert 0 < logs[1]["entropy"] <= math.log(384) + 1e-3


TWO_PROCESSES = """
from datasets import Dataset
from sft import SFTConfig, SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer

rows = Dataset.from_dict({"text": [f"fox number {n} jumps " * (1 + n % 4) for n in range(64)]}).to_iterable_dataset()
for packing in (True, False):
    config = SFTConfig(
        output_dir="out", use_cpu=True, max_steps=2, packing=packing, max_length=64, per_device_train_batch_size=2
    )
    trainer = SFTTrainer(tiny_model(), args=config, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    print("WEIGHTS", packing, float(sum(p.double().sum() for p in trainer.model.parameters())), flush=True)
"""


@pytest.mark.slow
def test_two_processes_train_streamed_rows_to_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    weights = re.findall(r"WEIGHTS (True|False) (\S+)", done.stdout)
    assert len(weights) == 4
    assert len(set(weights)) == 2, weights


def trainer_of(folder: Path, model: Any = None, **options: Any) -> SFTTrainer:
    """A trainer on four rows of token ids of different lengths, one of them with a masked beginning."""
    rows = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
            {"input_ids": [9, 10], "labels": [9, 10]},
            {"input_ids": [11, 12, 13], "labels": [11, 12, 13]},
            {"input_ids": [5, 6, 7, 14], "labels": [5, 6, 7, 14]},
        ]
    )
    config = SFTConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4, **options
    )
    return SFTTrainer(model or tiny_model(), config, train_dataset=rows, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("padding_free", [False, True, None])
def test_outputs_of_compute_loss_have_the_models_own_logits(tmp_path: Path, padding_free: bool | None) -> None:
    trainer = trainer_of(tmp_path, padding_free=padding_free)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert outputs.loss is loss
    torch.testing.assert_close(loss, trainer.compute_loss(trainer.model, dict(batch)), rtol=1e-5, atol=1e-6)
    assert outputs.logits.shape == (*batch["labels"].shape, trainer.model.config.vocab_size)
    assert outputs["logits"] is outputs.logits
    row = trainer.train_dataset[0]["input_ids"]
    alone = trainer.model(input_ids=torch.tensor([row])).logits[0]
    ids = batch["input_ids"].flatten().tolist()
    start = next(place for place in range(len(ids)) if ids[place : place + 4] == row)
    found = outputs.logits.flatten(0, 1)[start : start + 4]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_predictions_are_the_logits_of_each_row(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    result = trainer.predict(trainer.train_dataset)
    assert result.predictions.shape == (4, 4, trainer.model.config.vocab_size)
    for number, row in enumerate(trainer.train_dataset):
        ids = torch.tensor([row["input_ids"]])
        found = torch.tensor(result.predictions[number, : ids.shape[1]])
        torch.testing.assert_close(found, trainer.model(input_ids=ids).logits[0].detach(), rtol=1e-4, atol=1e-5)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)


def test_routers_loss_is_added_with_the_weight_of_the_option(tmp_path: Path) -> None:
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    losses = []
    for number, weight in enumerate((0.0, 0.5, 2.0)):
        model = tiny_model("qwen3_moe", num_key_value_heads=1, **routed)
        trainer = trainer_of(tmp_path / str(number), model, router_aux_loss_coef=weight, padding_free=False)
        assert (trainer.router_aux_loss_coef, trainer.aux_loss_enabled) == (weight, weight > 0)
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
    own = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
    ).aux_loss.item()
    assert own > 0
    assert losses[1] - losses[0] == pytest.approx(0.5 * own, rel=1e-3)
    assert losses[2] - losses[0] == pytest.approx(2 * own, rel=1e-3)


def test_last_log_line_has_the_figures_of_the_last_updates(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    first, last = trainer.state.log_history
    assert {"loss", "mean_token_accuracy"} <= set(first)
    assert {"train_loss", "mean_token_accuracy"} <= set(last)
    assert "loss" not in last


def test_model_carries_the_tags_of_supervised_fine_tuning(tmp_path: Path) -> None:
    assert trainer_of(tmp_path).model.model_tags == ["sft", "trl"]


def test_loss_function_that_returns_no_loss_is_told_what_to_compute(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1)
    trainer = SFTTrainer(
        tiny_model(),
        config,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.loss,
    )
    with pytest.raises(ValueError, match=r"compute_loss_func returned NoneType instead of a tensor: compute the loss"):
        trainer.train()


def test_a_checkpoint_whose_config_only_its_own_family_takes_can_be_resumed(tmp_path: Path) -> None:
    DeepseekV4Config(num_hidden_layers=2, mlp_layer_types=["hash_moe", "moe"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    with pytest.raises(Exception, match="`mlp_layer_types` entries must be in"):
        trainer_module.PreTrainedConfig.from_json_file(file)
    with reading_only_version():
        read = trainer_module.PreTrainedConfig.from_json_file(file)
    assert read.transformers_version == json.loads(file.read_text())["transformers_version"]
    assert trainer_module.PreTrainedConfig is not type(read)
