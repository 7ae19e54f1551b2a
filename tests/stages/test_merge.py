"""The stage `merge`: one plain checkpoint, the comparison in its metrics; a failure keeps an earlier result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stages.checkout.paths import Paths
from stages.merge import run, split_row
from tests.stages.tiny_run import tiny_params, write_tiny_run
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = write_tiny_run(tmp_path)
    shutil.rmtree(paths.out("merge"))
    paths.metrics("merge").unlink()
    tiny_tokenizer().save_pretrained(paths.out("train", "model"))  # as the stage `train` does
    return paths


def figures(paths: Paths) -> dict[str, float]:
    return json.loads(paths.metrics("merge").read_text())


def test_adapter_is_merged_and_the_figures_say_so(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_params(), paths)
    merged = AutoModelForCausalLM.from_pretrained(paths.out("merge", "model"))
    base = AutoModelForCausalLM.from_pretrained(paths.root / "models" / "base")
    adapted = PeftModel.from_pretrained(base, paths.out("train", "model")).eval()
    ids = torch.arange(5, 45)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5, rtol=0)
    found = figures(paths)
    assert sorted(found) == [
        "adapter_effect",
        "dtype",
        "max_logit_diff",
        "mean_logit_diff",
        "merged",
        "num_adapted_modules",
        "num_positions",
        "size_mb",
        "tied_embeddings",
        "top_token_agreement",
    ]
    assert found["merged"] is True
    assert found["max_logit_diff"] < 1e-4
    assert found["num_adapted_modules"] == 14
    printed = capsys.readouterr().out
    assert "merge: 21 of 21 modules merged (100 %)" in printed
    assert "documents compared (100 %)" in printed
    assert "merged 14 modules into the unquantized base" in printed


def test_folder_is_a_whole_checkpoint(paths: Paths) -> None:
    run(tiny_params(), paths)
    assert sorted(file.name for file in paths.out("merge", "model").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [folder.name for folder in paths.out("merge").iterdir()] == ["model"]


def test_wall_time_is_kept_out_of_the_metrics(paths: Paths) -> None:
    run(tiny_params(), paths)
    assert "seconds" not in figures(paths)
    assert json.loads(paths.timings("merge").read_text())["seconds"] > 0


def test_weights_trained_in_full_are_copied_and_the_message_states_it(
    paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(paths.out("train", "model"))
    tiny_model().save_pretrained(paths.out("train", "model"))
    tiny_tokenizer().save_pretrained(paths.out("train", "model"))
    run(tiny_params(train={"method": "full"}), paths)
    assert figures(paths)["merged"] is False
    assert figures(paths)["max_logit_diff"] == 0.0
    assert "there is no adapter to merge" in capsys.readouterr().out


def test_dtype_of_the_params_is_that_of_the_checkpoint(paths: Paths) -> None:
    run(tiny_params(merge={"dtype": "bfloat16", "tolerance": 1.0}), paths)
    assert AutoModelForCausalLM.from_pretrained(paths.out("merge", "model")).dtype is torch.bfloat16
    assert figures(paths)["dtype"] == "bfloat16"


def test_failed_proof_keeps_the_earlier_result(paths: Paths) -> None:
    run(tiny_params(), paths)
    weights = paths.out("merge", "model", "model.safetensors")
    before = weights.read_bytes()
    with pytest.raises(ValueError, match=r"tolerance is 1e-12. Nothing was written"):
        run(tiny_params(merge={"tolerance": 1e-12}), paths)
    assert weights.read_bytes() == before
    assert [folder.name for folder in paths.out("merge").iterdir()] == ["model"]


def test_changed_base_is_noticed_before_anything_is_merged(paths: Paths) -> None:
    config = paths.root / "models" / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match=r"changed since `load` ran"):
        run(tiny_params(), paths)
    assert not paths.out("merge", "model").exists()


def test_no_rows_to_compare_on_is_an_error(paths: Paths) -> None:
    shutil.rmtree(paths.out("pack", "eval"))
    Dataset.from_dict({"input_ids": [[]], "labels": [[]], "seq_lengths": [[]]}).save_to_disk(
        str(paths.out("pack", "eval"))
    )
    with pytest.raises(ValueError, match="contains no documents, on which the merged logits must be compared"):
        run(tiny_params(), paths)


def test_packed_row_is_taken_apart_into_its_documents() -> None:
    assert list(split_row({"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]})) == [[1, 2], [3, 4, 5]]
    assert list(split_row({"input_ids": [1, 2, 3]})) == [[1, 2, 3]]
