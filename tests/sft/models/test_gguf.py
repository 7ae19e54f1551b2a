"""Dequantizing gives a folder that plain transformers loads, with the weights and tokens that went in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sft.models.gguf import dequantize_gguf
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_gguf import write_gguf

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(pad_token_id=tiny_tokenizer().pad_token_id)


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    gguf_file = write_gguf(place / "tiny.gguf", model, tiny_tokenizer())
    dequantize_gguf(gguf_file, place / "plain")
    return place / "plain"


def test_folder_contains_a_complete_checkpoint_and_nothing_else(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_logits_are_those_of_the_model_that_was_written(folder: Path, model: PreTrainedModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 45)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6, rtol=0)
    assert plain.dtype is torch.float32


def test_tied_head_stays_tied(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_no_mark_of_the_quantizer_is_left(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config


def test_special_tokens_agree_between_tokenizer_config_and_generation_config(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == config[name] == generation[name]
    assert tokenizer.model_max_length == 2048


def test_text_becomes_the_same_tokens(folder: Path) -> None:
    tokenizer, expected = AutoTokenizer.from_pretrained(folder), tiny_tokenizer()
    messages = [{"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "Paris."}]
    text = expected.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]


def test_digits_are_split_before_anything_is_merged(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  42")]
    assert pieces == ["a", "ĠĠ", "4", "2"]


def test_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"begins with b'<htm' instead of b'GGUF'.*broken download"):
        dequantize_gguf(broken, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.gguf does not exist"):
        dequantize_gguf(tmp_path / "gone.gguf", tmp_path / "plain")


def test_folder_with_something_in_it_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        dequantize_gguf(folder.parent / "tiny.gguf", tmp_path)
