"""A GGUF file reads back as the model and the tokenizer that were exported, or is rejected and deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.evaluate.generation import generate_batch
from sft.export import gguf
from sft.export.gguf import SPLIT_PATTERNS, check_exportable, export_gguf, pre_tokenizer_name
from sft.models.gguf import dequantize_gguf
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numerics

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
ROWS = [list(range(5, 45)), list(range(60, 90))]


def save_tiny(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    tiny_model(family, **{**WIDE, **overrides}).save_pretrained(folder)
    if family == "qwen2":
        tokenizer.backend_tokenizer.pre_tokenizer = qwen2_splitter()
    tokenizer.save_pretrained(folder)
    return folder


def qwen2_splitter() -> pre_tokenizers.PreTokenizer:
    pattern = next(pattern for pattern, name in SPLIT_PATTERNS.items() if name == "qwen2")
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("precision", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_greedy_answers_of_the_file_are_those_of_the_checkpoint(
    tmp_path: Path, family: str, precision: str, tied: bool
) -> None:
    source = save_tiny(tmp_path / "source", family, tie_word_embeddings=tied)
    report = export_gguf(source, tmp_path / "out" / "tiny.gguf", precision, ROWS)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tiny.gguf"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="tiny.gguf")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="tiny.gguf", dtype=torch.float32)
    prompts = [
        tokenizer(text)["input_ids"] for text in ("Hello! How are you?", "Paris is the capital", "order 2 lamps")
    ]
    ours = AutoModelForCausalLM.from_pretrained(source)
    answers = [generate_batch(model, tokenizer, prompts, 12) for model in (ours, written)]
    if precision == "f16":
        assert answers[0] == answers[1]
    # random weights are often undecided between two tokens, and eight bits then choose the other
    assert report.top_token_agreement > 0.9
    assert any(answer.num_tokens > 3 for answer in answers[0])
    assert (written.get_output_embeddings().weight is written.get_input_embeddings().weight) is tied
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<pad>")
    assert 0 < report.deviation < 0.02
    assert report.num_positions == 70
    assert report.num_bytes == (tmp_path / "out" / "tiny.gguf").stat().st_size


def test_eight_bits_take_about_half_of_sixteen_and_norms_stay_in_single_precision(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    for precision in ("f16", "q8_0"):
        export_gguf(source, tmp_path / f"{precision}.gguf", precision, ROWS)
    sizes, kinds = [], []
    for precision in ("f16", "q8_0"):
        tensors = GGUFReader(tmp_path / f"{precision}.gguf").tensors
        sizes.append(sum(int(tensor.n_bytes) for tensor in tensors if len(tensor.shape) == 2))
        kinds.append({(len(tensor.shape), tensor.tensor_type.name) for tensor in tensors})
    assert kinds == [{(1, "F32"), (2, "F16")}, {(1, "F32"), (2, "Q8_0")}]
    assert sizes[1] / sizes[0] == pytest.approx(34 / 64)  # 32 values in 34 bytes


def test_rows_that_blocks_do_not_fill_are_kept_in_half_precision(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", intermediate_size=40)
    export_gguf(source, tmp_path / "tiny.gguf", "q8_0", ROWS)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_file_becomes_a_plain_checkpoint_again(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    export_gguf(source, tmp_path / "tiny.gguf", "f16", ROWS)
    dequantize_gguf(tmp_path / "tiny.gguf", tmp_path / "plain")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "plain"))
    assert {name: tensor.half() for name, tensor in ours.items()}.keys() == theirs.keys()
    assert all(torch.equal(ours[name].half().float(), theirs[name]) for name in ours if ours[name].dim() == 2)


def test_sharded_checkpoints_and_unused_rows_of_the_vocabulary_are_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model(**WIDE, vocab_size=400).save_pretrained(source, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(source)
    assert len(list(source.glob("*.safetensors"))) > 2
    assert export_gguf(source, tmp_path / "tiny.gguf", "f16", ROWS).top_token_agreement == 1.0


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        ("gpt_neox", {}, "is of type 'gpt_neox', but GGUF export supports llama, qwen2"),
        ("llama", {"attention_bias": True}, "has biases in its attention"),
        ("llama", {"head_dim": 32}, "heads whose width is not"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            r"positions \(linear",
        ),
    ],
)
def test_what_is_not_supported_is_refused_before_any_weight_is_read(
    tmp_path: Path, family: str, overrides: dict[str, Any], words: str
) -> None:
    tiny_model(family, **overrides).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        check_exportable(tmp_path)


def test_unknown_precision_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'q4_k' is not supported: use f16, q8_0"):
        export_gguf(save_tiny(tmp_path / "source"), tmp_path / "tiny.gguf", "q4_k", ROWS)


def test_weight_that_is_nan_leaves_no_file(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight contains values that are NaN"):
        export_gguf(source, tmp_path / "out" / "tiny.gguf", "f16", ROWS)
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_in_another_order_are_noticed_when_the_file_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", initializer_range=0.5)
    stored = gguf._stored_values
    monkeypatch.setattr(gguf, "_stored_values", lambda *given: stored(*given)[::-1].copy())
    with pytest.raises(ValueError, match="the model differs from the checkpoint: the logits differ by"):
        export_gguf(source, tmp_path / "tiny.gguf", "f16", ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_pre_tokenizers_have_their_names_and_others_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    assert pre_tokenizer_name(content) == "gpt-2"
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    for splitter, name in ((pre_tokenizers.Sequence([digits, bytes_]), "smollm"), (qwen2_splitter(), "qwen2")):
        tokenizer.backend_tokenizer.pre_tokenizer = splitter
        assert pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str())) == name
    with pytest.raises(
        ValueError, match=r"splits text by ..Whitespace.., for which GGUF export has no pre-tokenizer name"
    ):
        pre_tokenizer_name({**content, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(ValueError, match="is a Unigram, but GGUF export supports byte-level BPE only"):
        pre_tokenizer_name({**content, "model": {"type": "Unigram"}})
