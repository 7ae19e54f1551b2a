"""Adapters: their configuration, putting them on a model, and refusing those that would train nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from sft.config import ModelConfig
from sft.models.adapters import ParameterCount, check_module_names, count_parameters, get_peft_config, wrap_adapter
from sft.models.kbit import get_quantization_config
from sft.models.loading import load_model
from tests.tiny import tiny_model


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def in_eight_bits(folder: Path, dtype: str = "bfloat16") -> PreTrainedModel:
    return load_model(folder, dtype=dtype, quantization_config=get_quantization_config(ModelConfig(load_in_8bit=True)))


# ---- options ----


def test_without_use_peft_there_is_no_configuration() -> None:
    assert get_peft_config(ModelConfig()) is None


def test_options_reach_the_configuration() -> None:
    config = get_peft_config(
        ModelConfig(
            use_peft=True,
            lora_r=3,
            lora_alpha=5,
            lora_dropout=0.25,
            lora_target_modules=["q_proj", "v_proj"],
            lora_modules_to_save=["lm_head"],
            use_rslora=True,
            use_dora=True,
        )
    )
    assert config is not None
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
    assert (config.use_rslora, config.use_dora, config.bias) == (True, True, "none")
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.modules_to_save == ["lm_head"]
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        (["all-linear"], "all-linear"),
        (["q_proj"], {"q_proj"}),
        ("q_proj", {"q_proj"}),
        ("self_attn.q_proj", {"self_attn.q_proj"}),
        (r".*layers\.0.*q_proj", r".*layers\.0.*q_proj"),
    ],
)
def test_target_modules_are_names_or_an_expression(given: list[str] | str | None, expected: set[str] | str) -> None:
    config = get_peft_config(ModelConfig(use_peft=True, lora_target_modules=given))
    assert config is not None
    assert config.target_modules == expected


# ---- putting an adapter on ----


def test_only_the_adapter_is_trained() -> None:
    model = wrap_adapter(tiny_model(), lora())
    assert isinstance(model, PeftModel)
    assert trained(model) == {name for name, _ in model.named_parameters() if "lora_" in name}
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank() -> None:
    model = wrap_adapter(tiny_model(), lora(lora_alpha=8, use_rslora=True))
    assert model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] == 8 / 4**0.5


def test_dora_trains_magnitudes() -> None:
    assert any("lora_magnitude_vector" in name for name in trained(wrap_adapter(tiny_model(), lora(use_dora=True))))


def test_base_without_adapter_is_trained_itself() -> None:
    model = tiny_model()
    assert wrap_adapter(model, None) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_configuration_that_was_given_stays_as_it_was() -> None:
    config = lora(modules_to_save=["embed_tokens"])
    wrap_adapter(tiny_model(), config)
    assert config.target_modules == "all-linear"
    assert config.ensure_weight_tying is False


@pytest.mark.parametrize("option", ["modules_to_save", "target_modules"])
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_head_stays_tied_while_it_is_trained(option: str, names: list[str]) -> None:
    names = [*names, "q_proj"] if option == "target_modules" else names
    model = wrap_adapter(tiny_model(), lora(**{option: names}))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(5, 45)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    base = model.get_base_model()
    one_hot = torch.eye(16)
    head = base.lm_head(one_hot) - (base.lm_head.bias if base.lm_head.bias is not None else 0)  # (16, vocabulary)
    embeddings = base.get_input_embeddings()(torch.arange(base.config.vocab_size))  # (vocabulary, 16)
    torch.testing.assert_close(head.T, embeddings, atol=1e-5, rtol=0)
    assert not torch.equal(embeddings, tiny_model().get_input_embeddings().weight)


# ---- names that name nothing ----


def test_misspelt_module_to_save_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"modules_to_save has 'embed_token', did you mean 'embed_tokens'\?"):
        wrap_adapter(tiny_model(), lora(modules_to_save=["lm_head", "embed_token"]))


def test_misspelt_module_to_exclude_is_named() -> None:
    with pytest.raises(ValueError, match=r"exclude_modules has 'dwn_proj', did you mean 'down_proj'"):
        wrap_adapter(tiny_model(), lora(exclude_modules=["dwn_proj"]))


def test_every_name_must_mean_something_and_all_problems_are_listed() -> None:
    config = lora(target_modules=["q_proj", "qproj", "c_attn"], modules_to_save=["head"])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no module of that name") as caught:
        check_module_names(tiny_model(), config)
    message = str(caught.value)
    assert "modules_to_save has 'head', did you mean 'lm_head'" in message
    assert "target_modules has 'qproj', did you mean 'q_proj'" in message
    assert "target_modules has 'c_attn'" in message
    assert "'q_proj', " not in message.split("did you mean")[0]


def test_name_that_peft_reads_as_a_regular_expression_is_explained() -> None:
    with pytest.raises(ValueError, match=r"a string is a regular expression; names go into a list: \['q_proj'\]"):
        wrap_adapter(tiny_model(), lora(target_modules="q_proj"))


def test_names_with_dots_and_expressions_pass() -> None:
    check_module_names(tiny_model(), lora(target_modules=["layers.1.self_attn.q_proj"]))
    check_module_names(tiny_model(), lora(target_modules=r".*\.(q|v)_proj", modules_to_save=["model.embed_tokens"]))


# ---- continuing ----


def test_adapter_loaded_for_inference_is_trained_on(tmp_path: Path) -> None:
    get_peft_model(tiny_model(), lora(init_lora_weights=False)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert trained(loaded) == set()
    model = wrap_adapter(loaded, None)
    assert model is loaded
    assert trained(model) == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_adapter_and_configuration_together_are_refused() -> None:
    model = get_peft_model(tiny_model(), lora())
    with pytest.raises(ValueError, match=r"already has the adapter 'default'.*leave peft_config out.*merge_and_unload"):
        wrap_adapter(model, lora())


def test_prompt_tuning_is_continued_too(tmp_path: Path) -> None:
    get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path
    )
    model = wrap_adapter(PeftModel.from_pretrained(tiny_model(), tmp_path), None)
    assert len(trained(model)) == 1


def test_adapter_that_transformers_added_is_not_doubled() -> None:
    model = tiny_model()
    model.add_adapter(lora())
    assert wrap_adapter(model, None) is model
    with pytest.raises(ValueError, match=r"carries adapters \['default'\] already"):
        wrap_adapter(model, lora())


# ---- k-bit bases ----


def test_kbit_base_is_prepared_on_the_way(wide: Path) -> None:
    model = wrap_adapter(in_eight_bits(wide), lora(), gradient_checkpointing=True)
    base = model.get_base_model()
    assert base.model.norm.weight.dtype is torch.float32
    assert base.is_gradient_checkpointing
    assert trained(model) == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_adapter_on_an_unprepared_kbit_base_is_prepared_and_stays_trainable(wide: Path) -> None:
    model = wrap_adapter(get_peft_model(in_eight_bits(wide), lora()), None)
    assert model.get_base_model().model.norm.weight.dtype is torch.float32
    assert trained(model) == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_model_of_unsloth_keeps_the_precision_of_its_kernels(wide: Path) -> None:
    model = get_peft_model(in_eight_bits(wide), lora())
    model.for_inference = lambda: None  # the mark that FastLanguageModel leaves
    assert wrap_adapter(model, None).get_base_model().model.norm.weight.dtype is torch.bfloat16


def test_kbit_base_without_adapter_is_refused(wide: Path) -> None:
    with pytest.raises(ValueError, match=r"quantized, so they can't be trained.*Give a peft_config \(QLoRA\)"):
        wrap_adapter(in_eight_bits(wide), None)


# ---- counting ----


def test_trained_parameters_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sft.models.adapters"):
        model = wrap_adapter(tiny_model(), lora(target_modules=["q_proj"]))
    num_base = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert count_parameters(model) == ParameterCount(num_trainable=2 * 4 * (16 + 16), num_total=num_base + 256)
    assert "256 of" in caplog.text


def test_four_bit_weights_count_as_the_weights_that_they_are(wide: Path) -> None:
    quantized = load_model(wide, quantization_config=get_quantization_config(ModelConfig(load_in_4bit=True)))
    assert count_parameters(quantized).num_total == count_parameters(load_model(wide)).num_total


def test_parameters_of_experts_get_matrices_by_name() -> None:
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = ModelConfig(
        use_peft=True, lora_target_modules=["q_proj"], lora_target_parameters="experts.down_proj", lora_dropout=0.0
    )
    adapter = get_peft_config(config)
    assert adapter is not None
    assert adapter.target_parameters == ["experts.down_proj"]
    with pytest.raises(ValueError, match=r"lora_dropout=0.05 can't be used with lora_target_parameters"):
        get_peft_config(ModelConfig(use_peft=True, lora_target_parameters=["experts.down_proj"]))
    model = wrap_adapter(tiny_model("qwen3_moe", num_key_value_heads=1, **routed), adapter)
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert sum("experts" in name for name in adapted) == 2
    assert sum("q_proj" in name for name in adapted) == 2


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", ["w1", "w2", "w3"]),
        ("qwen3_moe", r".*\.(q_proj|gate_proj|up_proj|down_proj)"),
    ],
)
def test_experts_under_their_former_names_are_trained(family: str, targets: list[str] | str) -> None:
    model = wrap_adapter(tiny_model(family, num_key_value_heads=1, **EXPERTS), lora(target_modules=targets))
    experts = {name for name in trained(model) if "experts" in name}
    assert len(experts) == 2 * 2 * 2  # two matrices of LoRA for two parameters of two layers


def test_parameters_that_do_not_exist_are_an_error() -> None:
    model = tiny_model("qwen3_moe", num_key_value_heads=1, **EXPERTS)
    with pytest.raises(ValueError, match=r"target_parameters has 'experts\.gate_up', did you mean 'gate_up_proj'"):
        wrap_adapter(model, lora(target_modules=["q_proj"], target_parameters=["experts.gate_up"]))
    with pytest.raises(ValueError, match="target_modules has 'q_prj', did you mean 'q_proj'"):
        wrap_adapter(model, lora(target_modules=["q_prj", "gate_proj", "up_proj", "down_proj"]))
