"""`quantize` on a tiny model: real GPTQ, calibrated on packed training rows, or skipped with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.export.kbit import quantize_kbit
from stages import evaluate, quantize
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.engines.programs import llama_cpp
from stages.models.variants import Variant, load_variant
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = write_tiny_run(tmp_path_factory.mktemp("quantize"))
    quantize.run(tiny_params(), paths)
    return paths


def test_checkpoint_report_and_figures_are_written(finished: Paths) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.out("quantize", "model"))
    assert model.config.quantization_config.bits == 4
    report = read_json(finished.out("quantize", "report.json"))
    assert len(report["modules"]) == 14
    figures = read_json(finished.metrics("quantize"))
    assert figures["size_ratio"] == pytest.approx(figures["quantized_mb"] / figures["source_mb"])
    # two packed rows of which one is longer than the calibration length of 32
    assert (figures["num_calibration_rows"], figures["num_calibration_tokens"]) == (2, 64)
    assert figures["num_distinct_calibration_rows"] == 2


def test_seed_chooses_the_calibration_rows_among_the_packed_training_rows(finished: Paths) -> None:
    chosen = [
        quantize.calibration_rows(tiny_params(quantize={"seed": seed, "num_calibration_rows": 1}).quantize, finished)
        for seed in (0, 0, 1, 2, 3)
    ]
    assert chosen[0] == chosen[1]
    assert len({str(rows) for rows in chosen}) == 2


def test_method_none_states_why_there_is_no_checkpoint(finished: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    quantize.run(tiny_params(quantize={"method": "none"}), finished)
    assert list(finished.out("quantize", "model").iterdir()) == []
    assert read_json(finished.out("quantize", "report.json")) == {"method": "none", "reason": quantize.SKIPPED}
    assert read_json(finished.metrics("quantize")) == {"method": "none"}
    assert quantize.SKIPPED in capsys.readouterr().out


def test_bitsandbytes_checkpoints_are_measured_like_the_others_and_evaluated(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    params = tiny_params(quantize={"method": "int8"})
    quantize.run(params, paths)
    figures = read_json(paths.metrics("quantize"))
    assert figures["method"] == "int8"
    assert figures["size_ratio"] == pytest.approx(figures["quantized_mb"] / figures["source_mb"])
    assert 0 < figures["mean_relative_error"] <= figures["max_relative_error"] < 0.2
    assert len(read_json(paths.out("quantize", "report.json"))["modules"]) == 14
    evaluate.run(params, paths)
    models = read_json(paths.out("evaluate", "results.json"))["models"]
    assert models["quantized"]["loss"] == pytest.approx(models["merged"]["loss"], rel=0.05)
    assert models["quantized"]["loss"] != models["merged"]["loss"]
    page = paths.evaluation_page.read_text(encoding="utf-8")
    assert "int8 (bitsandbytes), without calibration" in page


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp(REPO).ready.is_file(), reason="llama.cpp is not installed: `make engines`")
def test_gguf_files_of_the_merged_model_are_written_and_deleted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_ENGINES", str(llama_cpp(REPO).folder.parent))
    paths = write_tiny_run(tmp_path)
    quantize.run(tiny_params(quantize={"method": "none", "export_gguf": ["q8_0", "q4_k_m"]}), paths)
    folder = paths.out("quantize", "gguf")
    assert sorted(file.name for file in folder.iterdir()) == ["Modelfile", "model-q4_k_m.gguf", "model-q8_0.gguf"]
    figures = read_json(paths.metrics("quantize"))
    assert figures["gguf_q8_0_mb"] == (folder / "model-q8_0.gguf").stat().st_size / 1e6
    assert 0 < figures["gguf_q8_0_deviation"] < 0.05
    assert [file["kind"] for file in read_json(paths.out("quantize", "report.json"))["gguf"]] == ["q8_0", "q4_k_m"]
    quantize.run(tiny_params(quantize={"method": "none"}), paths)
    assert not folder.exists()


def test_group_size_that_does_not_fit_is_refused_before_the_work(finished: Paths) -> None:
    with pytest.raises(ValueError, match="group_size 64 does not divide the width 32"):
        quantize.run(tiny_params(quantize={"group_size": 64}), finished)


def test_short_and_repeated_calibration_rows_are_said() -> None:
    rows = [[1] * 11, [1] * 11, [2] * 11]
    assert list(quantize.calibration_notes(rows, num_short=0, num_wanted=3)) == [
        "only 2 of 3 calibration rows differ: GPTQ fits the weights to those alone"
    ]
    notes = list(quantize.calibration_notes(rows[1:], num_short=1, num_wanted=4))
    assert notes == [
        "2 calibration rows, all there are, instead of 4",
        "packed training rows of fewer than 11 tokens, which calibrate nothing: 1",
    ]


def test_rounded_model_with_layer_norms_is_loaded_in_the_dtype_that_it_was_saved_in(tmp_path: Path) -> None:
    tiny_model("phi", hidden_size=64).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    quantize_kbit(tmp_path / "source", tmp_path / "q", "int8", [list(range(5, 45))])
    model = load_variant(Variant("quantized", tmp_path / "q"), tiny_params().model, len(tiny_tokenizer()), [])
    assert tiny_params().model.dtype == "float32"  # in which transformers would load it, and torch refuse it
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
