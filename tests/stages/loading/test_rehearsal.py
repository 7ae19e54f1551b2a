"""The base model's answers become rows, get their share of the trained tokens, and train towards what was recorded."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file

from sft.data.similarity import triples
from sft.evaluate.likelihood import evaluate_model
from sft.labels import TEACHER_ROWS
from sft.models.loading import load_model
from stages import format as format_stage
from stages import load, pack
from stages.checkout.artifacts import read_json, read_jsonl
from stages.loading.base_answers import whole_sentences
from stages.loading.rehearsal import BUILTIN_FILE
from stages.loading.rehearsed import RECORDED, SOURCE
from stages.training.teacher import with_teacher
from tests.stages.data_root import ROOT, ROWS, DataRoot

SECTION = {
    "prompts": "data/prompts.jsonl",
    "share": 0.25,
    "max_new_tokens": 12,
    "temperature": 0.0,
    "kl": 1.0,
    "top_k": 4,
    "seed": 0,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataRoot:
    """Twenty training rows and twelve prompts, answered by a tiny model whose answers stop nowhere."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    root = DataRoot(tmp_path / "checkout")
    root.write("train.jsonl", ROWS)
    root.write("prompts.jsonl", [{"prompt": f"What is {number}?"} for number in range(12)])
    # the tiny model's answers are random bytes without the end of a sentence
    monkeypatch.setattr("stages.loading.base_answers.whole_sentences", lambda text: text.strip() or "None.")
    return root


def run(root: DataRoot, **section: Any) -> None:
    load.run(root.params(load={"rehearsal": {**SECTION, **section}}), root.paths)


@pytest.mark.numerics
def test_rehearsed_rows_get_their_share_and_are_trained_towards_the_base_model(root: DataRoot) -> None:
    params = root.params(load={"rehearsal": {**SECTION, "share": 0.15}})
    for stage in (load, format_stage, pack):
        stage.run(params, root.paths)
    figures = read_json(root.paths.metrics("load"))
    assert (figures["num_train"], figures["warned"]) == (len(root.rows("load", "train.jsonl")), {"unfinished": 12})
    (card,) = [card for card in read_json(root.paths.out("load", "card.json"))["sources"] if card["purpose"] == SOURCE]
    assert (card["num_rows"], list(card["sha256"])) == (12, ["data/prompts.jsonl"])

    packed = read_json(root.paths.metrics("pack"))["train"]
    assert packed["rehearsal_trained_tokens"] / packed["trained_tokens"] == pytest.approx(0.15, abs=0.02)
    not_needed = [entry for entry in root.rows("pack", "ledger.jsonl") if entry["reason"] == "not_needed"]
    assert len(not_needed) + packed["rehearsal_documents"] == 12
    assert {entry["action"] for entry in not_needed} == {"omit"}

    folder = root.paths.out("load", SOURCE)
    rows, teacher = with_teacher(load_from_disk(str(root.paths.out("pack", "train"))), folder)
    assert teacher is not None
    assert sum(place >= 0 for row in rows[TEACHER_ROWS] for place in row) == packed["rehearsal_trained_tokens"]
    documents = [dict(row) for row in rows.remove_columns(TEACHER_ROWS)]
    places = [part for row in rows for part in _parts(row[TEACHER_ROWS], row["seq_lengths"])]
    checked = 0

    def compare(batch: Any, logits: torch.Tensor, _: torch.Tensor) -> None:
        nonlocal checked
        for document, of_document in zip(batch, logits.split([len(each.supervised) for each in batch]), strict=True):
            numbers = [places[document.index][position] for position in document.supervised]
            if numbers[0] >= 0:
                expected = of_document.softmax(-1).topk(4).values
                torch.testing.assert_close(teacher.probabilities[numbers], expected, rtol=1e-4, atol=1e-5)
                checked += 1

    evaluate_model(load_model(root.model), documents, on_logits=compare)
    assert checked == packed["rehearsal_documents"]


def _parts(values: list[int], lengths: list[int]) -> list[list[int]]:
    ends = list(itertools.accumulate(lengths))
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def test_answers_are_made_once_for_all_runs_with_the_same_prompts_and_model(
    root: DataRoot, capsys: pytest.CaptureFixture[str]
) -> None:
    run(root)
    first = root.paths.out("load", SOURCE, "rows.jsonl").read_text()
    assert "answers of the base model are there already" not in capsys.readouterr().out
    run(root, share=0.5, kl=0.5)
    assert "answers of the base model are there already" in capsys.readouterr().out
    assert root.paths.out("load", SOURCE, "rows.jsonl").read_text() == first
    run(root, temperature=1.0)
    assert root.paths.out("load", SOURCE, "rows.jsonl").read_text() != first


def test_without_a_rehearsal_nothing_is_recorded(root: DataRoot) -> None:
    load.run(root.params(), root.paths)
    assert [path.name for path in root.paths.out("load", SOURCE).iterdir()] == ["summary.json"]
    assert [row for row in root.rows("load", "train.jsonl") if row["id"].startswith("rehearsal")] == []


def test_without_recorded_tokens_the_answers_alone_are_trained(root: DataRoot) -> None:
    run(root, kl=0.0, top_k=0)
    assert not root.paths.out("load", SOURCE, RECORDED).exists()
    run(root, kl=0.0)
    assert load_file(root.paths.out("load", SOURCE, RECORDED))["tokens"].shape[1] == 4
    rows = Dataset.from_list([{"input_ids": [1, 2]}])
    assert with_teacher(rows, root.paths.out("load", SOURCE)) == (rows, None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "4"}], r"load\.rehearsal\.prompts: data/prompts\.jsonl:1 has no prompt: it needs messages"),
        ([{"messages": [{"role": "assistant", "content": "Hi"}]}], r"prompts\.jsonl:1 has no prompt"),
    ],
)
def test_a_row_without_a_prompt_is_named(root: DataRoot, rows: list[dict[str, Any]], message: str) -> None:
    root.write("prompts.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        run(root)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It rains. The sun sh", "It rains."),
        ('She said "no." Then', 'She said "no."'),
        ("1.5 is a number and", ""),
        ("First part\n\nsecond", "First part"),
    ],
)
def test_an_answer_that_was_cut_ends_after_its_last_sentence(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept


def test_builtin_prompts_are_many_and_none_is_a_held_out_one_or_looks_like_the_task() -> None:
    prompts = [row["prompt"] for row in read_jsonl(BUILTIN_FILE)]
    assert len(prompts) == len(set(prompts)) >= 250
    held_out = [json.loads(line)["question"] for line in (ROOT / "tasks/general.jsonl").read_text().splitlines()]
    near = [
        (prompt, other)
        for prompt in prompts
        for other in held_out
        if len(triples(prompt) & triples(other)) >= 0.6 * len(triples(prompt) | triples(other))
    ]
    assert near == []
    assert [prompt for prompt in prompts if "JSON" in prompt] == []
