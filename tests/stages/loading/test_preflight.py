"""`inspect_data` finds what is wrong with the data before anything runs, each with its place in params.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.loading import preflight
from stages.loading.preflight import inspect_data
from tests.stages.data_root import ROWS, DataRoot, turn


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> DataRoot:
    root = DataRoot(tmp_path_factory.mktemp("preflight") / "checkout")
    root.write("train.jsonl", ROWS)
    root.write("eval.jsonl", [turn(f"Held out {i}?", "Yes.") for i in range(40)])
    return root


def found(
    root: DataRoot, load: dict[str, Any] | None = None, tokenizer: Path | None = None, **evaluate: Any
) -> list[tuple[str, str]]:
    params = root.params({"eval": {"path": "data/eval.jsonl", "fraction": None}, **(load or {})})
    section = params.evaluate.model_copy(update={"gate": [], **evaluate})
    params = params.model_copy(update={"evaluate": section})
    return [(finding.key, finding.text) for finding in inspect_data(params, root.paths, tokenizer)]


def test_usable_data_have_no_findings(root: DataRoot) -> None:
    gate = ["tuned.exact_match >= 0.85", "tuned.loss <= 3", "quantized.exact_match >= tuned.exact_match - 0.05"]
    assert found(root, gate=gate, tokenizer=root.model / "tokenizer.json") == []


@pytest.mark.parametrize("largest", [preflight.LARGEST_READ_BYTES, 1])
def test_placeholders(root: DataRoot, monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    monkeypatch.setattr(preflight, "LARGEST_READ_BYTES", largest)
    root.write("forms.jsonl", [*ROWS[:3], turn("Greet.", "Dear {{name}}, hello."), turn("Sign.", "<your name>")])
    load = {"sources": [{"path": "data/forms.jsonl"}]}
    assert found(root, load) == [
        (
            "load.sources[0].path",
            "2 of the first 5 rows may have a place that was not filled in; forms.jsonl:4: message 1 (assistant) holds "
            "'{{name}}', a place that was not filled in",
        )
    ]
    assert found(root, {**load, "checks": {"placeholder": "off"}}) == []


def test_large_sources_with_unknown_names_have_lines_to_paste(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LARGEST_READ_BYTES", 1)
    rows = [{"messages": [{"speaker": "user", "content": "q"}, {"speaker": "gpt", "content": "a"}]}] * 5
    root.write("odd.jsonl", rows)
    with pytest.raises(ValueError, match=r"odd\.jsonl, first 5 rows: .*\n      message_keys: {speaker: role}"):
        found(root, {"sources": [{"path": "data/odd.jsonl"}]})


@pytest.mark.parametrize(
    ("held_out", "evaluate", "key"),
    [
        ({"path": None, "fraction": 0.3}, {}, "load.eval.fraction"),
        ({"path": None, "fraction": None, "count": 19}, {}, "load.eval.count"),
        ({"path": "data/eval.jsonl", "fraction": None}, {"num_rows": 10}, "evaluate.num_rows"),
    ],
)
def test_few_held_out_rows(root: DataRoot, held_out: dict[str, Any], evaluate: dict[str, Any], key: str) -> None:
    ((place, text),) = found(root, {"eval": held_out}, **evaluate)
    assert place == key
    assert "scores of fewer than 20 say little, hold out more" in text


def test_a_gate_that_the_held_out_rows_can_not_show(root: DataRoot) -> None:
    # of 40 right answers, Wilson's 95 % interval begins at 40 / (40 + 1.96²) = 0.912; 0.95 needs 73
    assert found(root, gate=["tuned.exact_match >= 0.90", "tuned.exact_match > 0.95"]) == [
        (
            "evaluate.gate",
            "'tuned.exact_match > 0.95' can't be shown with 40 held-out rows: even if all were right, the 95 % "
            "interval would begin at 0.91; hold out at least 73 rows",
        )
    ]


def test_answers_longer_than_max_new_tokens(root: DataRoot) -> None:
    from tokenizers import Tokenizer

    file = root.model / "tokenizer.json"
    longest = len(Tokenizer.from_file(str(file)).encode("Yes.", add_special_tokens=False).ids) + 1
    assert found(root, tokenizer=file, max_new_tokens=longest) == []
    assert found(root, tokenizer=file, max_new_tokens=longest - 1) == [
        (
            "evaluate.max_new_tokens",
            f"{longest - 1} tokens are less than 40 of the first 40 reference answers have; the longest has {longest}, "
            f"so state at least {longest}",
        )
    ]
