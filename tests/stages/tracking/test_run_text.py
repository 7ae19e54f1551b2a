from __future__ import annotations

import pytest

from stages.tracking.run_text import main_figures, run_name, run_note

PARAMS = {"train.learning_rate": 3e-4, "train.lora_r": 8, "evaluate.gate": ["a", "b"], "pack.max_length": 512}
RECORDED = {
    "train.learning_rate": "0.0003",
    "train.lora_r": "8",
    "evaluate.gate": '["a", "b"]',
    "pack.max_length": "512",
}
FIGURES = {"evaluate.tuned.exact_match": 0.934, "evaluate.tuned.loss": 0.1, "train.loss": 0.2}


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (None, "smol, lr 0.0003 · exact 0.93"),
        (RECORDED, "same params · exact 0.93"),
        (RECORDED | {"train.learning_rate": "0.1", "train.lora_r": "16"}, "lr 0.0003, r 8 · exact 0.93"),
        (dict.fromkeys(RECORDED, "1"), "lr 0.0003, r 8, length 512 and 1 more · exact 0.93"),
    ],
)
def test_a_name_lists_what_differs_from_the_run_before(before: dict[str, str] | None, name: str) -> None:
    assert run_name(PARAMS, before, FIGURES, "smol") == name


def test_a_run_without_answers_is_named_by_its_loss() -> None:
    assert run_name(PARAMS, RECORDED, {"evaluate.tuned.loss": 0.1}, "smol") == "same params · loss 0.100"


def test_main_figures_are_those_of_the_tuned_and_the_shipped_model() -> None:
    measured = FIGURES | {"evaluate.merged.exact_match": 0.93, "evaluate.merged.size_mb": 538.1}
    assert main_figures(measured, "exact_match", "merged") == {
        "eval/exact_match": 0.934,
        "eval/shipped_exact_match": 0.93,
        "eval/shipped_mb": 538.1,
        "eval/tuned_loss": 0.1,
    }


def test_the_note_has_the_gate_the_figures_and_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_FLOW_RUN_URL", "http://127.0.0.1:4200/runs/flow-run/1")
    note = run_note("lr 1", {"eval/loss": 0.5}, False, "#/experiments/1/report")
    assert "gate failed" in note
    assert "| eval/loss | 0.5 |" in note
    assert "- [report: figures, curves, answers, lineage](#/experiments/1/report)" in note
    assert "[run of the flow in Prefect](http://127.0.0.1:4200/runs/flow-run/1)" in note
