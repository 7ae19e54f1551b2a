"""Base models in 4 and 8 bits on any device: configuration, preparation, and a real step of LoRA."""

from __future__ import annotations

import logging
from pathlib import Path

import bitsandbytes.nn.modules
import peft
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft.config import ModelConfig
from sft.models.adapters import wrap_adapter
from sft.models.kbit import (
    CAST_LOGGER,
    get_kbit_device_map,
    get_quantization_config,
    is_kbit,
    needs_kbit_preparation,
    prepare_model_for_kbit_training,
)
from sft.models.loading import load_model
from sft.train.checks import check_kbit_arguments
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numerics

FOUR_BIT = {"load_in_4bit": True, "use_bnb_nested_quant": True}
EIGHT_BIT = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def load_kbit(folder: Path, dtype: str = "float32", **options: bool) -> PreTrainedModel:
    config = get_quantization_config(ModelConfig(dtype=dtype, **options))
    return load_model(folder, dtype=dtype, quantization_config=config, device_map=get_kbit_device_map())


def test_without_quantization_there_is_no_configuration() -> None:
    assert get_quantization_config(ModelConfig()) is None


def test_four_bit_options_reach_bitsandbytes() -> None:
    config = get_quantization_config(
        ModelConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True, dtype="bfloat16")
    )
    assert config is not None
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", True)
    assert config.bnb_4bit_compute_dtype is torch.bfloat16


def test_compute_dtype_takes_precedence_over_the_models_dtype() -> None:
    config = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="bfloat16", bnb_4bit_compute_dtype="float16"))
    assert config is not None
    assert config.bnb_4bit_compute_dtype is torch.float16


def test_unknown_four_bit_type_is_refused() -> None:
    with pytest.raises(ValueError, match="bnb_4bit_quant_type='nf8' does not exist: use nf4 or fp4"):
        get_quantization_config(ModelConfig(load_in_4bit=True, bnb_4bit_quant_type="nf8"))


def test_4_and_8_bits_at_once_are_refused() -> None:
    config = ModelConfig(load_in_4bit=True)
    config.load_in_8bit = True
    with pytest.raises(ValueError, match="loaded in one of them"):
        get_quantization_config(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_there_is_no_device_map() -> None:
    assert get_kbit_device_map() is None


def test_each_process_takes_its_own_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert get_kbit_device_map() == {"": 0}


@pytest.mark.parametrize("options", [FOUR_BIT, EIGHT_BIT], ids=["4 bit", "8 bit"])
def test_fresh_base_needs_preparation_and_a_prepared_one_does_not(folder: Path, options: dict[str, bool]) -> None:
    model = load_kbit(folder, dtype="bfloat16", **options)
    assert needs_kbit_preparation(model)
    prepare_model_for_kbit_training(model)
    assert not needs_kbit_preparation(model)
    assert model.is_gradient_checkpointing
    assert model.get_input_embeddings().weight.dtype is torch.float32


def test_preparation_by_peft_itself_is_recognised(folder: Path) -> None:
    assert not needs_kbit_preparation(peft.prepare_model_for_kbit_training(load_kbit(folder, **EIGHT_BIT)))


def test_plain_base_needs_no_preparation(folder: Path) -> None:
    assert not needs_kbit_preparation(load_model(folder, dtype="bfloat16"))


def test_log_says_once_that_inputs_are_cast(caplog: pytest.LogCaptureFixture) -> None:
    for number in (8, 8, 8, 4):
        logging.getLogger(CAST_LOGGER).warning("cast to %s in this test", number)
    assert caplog.messages == ["cast to 8 in this test", "cast to 4 in this test"]


@pytest.mark.parametrize("options", [FOUR_BIT, EIGHT_BIT], ids=["4 bit", "8 bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_a_kbit_base_learns(folder: Path, options: dict[str, bool], checkpointing: bool) -> None:
    torch.manual_seed(0)
    base = load_kbit(folder, **options)
    assert is_kbit(base)
    frozen = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = wrap_adapter(base, lora, gradient_checkpointing=checkpointing).train()
    assert base.is_gradient_checkpointing is checkpointing
    ids = torch.randint(5, 300, (2, 24))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(base.model.layers[0].self_attn.q_proj.base_layer.weight, frozen)


@pytest.mark.parametrize("options", [FOUR_BIT, EIGHT_BIT], ids=["4 bit", "8 bit"])
def test_trainer_fits_an_adapter_on_a_kbit_base_which_stays_as_it_was(
    folder: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    rows = Dataset.from_dict({"input_ids": [list(range(5, 25)), list(range(40, 52))]})
    config = quiet_config(
        tmp_path,
        save_strategy="no",
        packing=True,
        max_length=32,
        max_steps=8,
        logging_steps=1,
        learning_rate=2e-2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"every_n_layers": 2},
        model_init_kwargs={"quantization_config": get_quantization_config(ModelConfig(dtype="float32", **options))},
    )
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        str(folder), args=config, train_dataset=rows, processing_class=tiny_tokenizer(), peft_config=lora
    )
    base = {name: value.clone() for name, value in trainer.model.named_parameters() if "lora_" not in name}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(load_kbit(folder, **options), tmp_path / "adapter").eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_evaluation_does_not_change_a_4_bit_base_that_computes_in_float32(folder: Path) -> None:
    model = load_kbit(folder, **FOUR_BIT)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model.train()(ids).logits
        in_evaluation = model.eval()(ids).logits
        after = model.train()(ids).logits
    torch.testing.assert_close(in_evaluation, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, before)


def test_checkpointing_arguments_of_the_trainer_are_left_to_it(folder: Path) -> None:
    kwargs = {"offload": True, "every_n_layers": 2}
    model = prepare_model_for_kbit_training(load_kbit(folder, **EIGHT_BIT), gradient_checkpointing_kwargs=kwargs)
    model.train()(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    assert kwargs == {"offload": True, "every_n_layers": 2}


def test_storage_of_four_bit_weights_is_an_option() -> None:
    for given, storage in ((None, torch.uint8), ("bfloat16", torch.bfloat16), ("torch.float32", torch.float32)):
        config = get_quantization_config(ModelConfig(load_in_4bit=True, bnb_4bit_quant_storage=given))
        assert config is not None
        assert config.bnb_4bit_quant_storage is storage
    with pytest.raises(ValueError, match="bnb_4bit_quant_storage='bfloat61' does not exist: did you mean 'bfloat16'"):
        get_quantization_config(ModelConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat61"))


@pytest.mark.parametrize("as_argument", [True, False])
def test_arguments_of_the_preparation_take_effect(folder: Path, tmp_path: Path, as_argument: bool) -> None:
    given = {"prepare_in_int8_kwargs": {"use_gradient_checkpointing": True}}
    trainer = SFTTrainer(
        load_kbit(folder, **EIGHT_BIT),
        args=quiet_config(tmp_path, max_steps=1, **({} if as_argument else given)),
        train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(),
        **(given if as_argument else {}),
    )
    assert trainer.model.is_gradient_checkpointing
    assert trainer.train().global_step == 1


@pytest.mark.parametrize(
    ("kind", "given", "options", "problem"),
    [
        ({}, {"use_gradient_checkpointing": True}, {}, "would be ignored: the model is not loaded in 4 or 8 bits"),
        (EIGHT_BIT, {"use_gradient_checkpoint": True}, {}, "did you mean 'use_gradient_checkpointing'"),
        (
            EIGHT_BIT,
            {"use_gradient_checkpointing": False},
            {"gradient_checkpointing": True},
            "use_gradient_checkpointing=False, and the options have gradient_checkpointing=True",
        ),
    ],
)
def test_arguments_of_the_preparation_without_effect_are_refused(
    folder: Path, kind: dict[str, bool], given: dict[str, bool], options: dict[str, bool], problem: str
) -> None:
    model = load_kbit(folder, **kind) if kind else tiny_model()
    with pytest.raises(ValueError, match=problem):
        check_kbit_arguments(model, quiet_config("out", prepare_in_int8_kwargs=given, **options))
    if kind:
        prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        with pytest.raises(ValueError, match="would be ignored: the model is prepared already"):
            check_kbit_arguments(
                prepared, quiet_config("out", prepare_in_int8_kwargs={"use_gradient_checkpointing": True})
            )


def test_model_by_name_is_quantized_by_the_trainers_argument(folder: Path, tmp_path: Path) -> None:
    trainer = SFTTrainer(
        str(folder),
        args=quiet_config(tmp_path, max_steps=1),
        train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(),
        quantization_config=get_quantization_config(ModelConfig(**EIGHT_BIT)),
    )
    assert is_kbit(trainer.model.get_base_model())


# ---- evaluation on a CPU with bfloat16 products, where bitsandbytes packs weights in another way ----

DTYPES = ["float32", "bfloat16", "float16"]
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
FOR_EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
IDS = torch.arange(5, 37).view(2, 16)


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bitsandbytes find a CPU with bfloat16 products, whatever this one is."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


def four_bit_layers(model: torch.nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def dense_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the values of all 4-bit weights, under names without adapters."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        ).float()
        for name, layer in four_bit_layers(model).items()
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def gradients_of_a_step(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@NESTED
@FOR_EACH_DTYPE
@pytest.mark.usefixtures("bfloat16_products")
def test_training_after_an_evaluation_has_the_weights_and_gradients_of_training_without_one(
    folder: Path, dtype: str, nested: bool
) -> None:
    gradients, states = [], []
    for is_evaluated in (False, True):
        model = load_kbit(folder, dtype, load_in_4bit=True, use_bnb_nested_quant=nested)
        before = dense_weights(model)
        if is_evaluated:
            with torch.no_grad():
                model.eval()(input_ids=IDS)
            assert_equal(dense_weights(model), before)
        torch.manual_seed(0)
        adapted = wrap_adapter(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        if is_evaluated:
            with torch.no_grad():
                adapted.eval()(input_ids=IDS)
        gradients.append(gradients_of_a_step(adapted))
        assert_equal(dense_weights(adapted), before)
        states.append(adapted.get_base_model().state_dict())
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert_equal(gradients[1], gradients[0])
    assert_equal(states[1], states[0])


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("float32", "float16"))]
)
@pytest.mark.usefixtures("bfloat16_products")
def test_trainer_that_evaluates_trains_the_same_as_one_that_does_not(folder: Path, tmp_path: Path, dtype: str) -> None:
    rows = Dataset.from_dict({"input_ids": IDS.tolist()})
    adapters, bases = [], []
    for strategy in ("no", "steps"):
        trainer = SFTTrainer(
            str(folder),
            args=quiet_config(
                tmp_path,
                max_steps=2,
                eval_strategy=strategy,
                eval_steps=1,
                save_strategy="no",
                learning_rate=1e-2,
                model_init_kwargs={"dtype": dtype},
            ),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            quantization_config=get_quantization_config(ModelConfig(dtype=dtype, load_in_4bit=True)),
        )
        trainer.train()
        adapters.append({name: value.data for name, value in trainer.model.named_parameters() if "lora_" in name})
        bases.append(dense_weights(trainer.model))
    assert_equal(adapters[1], adapters[0])
    assert_equal(bases[1], bases[0])


@NESTED
@FOR_EACH_DTYPE
def test_layers_that_were_packed_before_are_unpacked_and_pass_gradients_on(
    folder: Path, dtype: str, nested: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_kbit(folder, dtype, load_in_4bit=True, use_bnb_nested_quant=nested)
    before = dense_weights(model)
    for layer in four_bit_layers(model).values():  # as a first evaluation without `load_model` does
        layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    adapted = wrap_adapter(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert f"{len(before)} 4-bit layers were evaluated on this CPU before training" in caplog.text
    for name, value in dense_weights(adapted).items():
        assert (value - before[name]).norm() < 0.01 * before[name].norm(), name  # scales rounded to bfloat16
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of_a_step(adapted).values())


@pytest.mark.usefixtures("bfloat16_products")
def test_adapter_that_transformers_added_keeps_its_base_too(folder: Path) -> None:
    config = get_quantization_config(ModelConfig(dtype="bfloat16", load_in_4bit=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    before = dense_weights(model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    wrap_adapter(model, None)
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    assert_equal(dense_weights(model), before)
