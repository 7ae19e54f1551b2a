"""Tasks of lm-eval: without the package there is one clear error, with it a local task runs on a tiny model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from sft.evaluate.lm_eval import Harness, HarnessOptions, check_harness, figure_part, read_results
from tests.tiny import tiny_model, tiny_tokenizer

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an optional extra")

TASK = """task: cities
dataset_path: json
dataset_kwargs:
  data_files: {test: tasks/cities.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
CITIES = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo")]


def write_task(root: Path, text: str = TASK) -> Path:
    """Write a local task and its data to the folder `tasks/` in a root folder."""
    folder = root / "tasks"
    folder.mkdir(exist_ok=True)
    (folder / "cities.yaml").write_text(text)
    rows = [
        {"question": f"What is the capital of {country}?", "choices": [city, "London"], "answer": 0}
        for country, city in CITIES
    ]
    (folder / "cities.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="it is about the package not being there")
def test_missing_package_names_the_extra() -> None:
    with pytest.raises(
        ValueError, match=r"lm-eval is not installed; it is an optional extra: pip install '\.\[lm-eval\]'"
    ):
        check_harness()


def test_figures_are_those_of_the_tasks_asked_for_and_of_a_group_its_own() -> None:
    found = {
        "results": {
            "many": {"alias": "many", "sample_len": 8, "acc,none": 0.5, "acc_stderr,none": 0.1},
            "many_a": {"acc,none": 0.25},
            "many_b": {"acc,none": 0.75},
            "gsm-8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
            "odd": {"perplexity,none": float("nan"), "acc,none": True},
        },
        "group_subtasks": {"many": ["many_a", "many_b"]},
        "n-samples": {"gsm-8k": {"original": 9, "effective": 4}},
        "n-shot": {"gsm-8k": 5},
    }
    result = read_results(found, ["many", "many_b", "gsm-8k", "odd"])
    assert result.figures == {"many.acc": 0.5, "many_b.acc": 0.75, "gsm_8k.exact_match_strict_match": 0.5, "odd.acc": 1}
    assert result.errors == {"many.acc": 0.1}
    assert result.tasks["gsm-8k"] == {"num_rows": 4, "num_fewshot": 5}
    assert figure_part("gsm-8k") == "gsm_8k"


@needs_lm_eval
def test_local_task_is_run_on_local_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    harness = Harness(["cities"], folder)
    options = HarnessOptions(limit=3, batch_size=2)
    result = harness.measure(tiny_model(), tiny_tokenizer(), options)
    assert set(result.figures) == set(result.errors) == {"cities.acc"}
    assert result.figures["cities.acc"] in (0, 1 / 3, 2 / 3, 1)
    assert result.tasks == {"cities": {"num_rows": 3, "num_fewshot": 0}}
    assert harness.measure(tiny_model(), tiny_tokenizer(), options) == result
    chat = harness.measure(tiny_model(), tiny_tokenizer(), HarnessOptions(apply_chat_template=True, num_fewshot=1))
    assert chat.tasks == {"cities": {"num_rows": 4, "num_fewshot": 1}}


@needs_lm_eval
def test_task_whose_data_are_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_task(tmp_path)
    (folder / "cities.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the task cities cannot be loaded: FileNotFoundError: .*cities.jsonl"):
        Harness(["cities"], folder)


@needs_lm_eval
@pytest.mark.slow
def test_unknown_task_comes_with_the_nearest_that_lm_eval_knows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lm-eval has no task 'arc_eazy', .*; did you mean 'arc_easy'\?"):
        Harness(["arc_eazy"], write_task(tmp_path))
