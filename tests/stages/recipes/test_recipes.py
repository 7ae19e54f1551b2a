"""Recipes: each is valid, says where it comes from, and needs what it says; estimates by the shape of a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.__main__ import main
from stages.params.schema import check_params
from stages.params.text import neutral_values
from stages.recipes.catalog import read_recipe, recipe_names
from stages.recipes.offline import GPUS, Shape, estimate, gpu_of, lora_parameters, shape_of, shape_of_config

STATED = re.compile(r"--gpu (\w+)`: ([\d.]+) GB per GPU, ([\d.]+) min per million tokens")


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_valid_and_needs_what_it_says(name: str) -> None:
    recipe = read_recipe(name)
    values = YAML(typ="safe", pure=True).load(recipe.text())
    assert values == recipe.params()
    check_params(values)
    notes = " ".join(recipe.notes)
    assert recipe.notes[0].startswith("Hyperparameters: ")
    stated = STATED.search(notes)
    assert stated is not None
    gpu, peak, minutes = stated.groups()
    found = estimate(values, shape_of(values["model"]["name_or_path"]))
    assert f"{found.peak:.1f}" == peak
    assert f"{found.seconds(1e6, gpu) / 60:.1f}" == minutes
    assert found.peak <= 0.95 * GPUS[gpu][1]


def test_recipes_cover_models_and_tasks() -> None:
    names = recipe_names()
    assert len(names) >= 25
    models = "qwen3.5 llama3 gemma3 gemma4 gpt-oss mistral ministral3 smollm3 olmo3 lfm2.5 granite4 phi4 deepseek"
    assert [model for model in models.split() if not any(name.startswith(model) for name in names)] == []
    tasks = ("chat", "tools", "reasoning", "extraction", "vision")
    assert [task for task in tasks if not any(name.endswith(task) for name in names)] == []


def test_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="no recipe 'phi4-14-chat'; did you mean 'phi4-14b-chat'"):
        read_recipe("phi4-14-chat")


def test_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"], through_dvc=True) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == recipe_names()
    assert main(["recipes", "phi4-14b-chat"], through_dvc=True) == 0
    shown = capsys.readouterr().out
    check_params(YAML(typ="safe", pure=True).load(shown))
    assert shown.startswith("# phi-4: chat, QLoRA.\n")


def test_shape_of_a_config_counts_its_parameters(tmp_path: Path) -> None:
    llama = {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
    # Llama 3.2 1B has 1,235,814,400 parameters, 67,584 of them in norms
    assert shape_of_config(llama).total == 1_235_814_400 - 67_584
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"text_config": llama}), encoding="utf-8")
    assert shape_of("model", tmp_path) == shape_of_config(llama)
    experts = {**llama, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
    mixture = shape_of_config(experts)
    assert mixture.total - mixture.active == 16 * 6 * 3 * 2048 * 1024


def test_memory_is_that_of_weights_gradients_and_state() -> None:
    values = neutral_values()
    shape = Shape(1e9, 1e9, 10, 1000, 4000, 32000)
    values["train"] |= {"method": "full"}
    full = estimate(values, shape).memory
    assert (full["weights"], full["gradients"], full["optimizer"]) == (4.0, 4.0, 8.0)
    values["train"] |= {"method": "lora", "lora_r": 8}
    values["model"] |= {"dtype": "bfloat16"}
    trained = lora_parameters(shape, values["train"])
    assert trained == 8 * (2 * 1000 * 4 + 3 * 5000) * 10
    lora = estimate(values, shape).memory
    assert lora["weights"] == (2e9 + 4 * trained) / 1e9
    assert lora["optimizer"] == 8 * trained / 1e9


def test_unknown_gpu_and_model_are_named() -> None:
    assert gpu_of("RTX 4090") == "rtx4090"
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        gpu_of("h10")
    with pytest.raises(ValueError, match=r"the shape of 'org/none' is not known without its config\.json"):
        shape_of("org/none")
