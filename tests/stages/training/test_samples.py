"""Answers during training: seeded, scored, in the curve; the trained weights do not depend on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.checkout.artifacts import read_json, read_jsonl
from stages.checkout.paths import Paths
from stages.params.schema import load_params
from stages.training.samples import samples_markdown
from tests.stages.training_root import REPO, make_training_root, train_here

DROPOUT = {"lora_dropout": 0.1}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = make_training_root(tmp_path_factory.mktemp("sampled"), **DROPOUT)
    train_here(paths)
    return paths


def test_answers_of_each_evaluation_lie_side_by_side_and_their_figures_join_the_curve(sampled: Paths) -> None:
    (row,) = read_jsonl(sampled.out("train", "samples.jsonl"))
    assert (row["id"], row["prompt"], row["reference"]) == ("a:1", "What?", "{}")
    assert [answer["step"] for answer in row["answers"]] == [0, 4, 8]
    assert set(row["answers"][0]) == {"step", "text", "stopped", "scores"}
    assert set(row["answers"][0]["scores"]) == {"exact_match", "word_f1"}
    header = sampled.out("train", "curve.csv").read_text().splitlines()[0]
    assert header.endswith(",sample_exact_match,sample_stop_rate,sample_word_f1")
    assert "sample_exact_match" in read_json(sampled.metrics("train"))
    timings = read_json(sampled.timings("train"))["samples"]
    assert timings["seconds"] > 0
    assert timings["skipped"] == 0


def test_a_page_of_answers_shows_texts_as_they_are() -> None:
    prompts = [{"id": "faq.csv:2", "reference": "At nine."}]
    answers = [{"text": "At <b>ten</b>.", "scores": {"exact_match": 0.0}}]
    assert samples_markdown(prompts, answers, 4).split("\n\n") == [
        "Answers after step 4",
        "**faq.csv:2** exact_match 0",
        "expected:",
        "```\nAt nine.\n```",
        "answered:",
        "```\nAt <b>ten</b>.\n```\n",
    ]


def test_weights_are_the_same_bits_with_and_without_answers(sampled: Paths, tmp_path: Path) -> None:
    none = {**load_params(REPO / "params.yaml").train.samples.model_dump(), "count": 0}
    paths = make_training_root(tmp_path, **DROPOUT, samples=none)
    train_here(paths)
    name = "model/adapter_model.safetensors"
    assert paths.out("train", name).read_bytes() == sampled.out("train", name).read_bytes()
    assert paths.out("train", "samples.jsonl").read_text() == ""


def test_reference_that_the_task_can_not_score_is_named(tmp_path: Path) -> None:
    task = {**load_params(REPO / "params.yaml").train.samples.model_dump(), "task": "json"}
    paths = make_training_root(tmp_path, samples=task)
    row = {"id": "a:1", "prompt": "What?", "reference": "no JSON", "add_special_tokens": False}
    paths.out("format", "prompts.jsonl").write_text(json.dumps(row))
    values = load_params(paths.root / "params.yaml").model_dump()
    values["evaluate"] |= {"task": "text", "gate": []}
    (paths.root / "params.yaml").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"train\.samples\.task is json, held-out row a:1: "):
        train_here(paths)
