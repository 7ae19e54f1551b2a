"""int8 and nf4: the folder loads on a CPU, is small, and the error of each layer fits the number of bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.export.kbit import KbitReport, check_widths, quantize_kbit
from sft.models.loading import load_model
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_moe import tiny_moe

pytestmark = pytest.mark.numerics

ROWS = [list(range(5, 45)), list(range(60, 90))]
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MODULES = [*ATTENTION, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


def save_tiny(folder: Path) -> Path:
    tiny_model(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("kbit") / "source")


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantized(source: Path, request: pytest.FixtureRequest) -> tuple[str, Path, KbitReport]:
    folder = source.parent / request.param
    return request.param, folder, quantize_kbit(source, folder, request.param, ROWS)


def test_folder_loads_plainly_and_computes_nearly_what_the_source_does(
    source: Path, quantized: tuple[str, Path, KbitReport]
) -> None:
    method, folder, report = quantized
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    config = loaded.config.quantization_config
    assert (config.load_in_8bit, config.load_in_4bit) == (method == "int8", method == "nf4")
    ids = torch.tensor(ROWS[:1])
    with torch.no_grad():
        ours = load_model(source)(input_ids=ids).logits
        theirs = loaded(input_ids=ids).logits.float()
    assert 1e-4 < float((ours - theirs).abs().mean() / ours.std()) < 0.2
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False, min_new_tokens=3).shape[1] == 43
    assert 0 <= report.loading_deviation < 0.01
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer().chat_template


def test_every_layer_has_its_error_and_the_file_is_smaller(quantized: tuple[str, Path, KbitReport]) -> None:
    method, folder, report = quantized
    assert [(module.layer, module.module) for module in report.modules] == [
        (layer, name) for layer in (0, 1) for name in MODULES
    ]
    low, high = {"int8": (0.002, 0.02), "nf4": (0.05, 0.15)}[method]
    assert all(low < module.relative_error < high for module in report.modules)
    assert report.quantized_bytes == (folder / "model.safetensors").stat().st_size
    assert report.size_ratio < {"int8": 0.5, "nf4": 0.4}[method]
    assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float16
    assert json.loads(json.dumps(report.to_dict()))["max_relative_error"] == report.max_relative_error


def test_second_run_writes_the_same_bytes_in_place_of_what_was_there(
    source: Path, quantized: tuple[str, Path, KbitReport], tmp_path: Path
) -> None:
    method, folder, _ = quantized
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "stale.bin").write_text("old")
    calls: list[tuple[int, int, str]] = []
    quantize_kbit(source, tmp_path / "again", method, ROWS, lambda *call: calls.append(call))
    digests = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in place.iterdir()}
        for place in (folder, tmp_path / "again")
    ]
    assert digests[0] == digests[1]
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_weights_with_nan_are_named_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "old").write_text("kept")
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 tensors: model.layers.1.mlp.up_proj.weight"):
        quantize_kbit(folder, tmp_path / "q", "int8", ROWS)
    assert (tmp_path / "q" / "old").read_text() == "kept"


def test_an_unknown_method_names_the_known_ones(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method 'int4' does not exist: use int8, nf4"):
        quantize_kbit(source, tmp_path / "q", "int4", ROWS)


def test_layers_too_narrow_for_the_cpu_kernel_are_named(tmp_path: Path) -> None:
    tiny_model(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=1).save_pretrained(
        tmp_path
    )
    check_widths(tmp_path, "int8")
    with pytest.raises(
        ValueError, match=r"self_attn\.k_proj has 64 inputs and 16 outputs; on a CPU nf4 needs multiples"
    ):
        check_widths(tmp_path, "nf4")


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_layers_that_store_their_weight_transposed_have_the_same_error(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "gpt2"
    tiny_model("gpt2", hidden_size=64, n_embd=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    report = quantize_kbit(folder, tmp_path / "q", method, ROWS)
    names = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}  # c_proj of the attention is square
    assert {module.module for module in report.modules} == names
    low, high = {"int8": (0.002, 0.02), "nf4": (0.05, 0.15)}[method]
    assert all(low < module.relative_error < high for module in report.modules)
    AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_weights_beyond_half_precision_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight of .* contains 1e\+06, beyond the range of half"):
        quantize_kbit(folder, tmp_path / "q", "int8", ROWS)
    assert not (tmp_path / "q").exists()


# ---- mixtures of experts ----


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_experts_and_routers_stay_in_half_precision_and_are_reported(method: str, tmp_path: Path) -> None:
    model = tiny_moe("phimoe", hidden_size=64, head_dim=32)  # its routers are linear layers
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    report = quantize_kbit(tmp_path / "source", tmp_path / "small", method, ROWS)
    assert {module.module for module in report.modules} == set(ATTENTION)
    assert report.kept_experts == ("experts.down_proj", "experts.gate_up_proj")
    experts = sum(weight.numel() for name, weight in model.named_parameters() if "experts" in name)
    assert report.kept_experts_share == pytest.approx(experts / model.num_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    block = loaded.model.layers[0].mlp
    assert block.experts.down_proj.dtype == block.router.weight.dtype == torch.float16
    assert loaded.lm_head.weight.dtype == torch.float16


def test_dense_models_keep_no_experts(quantized: tuple[str, Path, KbitReport]) -> None:
    assert (quantized[2].kept_experts, quantized[2].kept_experts_share) == ((), 0.0)


def test_family_whose_experts_transformers_cannot_load_in_8_bits_is_refused(tmp_path: Path) -> None:
    tiny_moe("llama4_text", hidden_size=64, head_dim=32).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="can't load all weights of this model in int8, so that some would be random"):
        quantize_kbit(tmp_path / "source", tmp_path / "small", "int8", ROWS)
