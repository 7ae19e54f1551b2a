"""Every check of `load` warns, repairs, drops or stops as params.yaml says, and the ledger shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages import load
from stages.checkout.artifacts import read_json
from stages.params.schema import REASONS, ChecksSection
from tests.stages.data_root import ROOT, ROWS, DataRoot, turn

LONG = " ".join(f"word{number}" for number in range(60))
BROKEN = "A café".encode().decode("cp1252")
CALL = {"type": "function", "function": {"name": "wether", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]

# check -> the row (or rows, of which the last one is meant) that it finds
FOUND: dict[str, list[dict[str, Any]]] = {
    "duplicate": [turn("Twice?", "Yes."), turn("Twice?", "Yes.")],
    "in_eval": [turn("Held out?", LONG)],
    "near_duplicate": [turn("Near?", LONG + " one"), turn("Near?", LONG + " other")],
    "near_eval": [turn("Held out!", LONG)],
    "empty_answer": [turn("Nothing?", " ")],
    "truncated_answer": [turn("Broken off?", '{"a": [1,')],
    "mojibake": [turn("Coffee?", BROKEN)],
    "control_characters": [turn("Bell?", "Ding\x07.")],
    "placeholder": [turn("Write to {{name}}.", "Dear {{ name }}!")],
    "tool_schema": [{**turn("Tools?", "Yes."), "tools": [{"name": "x", "parameters": {"type": "str"}}]}],
    "tool_call": [
        {
            "messages": [
                {"role": "user", "content": "Call?"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "Rain."},
                {"role": "assistant", "content": "Rain."},
            ],
            "tools": TOOLS,
        }
    ],
    "length_outlier": [turn("Long?", LONG * 10)],
}
OFF = dict.fromkeys([*FOUND, "rare_language"], "off")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataRoot:
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    root = DataRoot(tmp_path / "checkout")
    root.write("eval.jsonl", [turn("Held out?", LONG)])
    return root


def run(root: DataRoot, rows: list[dict[str, Any]], **section: Any) -> dict[str, Any]:
    root.write("train.jsonl", [*ROWS, *rows])
    held_out = {"path": "data/eval.jsonl", "fraction": None}
    section = {"eval": held_out, "max_dropped_fraction": 0.5, **section}
    load.run(root.params(load=section), root.paths)
    return read_json(root.paths.metrics("load"))


def ledger(root: DataRoot) -> list[tuple[str, str, str]]:
    return [(entry["id"], entry["reason"], entry["action"]) for entry in root.rows("load", "ledger.jsonl")]


@pytest.mark.parametrize("check", FOUND)
def test_a_check_does_what_it_is_told(root: DataRoot, check: str) -> None:
    rows = FOUND[check]
    row_id, before = f"train.jsonl:{len(ROWS) + len(rows)}", len(ROWS) + len(rows) - 1
    figures = run(root, rows, checks={**OFF, check: "warn"})
    assert (ledger(root), figures["num_train"]) == ([(row_id, check, "warn")], before + 1)
    assert (figures["warned"], figures["dropped"]) == ({check: 1}, {})
    figures = run(root, rows, checks={**OFF, check: "drop"})
    assert (ledger(root), figures["num_train"]) == ([(row_id, check, "drop")], before)
    assert row_id not in [row["id"] for row in root.rows("load", "train.jsonl")]
    assert (figures["warned"], figures["dropped"]) == ({}, {check: 1})
    assert read_json(root.paths.out("load", "card.json"))["sources"][1]["dropped"] == {check: 1}
    with pytest.raises(ValueError, match=rf"load\.checks: {check} 1 times, first {row_id} .*instead of fail"):
        run(root, rows, checks={**OFF, check: "fail"})
    run(root, rows, checks=OFF)
    assert ledger(root) == []


def test_every_check_of_params_is_tested_above(root: DataRoot) -> None:
    assert set(root.params().load.checks.model_dump()) == {
        *(*FOUND, "rare_language", "similarity"),
        *("number", "unreadable"),  # in test_load
        "image",  # in test_vision
    }


@pytest.mark.parametrize(
    ("check", "clean"), [("mojibake", turn("Coffee?", "A café")), ("control_characters", turn("Bell?", "Ding."))]
)
def test_a_repaired_row_stays_and_is_in_the_ledger(root: DataRoot, check: str, clean: dict[str, Any]) -> None:
    figures = run(root, FOUND[check], checks={**OFF, check: "repair"})
    assert ledger(root) == [("train.jsonl:21", check, "repair")]
    assert root.rows("load", "train.jsonl")[-1] == {"id": "train.jsonl:21", **clean}
    assert figures["repaired"] == {check: 1}


def test_what_cannot_be_repaired_is_dropped(root: DataRoot) -> None:
    run(root, [turn("Lost?", "caf\ufffd")], checks={**OFF, "mojibake": "repair"})
    assert ledger(root) == [("train.jsonl:21", "mojibake", "drop")]


def test_a_rare_language_is_found(root: DataRoot) -> None:
    english = [
        turn(
            f"Number {number}: what is the weather like in the town?",
            "It is usually mild in spring, and wet in autumn.",
        )
        for number in range(200)
    ]
    german = turn(
        "Wie ist das Wetter in dieser Stadt?", "Im Frühling ist es meist recht mild, im Herbst regnet es viel."
    )
    run(root, [*english, german], checks={**OFF, "rare_language": "warn"})
    assert ledger(root) == [("train.jsonl:221", "rare_language", "warn")]


def test_copies_by_weight_are_dropped_together_and_are_no_near_duplicates(root: DataRoot) -> None:
    source = {"path": "data/train.jsonl", "weight": 3}
    checks = {**OFF, "near_duplicate": "drop"}
    figures = run(root, FOUND["near_duplicate"], sources=[source], checks=checks)
    assert ledger(root) == [("train.jsonl:22", "near_duplicate", "drop")]
    assert (figures["num_train"], figures["num_repeated"]) == (63, 42)
    assert len(root.rows("load", "train.jsonl")) == 63


def test_of_three_alike_rows_the_first_one_is_kept(root: DataRoot) -> None:
    rows = [turn("Near?", f"{LONG} {last}") for last in ("one", "two", "three")]
    run(root, rows, checks={**OFF, "near_duplicate": "drop"})
    assert [entry["detail"] for entry in root.rows("load", "ledger.jsonl")] == [
        "97% the same as train.jsonl:21", "97% the same as train.jsonl:21"
    ]  # fmt: skip


def test_held_out_rows_of_a_fraction_are_what_training_rows_are_compared_with(root: DataRoot) -> None:
    rows = [
        turn(f"Near {number}?", f"{' '.join(f'{number}x{i}' for i in range(60))}{end}")
        for number in range(20)
        for end in ("", " z")
    ]
    held_out = {"path": None, "fraction": 0.4}
    figures = run(root, rows, eval=held_out, checks={**OFF, "near_eval": "drop"}, max_dropped_fraction=0.9)
    assert figures["dropped"]["near_eval"] >= 4
    questions = {
        split: {row["messages"][0]["content"] for row in root.rows("load", f"{split}.jsonl")}
        for split in ("train", "eval")
    }
    assert questions["train"] & questions["eval"] == set()


def test_rows_kept_though_they_are_there_already_do_not_exceed_max_rows(root: DataRoot) -> None:
    source = {"path": "data/train.jsonl", "max_rows": 21}
    figures = run(root, FOUND["duplicate"], sources=[source], checks={**OFF, "duplicate": "warn"})
    assert (figures["num_train"], figures["num_omitted"]) == (21, 1)


def test_the_shipped_data_has_nothing_that_a_check_finds(root: DataRoot) -> None:
    for split in ("train", "eval"):
        (root.paths.data / f"{split}.jsonl").write_bytes((ROOT / "data" / f"shop_{split}.jsonl").read_bytes())
    load.run(root.params(load={"eval": {"path": "data/eval.jsonl", "fraction": None}}), root.paths)
    assert ledger(root) == []
    given = [json.loads(line) for line in (root.paths.data / "train.jsonl").read_text().splitlines()]
    assert [row["messages"] for row in root.rows("load", "train.jsonl")] == [row["messages"] for row in given]


def test_numbers_where_text_is_needed_are_repaired_dropped_or_stop(root: DataRoot) -> None:
    rows = [{"messages": [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": 42}]}]
    run(root, rows, checks={**OFF, "number": "repair"})
    assert root.rows("load", "train.jsonl")[-1] == {"id": "train.jsonl:21", **turn("6 x 7?", "42")}
    assert root.rows("load", "ledger.jsonl")[0]["detail"] == "message 1 has the number 42 as content"
    run(root, rows, checks={**OFF, "number": "drop"})
    assert ledger(root) == [("train.jsonl:21", "number", "drop")]
    assert "load.checks.number: repair" in root.rows("load", "ledger.jsonl")[0]["detail"]
    with pytest.raises(ValueError, match=r"load\.checks: number 1 times, first train\.jsonl:21"):
        run(root, rows, checks={**OFF, "number": "fail"})


def test_a_reason_has_a_limit_of_its_own(root: DataRoot) -> None:
    rows = [*FOUND["mojibake"], *FOUND["duplicate"]]
    limits = {"mojibake": 0.05, "duplicate": 0.05}
    run(root, rows, checks={**OFF, "mojibake": "warn", "duplicate": "drop"}, max_fractions=limits)
    words = r"1 of 24 rows \(4\.2%\) have mojibake, more than load\.max_fractions 0\.04 allows: .*train\.jsonl:21"
    with pytest.raises(ValueError, match=words):
        run(root, rows, checks={**OFF, "mojibake": "warn"}, max_fractions={"mojibake": 0.04})
    with pytest.raises(ValueError, match="have duplicate, more than"):
        run(root, rows, checks={**OFF, "duplicate": "drop"}, max_fractions={"duplicate": 0.0})
    with pytest.raises(ValueError, match="'duplicat' is not a reason in the ledger; did you mean 'duplicate'"):
        root.params(load={"max_fractions": {"duplicat": 0.1}})


def test_every_reason_that_the_code_gives_can_have_a_limit() -> None:
    code = "".join(path.read_text() for floor in ("sft", "stages") for path in sorted((ROOT / floor).rglob("*.py")))
    given = set(re.findall(r"(?:RowError|Problem|OmittedRow)\(\s*\"(\w+)\"", code))
    given |= set(re.findall(r"_parse\(\w+, \"(\w+)\"", code)) | set(ChecksSection.model_fields) | {"bad_tool_call"}
    assert len(given) > 30
    # of other stages, of the library alone, a number, a check of three reasons; empty_content stands in a variable
    elsewhere = {
        "interleave",
        "max_rows",
        "weight",
        "special_text",
        "token_lengths",
        "token_type",
        "other_kind",
        "similarity",
        "image",
    }
    assert given - elsewhere == set(REASONS) - {"empty_content"}
    assert elsewhere - {"other_kind"} <= given


def test_columns_that_nothing_is_read_from_are_named(root: DataRoot) -> None:
    root.write("train.jsonl", [{**row, "score": 1, "tools": []} for row in ROWS])
    load.run(root.params(), root.paths)
    assert read_json(root.paths.out("load", "card.json"))["sources"][0]["unused"] == ["score"]
