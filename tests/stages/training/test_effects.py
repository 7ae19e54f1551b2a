"""Keys of the section `train` whose effect shows in the model and the optimizer before the first step."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sft.train.offloading import selective_checkpointing
from sft.train.trainer import SFTTrainer
from stages.checkout.paths import Paths
from stages.params.schema import load_params
from stages.training.setup import make_sft_config, make_trainer
from tests.stages.training_root import make_training_root, set_params

LAYERS = 2
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return make_training_root(tmp_path_factory.mktemp("root"))


def trainer_of(root: Paths, **values: Any) -> SFTTrainer:
    set_params(root.root, **values)
    params = load_params(root.params)
    return make_trainer(params, root, make_sft_config(params.train, root.root / "checkpoints"), [])


def adapted(trainer: SFTTrainer) -> dict[str, Any]:
    """The layers with an adapter, by their names from `layers.` on."""
    modules = trainer.model.named_modules()
    return {name.partition("layers.")[2]: module for name, module in modules if hasattr(module, "lora_A")}


def test_ranks_scales_and_magnitudes_of_lora(root: Paths) -> None:
    layers = adapted(
        trainer_of(
            root,
            lora_r=4,
            lora_alpha=8,
            use_rslora=True,
            use_dora=True,
            rank_pattern={"down_proj": 2, r"layers\.1\..*q_proj": 6},
            alpha_pattern={"up_proj": 16},
        )
    )
    assert set(layers) == {f"{n}.{part}.{name}" for n in range(LAYERS) for name in LINEAR for part in (parent(name),)}
    ranks = Counter(len(layer.lora_A["default"].weight) for layer in layers.values())
    assert ranks == {2: LAYERS, 6: 1, 4: LAYERS * len(LINEAR) - LAYERS - 1}
    assert layers["0.mlp.gate_proj"].scaling["default"] == 8 / math.sqrt(4)
    assert layers["0.mlp.up_proj"].scaling["default"] == 16 / math.sqrt(4)
    assert layers["1.self_attn.q_proj"].scaling["default"] == 8 / math.sqrt(6)
    for layer in layers.values():
        magnitude = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, layer.base_layer.weight.norm(dim=1))
        assert magnitude.requires_grad


def parent(name: str) -> str:
    return "self_attn" if name[0] in "qkvo" else "mlp"


def test_adapters_are_put_on_named_layers_and_modules_and_others_are_trained_whole(root: Paths) -> None:
    trainer = trainer_of(root, layers_to_transform=[1], exclude_modules=["down_proj", "k_proj"])
    assert set(adapted(trainer)) == {
        f"1.{parent(name)}.{name}" for name in LINEAR if name not in ("down_proj", "k_proj")
    }
    whole = trainer_of(root, modules_to_save=["post_attention_layernorm"], lora_target_modules=["q_proj"])
    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert {name.partition("layers.")[2] for name in trained if "lora_" not in name} == {
        f"{n}.post_attention_layernorm.modules_to_save.default.weight" for n in range(LAYERS)
    }
    rows = trainer_of(root, trainable_token_indices=[5, 6, 9])
    (tokens,) = (p for name, p in rows.model.named_parameters() if "trainable_tokens_delta" in name)
    assert len(tokens) == 3
    assert tokens.requires_grad


def test_adamw_has_the_stated_decay_rates_epsilon_and_weight_decay(root: Paths) -> None:
    trainer = trainer_of(
        root, method="full", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.125, learning_rate=3e-4
    )
    groups = trainer.create_optimizer().param_groups
    assert {(group["betas"], group["eps"], group["lr"]) for group in groups} == {((0.8, 0.95), 1e-6, 3e-4)}
    assert [group["weight_decay"] for group in groups] == [0.125, 0.0]
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])  # norms have no decay


@pytest.mark.parametrize(
    ("optim", "arguments", "expected"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", {"alpha": 0.9}, {"alpha": 0.9}),
        ("adagrad", {"lr_decay": 0.01}, {"lr_decay": 0.01}),
    ],
)
def test_optimizers_read_their_arguments(
    optim: str, arguments: dict[str, Any], expected: dict[str, Any], root: Paths
) -> None:
    group = trainer_of(root, optim=optim, optim_args=arguments).create_optimizer().param_groups[0]
    assert {name: group[name] for name in expected} == expected


@pytest.mark.numerics
def test_a_smoothed_loss_is_the_mixture_of_targets_and_all_tokens(root: Paths) -> None:
    plain, smooth = (trainer_of(root, label_smoothing_factor=share) for share in (0.0, 0.25))
    batch = next(iter(plain.get_eval_dataloader()))
    with torch.no_grad():
        before, outputs = plain.compute_loss(plain.model, batch, return_outputs=True)
        after = smooth.compute_loss(smooth.model, batch)
    kept = batch["labels"][0, 1:] != -100
    uniform = -torch.log_softmax(outputs.logits[0, :-1][kept].double(), -1).mean()
    torch.testing.assert_close(after.double(), 0.75 * before.double() + 0.25 * uniform, rtol=1e-5, atol=1e-6)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_checkpointing_computes_activations_again_and_selective_no_matrix_product(root: Paths) -> None:
    counts = {}
    for kind in (False, "full", "selective"):
        trainer = trainer_of(root, gradient_checkpointing=kind, method="full")
        batch = next(iter(trainer.get_train_dataloader()))
        with selective_checkpointing(trainer.model):
            if kind:
                trainer.model.activation_checkpointing_enable(
                    activation_checkpointing_kwargs=trainer.args.activation_checkpointing_kwargs
                )
        trainer.model.train()
        trainer.training_step(trainer.model, batch)  # the first pass also compares kinds of heads
        with Operations() as seen:
            trainer.training_step(trainer.model, batch)
        counts[kind] = seen.counts
    products = {kind: seen["mm"] + seen["addmm"] + seen["bmm"] for kind, seen in counts.items()}
    assert products["full"] >= products[False] + LAYERS * (len(LINEAR) - 1)
    assert products["selective"] == products[False]
    assert counts["selective"]["silu"] == counts["full"]["silu"] == 2 * counts[False]["silu"]
