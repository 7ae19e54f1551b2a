"""The model card that is saved and uploaded with a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig

from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

ROWS = Dataset.from_dict({"text": ["Paris is the capital of France."]})


def trainer(folder: Path, name: str = "", peft_config: Any = None, **options: Any) -> SFTTrainer:
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = name
    args = quiet_config(folder / "lamps", **options)
    return SFTTrainer(model, args=args, train_dataset=ROWS, processing_class=tiny_tokenizer(), peft_config=peft_config)


def test_card_names_model_base_and_data(tmp_path: Path) -> None:
    trainer(tmp_path, "owner/base", learning_rate=3e-4).create_model_card(
        model_name="Lamps", dataset_name="owner/rows", tags="shop"
    )
    card = ModelCard.load(tmp_path / "lamps" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "owner/base",
        "datasets": ["owner/rows"],
        "library_name": "transformers",
        "model_name": "Lamps",
        "tags": ["generated_from_trainer", "sft", "shop", "trl"],
    }
    assert "# Lamps" in card.text
    assert (
        "made from [owner/base](https://huggingface.co/owner/base) by supervised fine-tuning on owner/rows."
        in card.text
    )
    assert "| learning_rate | 0.0003 |" in card.text


def test_local_folders_are_no_names_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    trainer(tmp_path, str(tmp_path)).create_model_card(dataset_name=str(tmp_path / "rows"))
    data = ModelCard.load(tmp_path / "lamps" / "README.md").data.to_dict()
    assert data["model_name"] == "lamps"
    assert {"base_model", "datasets"} & set(data) == set()
    assert str(tmp_path) not in (tmp_path / "lamps" / "README.md").read_text().replace(str(tmp_path / "lamps"), "")


def test_card_of_an_adapter_keeps_the_tags_that_peft_wrote(tmp_path: Path) -> None:
    training = trainer(tmp_path, "owner/base", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    training.save_model()
    before = ModelCard.load(tmp_path / "lamps" / "README.md").data.tags
    training.create_model_card(tags=["shop"])
    data = ModelCard.load(tmp_path / "lamps" / "README.md").data
    assert data.library_name == "peft"
    assert "base_model:adapter:owner/base" in before
    assert {"generated_from_trainer", "sft", "trl", "shop", *before} == set(data.tags)


def test_card_of_an_adapter_on_a_local_model_does_not_name_its_folder(tmp_path: Path) -> None:
    training = trainer(tmp_path, str(tmp_path), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    training.save_model()
    training.create_model_card()
    tags = ModelCard.load(tmp_path / "lamps" / "README.md").data.tags
    assert tags == ["generated_from_trainer", "sft", "trl", "lora", "transformers"]


def test_arguments_of_transformers_are_taken_too(tmp_path: Path) -> None:
    trainer(tmp_path).create_model_card(
        language="en", license="mit", finetuned_from="owner/other", dataset=["a", "b"], tasks="text-generation"
    )
    data = ModelCard.load(tmp_path / "lamps" / "README.md").data.to_dict()
    assert (data["language"], data["license"], data["base_model"]) == ("en", "mit", "owner/other")
    assert (data["datasets"], data["pipeline_tag"]) == (["a", "b"], "text-generation")


def test_unknown_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a model card has no 'dataset_names'.*did you mean 'dataset_name'"):
        trainer(tmp_path).create_model_card(dataset_names="x")


def test_upload_takes_the_name_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class Hub:
        def create_repo(self, name: str, **given: Any) -> Any:
            return SimpleNamespace(repo_id=f"owner/{name}")

        def upload_folder(self, **given: Any) -> None:
            uploaded.update(given)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer(tmp_path, "owner/base").push_to_hub(dataset_name="owner/rows", tags=["shop"])
    card = ModelCard.load(tmp_path / "lamps" / "README.md")
    assert uploaded["repo_id"] == "owner/lamps"
    assert (card.data.datasets, card.data.tags) == (["owner/rows"], ["generated_from_trainer", "sft", "shop", "trl"])
    assert "model='owner/lamps'" in card.text
