"""Tasks of lm-eval in `evaluate`: figures, intervals, report, gate; the extra is named if it is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import ValidationError

from stages import evaluate
from stages.checkout.artifacts import read_json
from stages.evaluation.lm_eval import check_installed, load_harness
from stages.pages.page import NBSP
from stages.params.figures import figure_of, range_of
from tests.sft.evaluate.test_lm_eval import needs_lm_eval, write_task
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run

LM_EVAL = {"tasks": ["cities"], "limit": 3, "num_fewshot": None, "apply_chat_template": False, "batch_size": 2}


def test_no_task_asks_for_nothing(tmp_path: Path) -> None:
    section = tiny_params().evaluate.lm_eval
    check_installed(section)
    assert load_harness(section, tmp_path) is None


@needs_lm_eval
def test_package_is_not_imported_where_no_task_is_named() -> None:
    code = "import stages.evaluate, stages.tools.check, sys; print(sorted({'lm_eval', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="it is about the package not being there")
def test_task_without_the_package_names_key_and_extra_before_any_model_is_loaded(tmp_path: Path) -> None:
    params = tiny_params(evaluate={"lm_eval": LM_EVAL})
    expected = r"evaluate.lm_eval.tasks: the package lm-eval is not installed; .* pip install '\.\[lm-eval\]'"
    with pytest.raises(ValueError, match=expected):
        check_installed(params.evaluate.lm_eval)
    paths = write_tiny_run(tmp_path)
    with pytest.raises(ValueError, match=expected):
        evaluate.run(params, paths)
    assert not paths.out("evaluate").exists()


def test_gate_may_name_any_metric_of_a_task_that_is_run_and_no_other_task() -> None:
    gate = ["tuned.cities.acc >= base.cities.acc - 0.02", "quantized.cities.acc_stderr < 0.5"]
    tiny_params(
        evaluate={"lm_eval": LM_EVAL, "gate": gate},
        publish={"gate": ["tuned.cities.acc >= champion.tuned.cities.acc"]},
    )
    for wrong in ("tuned.towns.acc >= 0.5", "merged.cities.acc >= 0.5", "champion.tuned.cities.acc > 0.5"):
        with pytest.raises(ValidationError, match=f"nothing is called {wrong.split(' ')[0]}"):
            tiny_params(evaluate={"lm_eval": LM_EVAL, "gate": [wrong]})
    with pytest.raises(ValidationError, match=r"can never be true: tuned.cities.acc is between 0 and 1"):
        tiny_params(evaluate={"lm_eval": LM_EVAL, "gate": ["tuned.cities.acc >= 70"]})


def test_metrics_are_labelled_by_task_and_known_by_the_beginning_of_their_name() -> None:
    assert figure_of("gsm8k.exact_match_strict_match") == ("gsm8k: exact match (strict match)", "percent", 1)
    assert figure_of("cities.acc_norm") == ("cities: accuracy by length", "percent", 1)
    assert figure_of("wikitext.word_perplexity") == ("wikitext: perplexity per word", "number", -1)
    assert figure_of("own.surprise") == ("own: surprise", "number", 0)
    assert range_of("tuned.cities.acc_norm") == (0, 1)


@needs_lm_eval
def test_tasks_are_measured_shown_and_gated(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    write_task(tmp_path)
    gate = ["tuned.cities.acc >= base.cities.acc - 1.5", "tuned.cities.nonsense >= 0.5"]
    with pytest.raises(ValidationError, match="is true for all results"):
        tiny_params(evaluate={"lm_eval": LM_EVAL, "gate": gate})
    gate[0] = "tuned.cities.acc >= base.cities.acc - 0.9"
    evaluate.run(tiny_params(evaluate={"lm_eval": LM_EVAL, "gate": gate}), paths)
    results = read_json(paths.out("evaluate", "results.json"))
    assert [name for name, figures in results["models"].items() if "cities.acc" in figures] == ["base", "tuned"]
    assert results["gate"][0]["passed"] is True
    assert results["gate"][1]["reason"] == "tuned.cities.nonsense was not measured"
    low, high = results["intervals"]["tuned"]["cities.acc"]
    assert 0 <= low <= results["models"]["tuned"]["cities.acc"] <= high <= 1
    metrics = json.loads(paths.metrics("evaluate").read_text())["tuned"]
    assert metrics["cities.acc"] == results["models"]["tuned"]["cities.acc"]
    assert metrics["cities.acc_stderr"] > 0
    assert results["lm_eval"] == {"cities": "3 rows, 0-shot"}
    page = paths.evaluation_page.read_text(encoding="utf-8").replace(NBSP, " ")
    assert "cities: accuracy" in page
    assert "Tasks of lm-eval: cities (3 rows, 0-shot)." in page
