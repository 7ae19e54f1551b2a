"""int8 and nf4: the folder loads on a CPU, is small, and the error of each layer fits the number of bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.family_checks import special_tokens
from benchmarks.tiny_families import Sizes, tiny_config
from sft.export.kbit import KbitReport, _config, check_layers, quantize_kbit
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
    check_layers(tmp_path, "int8")
    with pytest.raises(
        ValueError, match=r"self_attn\.k_proj has 64 inputs and 16 outputs; on a CPU nf4 needs multiples"
    ):
        check_layers(tmp_path, "nf4")


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


# ---- what bitsandbytes would leave unrounded ----


@pytest.mark.parametrize("method", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe", "granitemoe", "phimoe", "llama4_text", "jetmoe"])
def test_experts_that_are_no_layers_are_refused_by_the_config_alone(family: str, method: str, tmp_path: Path) -> None:
    model = tiny_moe(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    experts = sum(
        weight.numel() for name, weight in model.named_parameters() if weight.ndim == 3 and "conv" not in name
    )
    share = f"{100 * experts / model.num_parameters():.0f} % of the weights of {tmp_path} are experts"
    reason = f"parameters of {type(model).__name__} and not layers: bitsandbytes quantizes layers alone"
    with pytest.raises(ValueError, match=f"^{share} .* {reason}, and would leave them in half precision"):
        check_layers(tmp_path, method)
    with pytest.raises(ValueError, match=share):
        quantize_kbit(tmp_path, tmp_path / "small", method, ROWS)


def test_experts_of_dbrx_which_are_one_matrix_are_refused_as_well(tmp_path: Path) -> None:
    tiny_config("dbrx", Sizes(), special_tokens()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"are experts \(mlp\.v1, mlp\.w1, mlp\.w2\), which are parameters of DbrxFor"):
        check_layers(tmp_path, "int8")


def test_layers_of_a_class_that_bitsandbytes_does_not_know_are_refused(tmp_path: Path) -> None:
    tiny_model("falcon").save_pretrained(tmp_path)
    reason = "^100 % of the matrices of .* are not weights of torch.nn.Linear but of FalconLinear, and bitsandbytes"
    with pytest.raises(ValueError, match=reason):
        check_layers(tmp_path, "int8")


def test_routers_of_mixtures_whose_experts_are_layers_stay_in_half_precision() -> None:
    model = tiny_moe("phimoe")
    routers = ["model.layers.0.mlp.router", "model.layers.1.mlp.router"]
    assert _config("int8", model).llm_int8_skip_modules == ["lm_head", *routers]
    assert _config("int8", tiny_model("llama")).llm_int8_skip_modules is None
