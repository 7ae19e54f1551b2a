"""Keys of the section `train`: their effect on optimizer, model and log, and that a resumed training has the same bits.

Each training is a tiny one. `FAST` has one of each mechanism; `SLOW` the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from sft.optimizers.muon import IS_MUON
from sft.train.trainer import SFTTrainer
from stages import merge, train
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.params.schema import ParamsError, load_params
from stages.training import setup
from tests.stages.training_root import SHORT, make_training_root
from tests.tiny import tiny_model

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
STEPS = {**SHORT, "max_steps": 6, "eval_steps": 3, "save_steps": 2}

FAST: dict[str, dict[str, Any]] = {
    "muon": {"optim": "muon", "optim_args": {"momentum": 0.8}},
    "rates": {
        "method": "full",
        "learning_rate": 1e-3,
        "embedding_learning_rate": 1e-5,
        "parameter_groups": [
            {"pattern": "norm", "frozen": True},
            {"pattern": "layers[.]0[.]", "learning_rate": 5e-4, "weight_decay": 0.1},
        ],
    },
    "eva": {"init_lora_weights": "eva", "loraplus_lr_ratio": 4.0, "rank_pattern": {"down_proj": 6}},
    "vera": {"adapter": {"type": "vera", "r": 16}, "order": "sequential"},
    "bf16": {
        "mixed_precision": "bf16",
        "gradient_checkpointing": "selective",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
        "warmup_steps": 2,
    },
}

SLOW: dict[str, dict[str, Any]] = {
    **{name: {"optim": name} for name in ("sgd", "adafactor", "lion_32bit", "paged_adamw_8bit", "adamw_torch_8bit")},
    **{f"start {name}": {"init_lora_weights": name} for name in ("gaussian", "orthogonal", "pissa", "olora", "mica")},
    **{
        name: {"adapter": {"type": name}}
        for name in ("OFT", "IA3", "LOHA", "LOKR", "HRA", "BOFT", "DELORA", "LN_TUNING", "FOURIERFT", "RANDLORA")
    },
    "dora": {"use_dora": True, "use_rslora": True},
    "modules": {"modules_to_save": ["embed_tokens"], "embedding_learning_rate": 1e-4},
    "tokens": {"trainable_token_indices": [5, 6]},
    "layers": {"layers_to_transform": [0], "exclude_modules": ["down_proj"]},
    "qlora": {"method": "qlora", "gradient_checkpointing": "selective"},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau"},
    "stable": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
    "smooth": {"label_smoothing_factor": 0.1, "arguments": {"log_entropy": True}},
}


class StopError(Exception):
    """Ends a training, as a kill would."""


class StopAt(TrainerCallback):
    """Callback that ends the training after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise StopError


def train_once(paths: Paths, monkeypatch: pytest.MonkeyPatch, *, stop: bool = False) -> SFTTrainer:
    """Run the stage's training, and return its trainer."""
    made: list[SFTTrainer] = []

    def make(*args: Any) -> SFTTrainer:
        made.append(setup.make_trainer(*args))
        if stop:
            made[0].add_callback(StopAt())
        return made[0]

    monkeypatch.setattr(train, "make_trainer", make)
    train.train(load_params(paths.root / "params.yaml"), paths)
    return made[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trainer and checkout of an option set, trained once."""
    done: dict[str, tuple[SFTTrainer, Paths]] = {}

    def get(name: str) -> tuple[SFTTrainer, Paths]:
        if name not in done:
            values = STEPS | (FAST | SLOW)[name]
            paths = make_training_root(tmp_path_factory.mktemp("root"), tiny_model(**WIDE), **values)
            with pytest.MonkeyPatch.context() as patch:
                done[name] = train_once(paths, patch), paths
        return done[name]

    return get


def optimizer(trainer: SFTTrainer) -> Any:
    return trainer.optimizer.optimizer


def rates(trainer: SFTTrainer) -> set[float]:
    return {group["initial_lr"] for group in optimizer(trainer).param_groups}


def test_muon_moves_matrices_and_reads_its_arguments(trained: Any) -> None:
    groups = optimizer(trained("muon")[0]).param_groups
    assert [group[IS_MUON] for group in groups] == [True]
    assert groups[0]["momentum"] == 0.8
    assert all("momentum_buffer" in optimizer(trained("muon")[0]).state[each] for each in groups[0]["params"])


def test_parts_of_the_model_have_their_own_rates_and_the_common_one_is_logged(trained: Any) -> None:
    trainer, _ = trained("rates")
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = optimizer(trainer).param_groups
    by_rate: dict[float, set[str]] = {}
    for group in groups:
        by_rate.setdefault(group["initial_lr"], set()).update(names[id(each)] for each in group["params"])
    assert by_rate.keys() == {1e-3, 1e-5, 5e-4}
    assert by_rate[1e-5] == {"model.embed_tokens.weight"}
    assert all("layers.0." in name for name in by_rate[5e-4])
    assert {group["weight_decay"] for group in groups if group["initial_lr"] == 5e-4} == {0.1}
    assert groups[0]["initial_lr"] == 1e-3
    assert not any(each.requires_grad for name, each in trainer.model.named_parameters() if "norm" in name)


def test_eva_divides_ranks_and_the_second_matrices_have_their_rate(trained: Any) -> None:
    trainer, _ = trained("eva")
    assert rates(trainer) == {1e-2, 4e-2}
    adapted = [module.lora_A["default"].weight for module in trainer.model.modules() if hasattr(module, "lora_A")]
    assert len({len(weight) for weight in adapted}) > 1


def test_another_adapter_is_trained_in_the_order_of_the_rows(trained: Any) -> None:
    trainer, _ = trained("vera")
    assert trainer.model.active_peft_config.peft_type.value == "VERA"
    assert trainer.model.active_peft_config.r == 16
    assert list(trainer.get_train_dataloader().sampler)[:3] == [0, 1, 2]


def test_schedule_warm_up_precision_and_checkpointing_have_their_effect(trained: Any) -> None:
    trainer, _ = trained("bf16")
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[:3] == pytest.approx([0.0, 0.005, 0.01])
    assert min(logged[2:]) >= 0.005
    with trainer.accelerator.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert trainer.args.activation_checkpointing


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_resumed_training_has_the_same_bits_and_its_result_can_be_merged(
    name: str, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, whole = trained(name)
    paths = make_training_root(tmp_path, tiny_model(**WIDE), **STEPS | (FAST | SLOW)[name])
    with pytest.raises(StopError):
        train_once(paths, monkeypatch, stop=True)
    train_once(paths, monkeypatch)
    assert "resuming from checkpoint-4" in capsys.readouterr().out
    first, second = (load_file(next(each.out("train", "model").glob("*.safetensors"))) for each in (whole, paths))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    merge.run(load_params(paths.root / "params.yaml"), paths)
    assert read_json(paths.metrics("merge"))["max_logit_diff"] < 1e-3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optim": "adamw_torch_fuse"}, "did you mean 'adamw_torch_fused'"),
        ({"optim": "galore_adamw_layerwise"}, "can't be resumed"),
        ({"optim_args": {"momentum": 0.9}}, "does not read"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "cosine does not read"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"init_lora_weights": "pisa"}, "did you mean 'pissa'"),
        ({"init_lora_weights": "pissa", "method": "qlora"}, "changes the weights of the base"),
        ({"init_lora_weights": "corda"}, "it needs activations that were measured before training"),
        ({"init_lora_weights": "pissa_niter_4"}, "starts from random numbers, which differ at each loading"),
        ({"use_dora": True, "method": "full"}, "use_dora would be ignored under method: full"),
        ({"use_dora": True, "adapter": {"type": "OFT"}}, "use_dora is an option of LoRA"),
        ({"adapter": {"type": "PREFIX_TUNING"}}, "can't be merged"),
        ({"adapter": {"type": "OFTT"}}, "did you mean 'OFT'"),
        ({"adapter": {"type": "VERA", "rank": 4}}, "rank is not an option of VERA"),
        ({"mixed_precision": "fp16"}, "set on_bad_loss: null"),
        ({"parameter_groups": [{"pattern": "("}]}, "not a regular expression"),
        ({"parameter_groups": [{"pattern": "x"}]}, "changes nothing"),
        ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, "can't be used with loss_type: dft"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    shipped = Path(__file__).resolve().parents[3] / "params.yaml"
    content = YAML(typ="safe", pure=True).load(shipped.read_text(encoding="utf-8"))
    content["train"] |= values
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    with pytest.raises(ParamsError) as error:
        load_params(tmp_path / "params.yaml")
    assert said in str(error.value)
