"""`evaluate` on a tiny model: figures, files, the gate's verdict, and a page that shows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import evaluate, merge
from stages.checkout.artifacts import read_json, read_jsonl, write_json, write_jsonl
from stages.checkout.paths import Paths
from tests.stages.tiny_run import tiny_params, write_tiny_run
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, str]:
    paths = write_tiny_run(tmp_path_factory.mktemp("evaluate"))
    evaluate.run(tiny_params(), paths)
    return paths, (paths.evaluation_page).read_text(encoding="utf-8")


def test_every_model_is_measured_side_by_side(finished: tuple[Paths, str]) -> None:
    results = read_json(finished[0].out("evaluate", "results.json"))
    assert list(results["models"]) == ["base", "tuned", "merged"]
    generated = {"exact_match", "json_valid", "field_f1", "field_f1_micro", "stop_rate"}
    always = {"loss", "perplexity", "token_accuracy", "size_mb"}
    assert {name: set(figures) for name, figures in results["models"].items()} == {
        "base": always | generated | {"kl"},
        "tuned": always | generated,
        "merged": always | {"kl"},
    }
    assert results["num_prompts"] == 3
    assert "1.2e-06" in results["not_generated"]["merged"]


def test_merged_model_has_the_tuned_loss_and_base_has_another(finished: tuple[Paths, str]) -> None:
    models = read_json(finished[0].out("evaluate", "results.json"))["models"]
    assert models["merged"]["loss"] == pytest.approx(models["tuned"]["loss"], rel=1e-5)
    assert models["base"]["loss"] != pytest.approx(models["tuned"]["loss"], rel=1e-3)


def test_divergence_from_the_tuned_model_is_none_for_merged_and_some_for_base(finished: tuple[Paths, str]) -> None:
    models = read_json(finished[0].out("evaluate", "results.json"))["models"]
    assert models["merged"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert models["base"]["kl"] > 1e-4


def test_every_mean_has_an_interval_and_base_and_tuned_a_paired_test(finished: tuple[Paths, str]) -> None:
    results = read_json(finished[0].out("evaluate", "results.json"))
    for name, figures in results["models"].items():
        assert set(results["intervals"][name]) == set(figures) - {"size_mb"}
        for metric, (low, high) in results["intervals"][name].items():
            assert low <= figures[metric] + 1e-6, (name, metric)
            assert figures[metric] <= high + 1e-6, (name, metric)
    (pair,) = results["comparisons"]
    assert (pair["before"], pair["after"]) == ("base", "tuned")
    difference = results["models"]["tuned"]["loss"] - results["models"]["base"]["loss"]
    assert pair["figures"]["loss"]["difference"] == pytest.approx(difference, abs=1e-5)
    assert pair["figures"]["exact_match"]["test"] == "McNemar, exact"
    assert 0 < pair["figures"]["loss"]["p_value"] <= 1


def test_failed_gate_is_recorded_and_does_not_fail_the_stage(finished: tuple[Paths, str]) -> None:
    results = read_json(finished[0].out("evaluate", "results.json"))
    assert [(row["condition"], row["passed"]) for row in results["gate"]] == [
        ("tuned.loss <= 2 * base.loss", True),
        ("tuned.exact_match >= 0.5", False),
    ]
    assert results["passed"] is False
    assert read_json(finished[0].metrics("evaluate"))["gate_passed"] == 0


def test_generations_hold_prompt_reference_and_answers_with_scores(finished: tuple[Paths, str]) -> None:
    rows = list(read_jsonl(finished[0].out("evaluate", "generations.jsonl")))
    assert [row["id"] for row in rows] == ["tiny.jsonl:1", "tiny.jsonl:2", "tiny.jsonl:3"]
    assert set(rows[0]) == {"id", "prompt", "reference", "answers"}
    assert set(rows[0]["answers"]) == {"base", "tuned"}
    assert set(rows[0]["answers"]["tuned"]) == {"text", "stopped", "num_tokens", "scores"}


def test_results_hold_no_wall_times_and_are_the_same_at_every_run(finished: tuple[Paths, str]) -> None:
    paths = finished[0]
    files = [
        paths.out("evaluate", "results.json"),
        paths.out("evaluate", "generations.jsonl"),
        paths.metrics("evaluate"),
    ]
    before = [path.read_bytes() for path in files]
    assert b"second" not in b"".join(before)
    evaluate.run(tiny_params(), paths)
    assert [path.read_bytes() for path in files] == before
    assert set(read_json(paths.timings("evaluate"))["tuned"]) == {"likelihood", "generation", "tokens_per_second"}


def test_page_says_the_verdict_first_and_escapes_what_the_data_holds(finished: tuple[Paths, str]) -> None:
    page = finished[1]
    assert (
        "The gate is closed: of 2 conditions, 1 does not hold and 1 is not shown; only 3 held-out rows"
        in page.split("</h1>")[0]
    )
    assert "<p>The gate is closed. The stage <code>publish</code>" in page
    assert "&lt;b&gt;Rome&lt;/b&gt;" in page
    assert "<b>Rome" not in page


def test_progress_ends_at_its_total(finished: tuple[Paths, str], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.run(tiny_params(evaluate={"num_rows": 2, "max_new_tokens": 2, "batch_size": 2, "gate": []}), finished[0])
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate: ")][-1]
    # 3 documents for each of 3 models, 2 prompts for base and tuned
    assert last.startswith("evaluate: 13 of 13 documents and prompts (100 %)")


def test_full_weights_are_evaluated_in_place_of_an_adapter(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    for file in paths.out("train", "model").iterdir():
        file.unlink()
    for file in paths.out("merge", "model").iterdir():
        (paths.out("train", "model") / file.name).write_bytes(file.read_bytes())
    evaluate.run(tiny_params(), paths)
    models = read_json(paths.out("evaluate", "results.json"))["models"]
    assert models["merged"]["loss"] == pytest.approx(models["tuned"]["loss"], rel=1e-6)
    assert models["tuned"]["size_mb"] == models["merged"]["size_mb"]


def test_tokens_that_the_base_does_not_have_get_rows_as_in_training(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    paths = write_tiny_run(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(paths.out("format", "tokenizer"))
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    from stages.models.variants import find_variants, load_variant

    base = load_variant(find_variants(paths)[0], tiny_params().model, len(tokenizer), [])
    assert base.get_input_embeddings().num_embeddings == len(tokenizer)
    assert torch.isfinite(base(torch.tensor([[len(tokenizer) - 1]])).logits).all()


def test_gate_on_a_model_that_there_is_not_fails_and_says_so(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    evaluate.run(tiny_params(evaluate={"gate": ["quantized.loss <= 2"]}), paths)
    results = read_json(paths.out("evaluate", "results.json"))
    assert results["gate"][0]["reason"] == "quantized.loss was not measured"
    assert results["passed"] is False


def test_reference_that_does_not_fit_the_task_is_named_by_its_row(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    rows = list(read_jsonl(paths.out("format", "prompts.jsonl")))
    write_jsonl(paths.out("format", "prompts.jsonl"), [rows[0], {**rows[1], "reference": "Dear Ada"}])
    with pytest.raises(ValueError, match=r"held-out row tiny.jsonl:2: the reference is not JSON"):
        evaluate.run(tiny_params(), paths)
    write_jsonl(paths.out("format", "prompts.jsonl"), [])
    with pytest.raises(ValueError, match="no held-out row has a turn to answer"):
        evaluate.run(tiny_params(), paths)


def test_text_task_scores_words(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    evaluate.run(tiny_params(evaluate={"task": "text", "gate": ["tuned.word_f1 < 1"]}), paths)
    results = json.loads(paths.out("evaluate", "results.json").read_text())
    assert results["passed"] is True
    assert "word_f1" in results["models"]["tuned"]


def test_several_tasks_and_an_own_function_are_scored_and_shown(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "faq.py").write_text("def length(answer, reference):\n    return len(answer)\n")
    evaluate.run(tiny_params(evaluate={"task": ["chrf", "tasks.faq.length"], "gate": ["tuned.length > 0"]}), paths)
    results = read_json(paths.out("evaluate", "results.json"))
    assert set(results["models"]["tuned"]) >= {"chrf", "length", "stop_rate"}
    assert set(results["intervals"]["tuned"]) >= {"chrf", "length", "stop_rate"}
    assert results["passed"] is True
    page = paths.evaluation_page.read_text(encoding="utf-8")
    assert "chrF, 0 to 100 on 3 held-out rows: base" in page
    assert "tuned is wrong" not in page  # no score shows which answer is right


def scale(file: Path, name: str, factor: float) -> None:
    tensors = load_file(file)
    tensors[name] *= factor
    save_file(tensors, file, metadata={"format": "pt"})


def broken(paths: Paths) -> list[str]:
    """The gate's rows that say what is broken, with an evaluation whose own conditions all hold."""
    evaluate.run(tiny_params(evaluate={"gate": ["tuned.loss > 0"]}), paths)
    results = read_json(paths.out("evaluate", "results.json"))
    assert results["gate"][-1]["passed"] is True
    rows = results["gate"][:-1]
    assert results["passed"] is (not rows)
    assert all(row["reason"] in paths.evaluation_page.read_text(encoding="utf-8") for row in rows)
    return [f"{row['condition']}: {row['reason']}" for row in rows]


def test_one_scaled_tensor_of_the_merged_model_closes_the_gate(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    assert broken(paths) == []
    scale(paths.out("merge", "model", "model.safetensors"), "model.layers.0.mlp.up_proj.weight", 1.1)
    (row,) = broken(paths)
    assert row.startswith("merged.kl <= 1e-06: the merged model is not the tuned one, its answers diverge by ")
    assert row.endswith("its folder was changed after the stage `merge`; `dvc repro merge` writes it again")


def test_head_of_the_base_in_a_merged_model_closes_the_gate(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    folder = paths.out("merge", "model")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    head = tensors["model.embed_tokens.weight"]
    save_file(
        {**tensors, "lm_head.weight": head + 0.01 * torch.randn(head.shape, generator=generator)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "tie_word_embeddings": False})
    assert [row.split(":")[0] for row in broken(paths)] == ["merged.kl <= 1e-06"]


def test_adapter_with_another_scale_than_it_was_trained_with_closes_the_gate(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    file = paths.out("train", "model", "adapter_config.json")
    config = read_json(file)
    write_json(file, {**config, "lora_alpha": 16 * config["lora_alpha"]})
    merged, tuned = broken(paths)
    assert merged.startswith("merged.kl <= 1e-06: ")
    assert "after the stage `train`; `dvc repro train` writes it again" in tuned
    # what merges such an adapter agrees with it, but not with the training
    shutil.rmtree(paths.out("merge"))
    tiny_tokenizer().save_pretrained(paths.out("train", "model"))
    merge.run(tiny_params(), paths)
    assert [row.split(" within ")[0] for row in broken(paths)] == ["tuned.loss"]


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (3e38, r"the merged model has a loss of (nan|inf) .*outs/merge/model are broken.* `merge`"),
        (
            float("nan"),
            r"the merged model: The weight model\.norm\.weight in .*merge/model/.* stage `merge` makes",
        ),
    ],
)
def test_model_that_gives_nan_is_named_with_its_folder_and_the_stage_that_makes_it(
    tmp_path: Path, factor: float, message: str
) -> None:
    paths = write_tiny_run(tmp_path)
    scale(paths.out("merge", "model", "model.safetensors"), "model.norm.weight", factor)
    with pytest.raises(ValueError, match=message):
        evaluate.run(tiny_params(), paths)
