"""GPTQ: invalid input is rejected before the computation, and checkpoints have the layout that readers expect."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.export.gptq import GPTQSettings, QuantizeReport, load_dequantized, loading_deviation, quantize_gptq
from sft.export.gptq_format import dequantize, packed_layers
from sft.export.quantization import (
    check_calibration,
    check_layers_fit,
    check_weights_finite,
    select_calibration,
    small_layers,
)
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_moe import tiny_moe

pytestmark = pytest.mark.numerics

ROWS = [[random.Random(seed).randrange(4, 380) for _ in range(64)] for seed in range(8)]


def save_tiny(folder: Path, **overrides: int) -> Path:
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_model(**{**wide, **overrides}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def assert_equal_in_half_precision(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that logits differ by rounding alone: the packed kernel computes in half precision on every processor."""
    difference = (found - expected).abs() / expected.std()
    assert difference.mean() < 0.01
    assert difference.max() < 0.1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gptq") / "source")


@pytest.fixture(scope="module")
def quantized(source: Path) -> tuple[Path, QuantizeReport]:
    target = source.parent / "quantized"
    return target, quantize_gptq(source, target, ROWS, GPTQSettings(bits=4, group_size=32))


def test_checkpoint_loads_plainly_and_computes_what_its_files_contain(
    source: Path, quantized: tuple[Path, QuantizeReport]
) -> None:
    rebuilt = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, packed in packed_layers(quantized[0]):
        rebuilt.get_submodule(name).weight.data = dequantize(packed, 4).T.contiguous()
    loaded = AutoModelForCausalLM.from_pretrained(quantized[0], dtype=torch.float32)
    ids = torch.tensor(ROWS[:2])
    with torch.no_grad():
        found, expected = loaded(input_ids=ids).logits, rebuilt(input_ids=ids).logits
        unquantized = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(input_ids=ids).logits
    assert_equal_in_half_precision(found, expected)
    with pytest.raises(AssertionError):  # what four bits change is more than that
        assert_equal_in_half_precision(found, unquantized)


def test_dequantized_model_computes_what_the_packed_one_does_and_keeps_its_ties(
    quantized: tuple[Path, QuantizeReport],
) -> None:
    plain = load_dequantized(quantized[0])
    packed = AutoModelForCausalLM.from_pretrained(quantized[0], dtype=torch.float32)
    ids = torch.tensor(ROWS[:2])
    with torch.no_grad():
        assert_equal_in_half_precision(plain(input_ids=ids).logits, packed(input_ids=ids).logits)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert plain.generation_config.eos_token_id == packed.generation_config.eos_token_id
    assert 0 < quantized[1].loading_deviation < 0.05


def test_checkpoint_that_loads_as_a_different_model_is_refused(
    quantized: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(quantized[0], folder)
    config = json.loads((folder / "config.json").read_text())
    # Transformers now reads the zero points unchanged, although the file stores them minus one.
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gives wrong logits: they differ from those of its dequantized weights by"):
        loading_deviation(folder, ROWS[0])


def test_checkpoint_is_small_and_keeps_tokenizer_and_generation_config(
    source: Path, quantized: tuple[Path, QuantizeReport]
) -> None:
    folder, report = quantized
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert "lm_head.weight" not in tensors
    assert report.quantized_bytes == (folder / "model.safetensors").stat().st_size
    assert report.size_ratio < 1 / 3
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(path.name for path in source.iterdir()), "quantize_config.json"]
    )


def test_layout_is_what_vllm_and_transformers_read(quantized: tuple[Path, QuantizeReport]) -> None:
    config = json.loads((quantized[0] / "config.json").read_text())["quantization_config"]
    assert {
        key: config[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")
    } == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    assert json.loads((quantized[0] / "quantize_config.json").read_text()) == config
    layers = dict(packed_layers(quantized[0]))
    assert len(layers) == 14
    down = layers["model.layers.1.mlp.down_proj"]
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in down.items()} == {
        "qweight": ((96 // 8, 64), torch.int32),
        "qzeros": ((3, 64 // 8), torch.int32),
        "scales": ((3, 64), torch.float16),
        "g_idx": ((96,), torch.int32),
    }
    assert down["g_idx"].tolist() == [column // 32 for column in range(96)]


def test_report_names_every_layer_with_its_error(quantized: tuple[Path, QuantizeReport]) -> None:
    report = quantized[1]
    attention = [f"self_attn.{name}_proj" for name in "koqv"]
    names = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *attention]
    assert [(m.layer, m.module) for m in report.modules] == [(layer, name) for layer in (0, 1) for name in names]
    assert all(0.02 < module.relative_error < 0.2 for module in report.modules)
    assert (report.num_rows, report.num_tokens) == (8, 512)
    assert json.loads(json.dumps(report.to_dict()))["mean_relative_error"] == report.mean_relative_error


def test_second_run_writes_the_same_bytes_and_reports_progress(
    source: Path, quantized: tuple[Path, QuantizeReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[int, int, str]] = []
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "stale.bin").write_text("old")
    settings = GPTQSettings(bits=4, group_size=32)
    quantize_gptq(source, tmp_path / "again", ROWS, settings, on_progress=lambda *call: calls.append(call))
    assert digests(tmp_path / "again") == digests(quantized[0])
    assert calls == [(0, 2, f"{len(ROWS)} calibration rows"), (1, 2, "block 0 quantized"), (2, 2, "block 1 quantized")]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "desc_act", "worst"),
    [
        (2, 32, False, True, 0.6),
        (3, 32, True, False, 0.3),
        (8, -1, True, False, 0.01),
    ],
)
def test_other_widths_load_and_err_as_much_as_their_bits_allow(
    source: Path, tmp_path: Path, bits: int, group_size: int, sym: bool, desc_act: bool, worst: float
) -> None:
    settings = GPTQSettings(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
    report = quantize_gptq(source, tmp_path / "q", ROWS, settings)
    assert report.max_relative_error < worst
    # Transformers loads the values of the files, and these are close to the source.
    assert report.loading_deviation < 0.01
    weight = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    restored = load_dequantized(tmp_path / "q").get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    assert float((weight - restored).norm() / weight.norm()) == pytest.approx(
        next(m.relative_error for m in report.modules if (m.layer, m.module) == (0, "mlp.up_proj")), rel=1e-4
    )


def test_group_size_that_does_not_divide_names_layer_width_and_sizes_that_fit(source: Path) -> None:
    expected = r"group_size 64 does not divide the width 96 of model.layers.0.mlp.down_proj; sizes that fit: 32"
    with pytest.raises(ValueError, match=expected):
        check_layers_fit(source, bits=4, group_size=64)


def test_four_bit_rows_without_groups_are_refused_where_no_kernel_runs_them(source: Path) -> None:
    with pytest.raises(
        ValueError, match=r"makes one group of the width 96 of model.layers.0.mlp.down_proj; sizes that fit: 32"
    ):
        check_layers_fit(source, bits=4, group_size=-1, device="cpu")
    check_layers_fit(source, bits=4, group_size=-1, device="cuda:0")
    check_layers_fit(source, bits=8, group_size=-1, device="cpu")


def test_bits_that_do_not_pack_into_a_layer_name_it(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    check_layers_fit(folder, bits=4, group_size=-1, device="cuda:0")
    with pytest.raises(
        ValueError, match=r"2-bit weights are packed by 16, .* output width 8 of model.layers.0.self_attn.k"
    ):
        check_layers_fit(folder, bits=2, group_size=-1)
    with pytest.raises(ValueError, match="bits is 5, but GPTQ supports 2, 3, 4, 8"):
        check_layers_fit(folder, bits=5, group_size=-1)
    with pytest.raises(ValueError, match="group_size is 24, but readers support -1 and 32"):
        check_layers_fit(folder, bits=4, group_size=24)


def test_weights_with_nan_are_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 tensors: model.layers.1.mlp.up_proj.weight \(1 of 6144\)"):
        check_weights_finite(folder)


def test_poisoned_calibration_is_named(source: Path) -> None:
    row = list(range(4, 20))
    with pytest.raises(
        ValueError, match="calibration row 1 has token id 384 at position 2, but the ids of the model are 0 to 383"
    ):
        check_calibration(source, [row, [1, 2, 384, *row]])
    with pytest.raises(ValueError, match="calibration row 0 has 10 tokens, at least 11"):
        check_calibration(source, [row[:10]])
    with pytest.raises(ValueError, match="calibration row 1 has token id nan at position 0"):
        check_calibration(source, [row, [float("nan"), *row]])
    with pytest.raises(ValueError, match="calibration is empty"):
        check_calibration(source, [])


def test_failed_run_leaves_the_old_checkpoint_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "old").write_text("kept")
    with pytest.raises(ValueError, match="calibration row 0"):
        quantize_gptq(source, tmp_path / "q", [[9999] * 20], GPTQSettings(group_size=32))
    assert (tmp_path / "q" / "old").read_text() == "kept"


def test_damping_grows_until_the_hessian_has_an_inverse_and_is_reported(source: Path, tmp_path: Path) -> None:
    settings = GPTQSettings(group_size=32, damp_percent=1e-9)
    report = quantize_gptq(source, tmp_path / "q", [list(range(5, 17))], settings)
    assert report.num_damping_retries == 14
    assert {module.damp for module in report.modules} == {0.01}


def test_activations_that_overflow_are_an_error_and_no_round_to_nearest(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].fill_(1e25)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = (
        "7 of 14 layers could not be quantized, as their Hessian has no inverse at any damping: layer 1 self_attn"
    )
    with pytest.raises(ValueError, match=expected):
        quantize_gptq(folder, tmp_path / "q", ROWS[:2], GPTQSettings(group_size=32))
    assert not (tmp_path / "q").exists()


def test_row_that_the_model_gives_nan_on_is_named_with_its_token(tmp_path: Path) -> None:
    options = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "tie_word_embeddings": False}
    model = tiny_model("phi", **options)
    model.get_input_embeddings().weight.data[7] = 3e38  # a layer norm makes NaN of it
    model.save_pretrained(tmp_path / "source")
    clean = [[token if token != 7 else 8 for token in row] for row in ROWS[:3]]
    poisoned = [9] * 30 + [7] * 34
    expected = (
        r"NaN or Inf on 1 of 3 calibration rows \(number 2\) .*: the embeddings of token ids 7 cause it\. 12 of 12"
    )
    with pytest.raises(ValueError, match=expected):
        quantize_gptq(tmp_path / "source", tmp_path / "q", [*clean[:2], poisoned], GPTQSettings(group_size=32))
    assert not (tmp_path / "q").exists()
    report = quantize_gptq(tmp_path / "source", tmp_path / "q", clean, GPTQSettings(group_size=32))
    assert report.kept_full_precision == ("model.embed_tokens.weight",)


def test_rows_that_are_the_same_are_counted_once(source: Path, tmp_path: Path) -> None:
    report = quantize_gptq(source, tmp_path / "q", [ROWS[0]] * 4, GPTQSettings(group_size=32))
    assert (report.num_rows, report.num_distinct_rows) == (4, 1)
    assert report.max_relative_error < 0.2


def test_layers_that_transformers_could_not_load_again_are_refused(tmp_path: Path) -> None:
    tiny_model("gpt2", hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn of .* is a Conv1D, .*; use int8 or nf4"):
        check_layers_fit(tmp_path, bits=4, group_size=32)


def test_asymmetric_rows_without_groups_are_refused_where_the_kernel_misreads_them(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, intermediate_size=128)
    with pytest.raises(ValueError, match=r"misreads asymmetric 4-bit rows without groups: use sym: true, or a group"):
        check_layers_fit(folder, bits=4, group_size=-1, sym=False)
    check_layers_fit(folder, bits=4, group_size=-1, sym=True)
    check_layers_fit(folder, bits=4, group_size=32, sym=False)
    check_layers_fit(folder, bits=3, group_size=-1, sym=False)
    check_layers_fit(folder, bits=4, group_size=-1, device="cuda:0", sym=False)


def test_calibration_rows_are_chosen_by_seed_and_cut_to_length() -> None:
    rows = [[index] * (8 + index % 5) for index in range(40)]
    chosen = select_calibration(rows, num_rows=6, length=11, seed=3)
    assert chosen == select_calibration(rows, num_rows=6, length=11, seed=3)
    assert chosen != select_calibration(rows, num_rows=6, length=11, seed=4)
    assert len({row[0] for row in chosen}) == 6
    assert {len(row) for row in chosen} == {11}
    assert len(select_calibration(rows, num_rows=1000, length=99, seed=0)) == 16
    with pytest.raises(ValueError, match="none of the 2 training rows"):
        select_calibration([[1], []], num_rows=1, length=11, seed=0)
    with pytest.raises(ValueError, match="at least one row of 11 tokens, got 1 rows of 8"):
        select_calibration(rows, num_rows=1, length=8, seed=0)


def test_a_failure_in_a_thread_of_gptqmodel_is_raised_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptqmodel.quantization.gptq.GPTQ.quantize", fail)
    with pytest.raises(OSError, match="No space left"):
        quantize_gptq(source, tmp_path / "out", ROWS, GPTQSettings(group_size=32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("family", "share"), [("mixtral", 43), ("qwen3_moe", 43), ("gpt_oss", 42), ("granitemoe", 43)])
def test_stacked_experts_are_refused_with_the_reason(family: str, share: int, tmp_path: Path) -> None:
    tiny_moe(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^{share} % of the weights .* are experts .* in a GPTQ checkpoint each"):
        check_layers_fit(tmp_path, bits=4, group_size=32)


def test_layers_too_narrow_to_pack_stay_in_half_precision_and_the_checkpoint_loads(tmp_path: Path) -> None:
    heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    model = tiny_model(
        "qwen3_5_text",
        hidden_size=64,
        intermediate_size=96,
        num_key_value_heads=1,
        head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        **heads,
    )
    model.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    gates = [f"model.layers.0.linear_attn.in_proj_{gate}" for gate in "ba"]
    assert sorted(small_layers(tmp_path / "plain", bits=4, group_size=32)) == sorted(gates)
    quantize_gptq(tmp_path / "plain", tmp_path / "packed", ROWS, GPTQSettings(bits=4, group_size=32))
    packed = {name for name, _ in packed_layers(tmp_path / "packed")}
    assert "model.layers.0.linear_attn.out_proj" in packed
    assert not packed & set(gates)
    config = json.loads((tmp_path / "packed" / "config.json").read_text(encoding="utf-8"))
    named = config["quantization_config"]["modules_in_block_to_quantize"][0]
    assert "linear_attn.out_proj" in named
    assert "linear_attn.in_proj_b" not in named
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)(input_ids=ids).logits
        assert_equal_in_half_precision(loaded, load_dequantized(tmp_path / "packed")(input_ids=ids).logits)


def test_checkpoint_whose_layers_are_all_packed_says_nothing_of_modules(quantized: tuple[Path, QuantizeReport]) -> None:
    config = json.loads((quantized[0] / "config.json").read_text(encoding="utf-8"))
    assert "modules_in_block_to_quantize" not in config["quantization_config"]
