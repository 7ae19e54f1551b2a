"""What can't be saved is found before training: configs, tokenizers, arguments and disks."""

from __future__ import annotations

import dataclasses
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sft.config import SFTConfig
from sft.models import saving
from sft.models.saving import check_disk, check_saving, mend_generation_config, number_of_saves
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

ROWS = Dataset.from_dict({"text": ["Hello", "How are you?"]})


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sft.models.saving"]


def trainer_on(model: Any, folder: Path, **options: Any) -> SFTTrainer:
    config = quiet_config(folder, max_steps=1, **options)
    return SFTTrainer(model, args=config, train_dataset=ROWS, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("flags", [{"temperature": 0.6}, {"top_p": 0.9, "top_k": 20}, {"length_penalty": 2.0}])
@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_flags_without_effect_that_transformers_does_not_save_are_reset(
    flags: dict[str, Any], strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=2, max_new_tokens=7)
    model.generation_config.update(**flags)
    trainer = trainer_on(model, tmp_path, save_strategy=strategy)
    named = ", ".join(f"{flag}={value!r}" for flag, value in flags.items())
    assert [message.partition(", which")[0] for message in said(caplog)] == [
        f"transformers does not save a generation_config with {named}"
    ]
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == 7
    assert not flags.keys() & saved.keys()


def test_generation_config_that_samples_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=2)
    trainer_on(model, tmp_path)
    assert (model.generation_config.temperature, said(caplog)) == (0.6, [])


def test_published_config_that_is_saved_as_it_was_loaded_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    (tmp_path / "generation_config.json").write_text(json.dumps({**ids, "temperature": 0.6}))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    mend_generation_config(model, tokenizer)
    assert (model.generation_config.temperature, said(caplog)) == (0.6, [])
    mend_generation_config(model, tiny_tokenizer(eos_token="<|endoftext|>"))  # which the trainer will add
    assert model.generation_config.temperature is None


def test_generation_config_that_no_default_mends_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.num_return_sequences = 3
    with pytest.raises(ValueError, match=r"generation_config can't be saved .*Greedy methods.*; set model.generation"):
        trainer_on(model, tmp_path, save_strategy="no")


def test_adapter_is_saved_without_generation_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.generation_config.temperature = 0.6
    check_saving(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")), tiny_tokenizer(), quiet_config(tmp_path))
    assert (model.generation_config.temperature, said(caplog)) == (0.6, [])


def test_value_of_a_config_that_json_does_not_know_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.scale = {1, 2}
    with pytest.raises(ValueError, match=r"the model's config can't be saved with the model \(TypeError: .*set"):
        trainer_on(model, tmp_path)


def test_weights_that_share_memory_without_being_declared_as_tied_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    message = r"the model's weights can't be saved .*layers.[01].mlp.up_proj.weight.* own memory .*_tied_weights_keys"
    with pytest.raises(ValueError, match=message):
        trainer_on(model, tmp_path)
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path / "model")
    model._keys_to_ignore_on_save = ["model.layers.1.mlp.up_proj.weight"]
    check_saving(model, tiny_tokenizer(), quiet_config(tmp_path))
    model.save_pretrained(tmp_path / "model")
    model._keys_to_ignore_on_save = None
    second.weight = torch.nn.Parameter(second.weight.clone())
    check_saving(model, tiny_tokenizer(), quiet_config(tmp_path))
    model.save_pretrained(tmp_path / "model")


def test_an_adapter_of_weights_that_share_memory_is_saved_alone(tmp_path: Path) -> None:
    model = tiny_model()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    check_saving(adapter, tiny_tokenizer(), quiet_config(tmp_path))
    adapter.save_pretrained(tmp_path / "adapter")


def test_arguments_that_can_not_be_pickled_are_refused(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class LocalConfig(SFTConfig):
        """Options that a function defines."""

    config = LocalConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"args \(LocalConfig\) can't be saved .*define its class .* at the top level"):
        SFTTrainer(tiny_model(), args=config, train_dataset=ROWS, processing_class=tiny_tokenizer())


def test_tokenizer_that_can_not_be_saved_is_refused(tmp_path: Path) -> None:
    class Unsaved(PreTrainedTokenizerFast):
        def save_pretrained(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
            raise NotImplementedError("no files")

    tokenizer = Unsaved(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    with pytest.raises(
        ValueError, match=r"processing_class \(Unsaved\) can't be saved .*NotImplementedError: no files"
    ):
        check_saving(tiny_model(), tokenizer, quiet_config(tmp_path))


class LowerCase(PreTrainedTokenizerFast):
    """A tokenizer that loses a setting when it is saved: that it makes all text lower case."""

    lowers = False

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus(text.lower() if self.lowers and isinstance(text, str) else text, *args, **kwargs)


def test_tokenizer_that_changes_when_it_is_saved_is_refused_with_the_text_and_both_tokenizations(
    tmp_path: Path,
) -> None:
    tokenizer = LowerCase(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|im_end|>", pad_token="<pad>"
    )
    check_saving(tiny_model(), tokenizer, quiet_config(tmp_path))
    tokenizer.lowers = True
    saving._KEPT.clear()
    with pytest.raises(
        ValueError, match=r"processing_class \(LowerCase\) changes when it is saved: .Hello, world!.* is \["
    ):
        check_saving(tiny_model(), tokenizer, quiet_config(tmp_path))


def test_tokenizer_with_changed_rules_and_tokens_that_are_saved_passes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_tokens(["<think>"])
    check_saving(tiny_model(), tokenizer, quiet_config(tmp_path))


def disk_with(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, free)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage)


def test_disk_that_is_too_small_for_all_checkpoints_is_refused_with_the_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    disk_with(5 * 3 * weights, monkeypatch)  # an optimizer state has two tensors for each weight
    config = quiet_config(tmp_path / "deep" / "folder", save_steps=10)
    check_disk(model, config, num_steps=40)
    with pytest.raises(
        ValueError, match=r"keeps 10 checkpoints .*output_dir, or set save_total_limit=4, or set save_o"
    ):
        check_disk(model, config, num_steps=100)
    check_disk(model, quiet_config(tmp_path, save_steps=10, save_total_limit=4), num_steps=100)
    with pytest.raises(ValueError, match="keeps 6 checkpoints"):
        check_disk(model, quiet_config(tmp_path, save_steps=10, save_total_limit=5), num_steps=100)
    check_disk(model, quiet_config(tmp_path, save_steps=10, save_only_model=True), num_steps=100)
    check_disk(model, quiet_config(tmp_path, save_steps=10, optim="adafactor"), num_steps=100)
    check_disk(model, config, num_steps=40, copies=3)
    with pytest.raises(ValueError, match=r"keeps 4 checkpoints .* and 4 more of the weights, .* left"):
        check_disk(model, config, num_steps=40, copies=4)


def test_checkpoints_that_are_there_are_replaced_or_already_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    size = saving.weight_bytes(model)
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(bytes(size))
    disk_with(size, monkeypatch)
    options: dict[str, Any] = {"save_steps": 10, "save_only_model": True}
    check_disk(model, quiet_config(tmp_path, **options), num_steps=30, resumes=True)
    check_disk(model, quiet_config(tmp_path, **options, save_total_limit=2), num_steps=30)
    with pytest.raises(ValueError, match="keeps 3 checkpoints"):
        check_disk(model, quiet_config(tmp_path, **options), num_steps=30)


def test_adapter_needs_the_space_of_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=1))
    trained = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
    disk_with(3 * trained, monkeypatch)
    check_disk(model, quiet_config(tmp_path, save_steps=1), num_steps=1)


def test_weights_that_do_not_fit_are_named_where_no_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk_with(1000, monkeypatch)
    check_disk(tiny_model(), quiet_config(tmp_path, save_strategy="no"), num_steps=10)
    assert "and the disk of output_dir" in said(caplog)[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 3),
        ({"save_steps": 10}, 3),
        ({"save_steps": 0.5}, 2),
        ({"save_steps": 1000}, 1),
    ],
)
def test_number_of_checkpoints(options: dict[str, Any], expected: int, tmp_path: Path) -> None:
    assert number_of_saves(quiet_config(tmp_path, **options), num_steps=25) == expected


def test_trainer_refuses_the_disk_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_on(tiny_model(), tmp_path, save_steps=1)
    disk_with(1000, monkeypatch)
    with pytest.raises(ValueError, match="keeps 1 checkpoint of"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_lists_that_peft_writes_from_sets_are_sorted_in_every_adapter_of_a_model(tmp_path: Path) -> None:
    names = ["v_proj", "gate_proj", "q_proj", "down_proj", "k_proj", "up_proj", "o_proj"]
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=names, exclude_modules=["b", "a"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=names[:2]))
    trainer_on(model, tmp_path / "out").save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (saved["target_modules"], saved["exclude_modules"]) == (sorted(names), ["a", "b"])
    other = json.loads((tmp_path / "saved" / "other" / "adapter_config.json").read_text())
    assert other["target_modules"] == ["gate_proj", "v_proj"]
