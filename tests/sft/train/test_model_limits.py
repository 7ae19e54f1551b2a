"""Documents that are longer than the positions a model has learned are refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sft.tokens.constant_length import ConstantLengthDataset
from sft.train.checks import check_positions, num_positions
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

SHORT: dict[str, dict[str, int]] = {"gpt2": {"n_positions": 32}, "opt": {}, "gptj": {"rotary_dim": 4}}


def short(family: str) -> Any:
    return tiny_model(family, max_position_embeddings=32, **SHORT[family])


def rows(*lengths: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[5 + place % 7 for place in range(length)] for length in lengths]})


def trainer(model: Any, folder: Path, dataset: Any, **options: Any) -> SFTTrainer:
    config = quiet_config(folder, max_steps=1, save_strategy="no", **options)
    return SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("family", SHORT)
def test_positions_are_those_of_the_models_table(family: str) -> None:
    assert num_positions(short(family)) == 32


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi", "gpt_neox", "bloom"])
def test_computed_positions_have_no_limit(family: str) -> None:
    assert num_positions(tiny_model(family)) is None


@pytest.mark.parametrize("family", SHORT)
def test_a_longer_document_is_refused_by_its_row_and_one_of_just_that_length_is_trained(
    family: str, tmp_path: Path
) -> None:
    message = (
        rf"row 2 has a document of 33 tokens, and the model \({family}\) has learned 32 positions: set max_length=32"
    )
    with pytest.raises(ValueError, match=message):
        trainer(short(family), tmp_path, rows(8, 32, 33))
    trainer(short(family), tmp_path, rows(8, 32, 33), max_length=32).train()


def test_packed_rows_may_be_longer_than_the_positions_of_their_documents(tmp_path: Path) -> None:
    packed = trainer(short("gpt2"), tmp_path, rows(30, 32, 20), packing=True, max_length=96)
    assert packed.train_dataset["seq_lengths"][:] == [[32, 30, 20]]
    packed.train()
    with pytest.raises(ValueError, match="row 0 has a document of 40 tokens"):
        trainer(short("gpt2"), tmp_path, rows(30, 40, 20), packing=True, max_length=96)


def test_evaluation_rows_and_streams_are_checked_too(tmp_path: Path) -> None:
    config = quiet_config(tmp_path, max_length=64)
    with pytest.raises(ValueError, match="row 1 has a document of 40 tokens"):
        check_positions(short("opt"), config, None, {"a": rows(3), "b": rows(3, 40)})
    stream = rows(3).to_iterable_dataset()
    with pytest.raises(ValueError, match="rows are streamed, with up to max_length=64 tokens"):
        check_positions(short("opt"), config, stream)
    check_positions(short("opt"), quiet_config(tmp_path, max_length=32), stream)
    constant = ConstantLengthDataset(tiny_tokenizer(), Dataset.from_dict({"text": ["a"]}), seq_length=64)
    with pytest.raises(ValueError, match="seq_length=64"):
        check_positions(short("gpt2"), config, constant)
