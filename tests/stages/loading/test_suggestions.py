"""Rows with unknown names are refused with lines of params.yaml, and with these lines they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages import load
from tests.stages.data_root import DataRoot, turn


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> DataRoot:
    return DataRoot(tmp_path_factory.mktemp("suggestions") / "checkout")


def run(root: DataRoot, **section: Any) -> None:
    load.run(root.params(load=section), root.paths)


def records(root: DataRoot) -> list[dict[str, Any]]:
    rows = [row for split in ("train", "eval") for row in root.rows("load", f"{split}.jsonl")]
    return sorted(({name: row[name] for name in row if name != "id"} for row in rows), key=str)


def chat(number: int) -> list[tuple[str, str]]:
    return [("user", f"Question {number}?"), ("assistant", f"Answer {number}.")]


def under(role: str, text: str, names: dict[str, str] | None = None) -> list[dict[str, Any]]:
    names = names or {"user": "user", "assistant": "assistant"}
    return [{"messages": [{role: names[who], text: said} for who, said in chat(i)]} for i in range(20)]


CASES = {
    "text": under("role", "utterance"),
    "role": under("speaker", "content"),
    "both": under("speaker", "said: here"),
    "roles": under("role", "content", {"user": "Kunde", "assistant": "Berater"}),
    "all": [
        {"id": f"n{i}", "dialog": row["messages"]}
        for i, row in enumerate(under("who", "line", {"user": "Kunde", "assistant": "yes"}))
    ],
    "json_text": [{"messages": json.dumps(row["messages"])} for row in under("speaker", "utterance")],
    "columns": [{"topic": "x", "title": f"Question {i}?", "body": f"Answer {i}."} for i in range(20)],
    "turned": [{"reply": f"Answer {i}.", "ask": f"Question {i}?"} for i in range(20)],
    "chosen": [
        {"chosen": chat, "rejected": chat[:1]} for chat in (row["messages"] for row in under("role", "content"))
    ],
    "capitals": [{" Question": f"Question {i}?", "Answer": f"Answer {i}."} for i in range(20)],
}


@pytest.mark.parametrize("case", CASES)
def test_the_printed_lines_read_the_rows(checkout: DataRoot, case: str) -> None:
    checkout.write("train.jsonl", CASES[case])
    with pytest.raises(ValueError, match=r"write under load\.sources\[0\] in params\.yaml:\n") as error:
        run(checkout)
    text = str(error.value)
    assert "empty" not in text
    lines = text.partition("in params.yaml:\n")[2]
    assert re.fullmatch(r"(      \w+: \{.*\}\n?)+", lines)
    run(checkout, sources=[{"path": "data/train.jsonl", **YAML(typ="safe").load(lines)}])
    assert records(checkout) == sorted((turn(f"Question {i}?", f"Answer {i}.") for i in range(20)), key=str)


def test_a_held_out_file_has_lines_of_its_own(checkout: DataRoot) -> None:
    checkout.write("train.jsonl", [turn(f"q{i}", "a") for i in range(20)])
    checkout.write("eval.jsonl", under("speaker", "content"))
    with pytest.raises(
        ValueError, match=r"write under load\.eval in params\.yaml:\n    message_keys: {speaker: role}$"
    ):
        run(checkout, eval={"path": "data/eval.jsonl", "fraction": None})


def test_options_that_are_given_are_kept_in_the_lines(checkout: DataRoot) -> None:
    checkout.write("train.jsonl", [{"talk": row["messages"]} for row in under("speaker", "utterance")])
    with pytest.raises(ValueError, match=r"\n      columns: {talk: messages}\n      message_keys: {speaker: role, utt"):
        run(checkout, sources=[{"path": "data/train.jsonl", "columns": {"talk": "messages"}}])


def test_a_single_row_names_its_key_in_the_ledger(checkout: DataRoot) -> None:
    odd = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "reply": "a"}]}
    checkout.write("train.jsonl", [*(turn(f"q{i}", "a") for i in range(20)), odd])
    run(checkout, max_dropped_fraction=0.5)
    (entry,) = checkout.rows("load", "ledger.jsonl")
    assert (entry["id"], entry["reason"]) == ("train.jsonl:21", "unknown_key")
    assert entry["detail"].endswith(
        "'a' under 'reply', a key that is not known; an option of the source in params.yaml reads it: "
        "message_keys: {reply: content}"
    )


def test_reasoning_and_flags_under_other_keys(checkout: DataRoot) -> None:
    rows = [
        {
            "talk": [
                {"from": "human", "value": f"q{i}"},
                {"from": "gpt", "value": "a", "why": "Hm.", "learn": i % 2 == 0},
            ]
        }
        for i in range(20)
    ]
    checkout.write("train.jsonl", rows)
    keys = {"why": "reasoning_content", "learn": "train"}
    run(checkout, sources=[{"path": "data/train.jsonl", "columns": {"talk": "messages"}, "message_keys": keys}])
    answers = [record["messages"][1] for record in records(checkout)]
    assert {(answer["reasoning_content"], answer["train"]) for answer in answers} == {("Hm.", True), ("Hm.", False)}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"message_keys": {"speker": "role"}}, "message_keys names 'speker', a key of messages that no row has"),
        ({"message_keys": {"from": "rolle"}}, r"message_keys\.from"),
        ({"field_messages": "talk"}, r"field_messages is called otherwise here; write columns: {NAME: messages}"),
    ],
)
def test_wrong_options_are_refused(checkout: DataRoot, option: dict[str, Any], message: str) -> None:
    checkout.write("train.jsonl", under("speaker", "content"))
    with pytest.raises(ValueError, match=message):
        run(checkout, sources=[{"path": "data/train.jsonl", **option}])


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("data/trian.jsonl", "data/train.jsonl"),
        ("data/train.json", "data/train.jsonl"),
        ("data/deep/nested.jsonl", "data/nested.jsonl"),
    ],
)
def test_a_missing_file_suggests_the_nearest(
    checkout: DataRoot, asked: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout.paths.root)
    for name in ("train.jsonl", "nested.jsonl", "other.csv"):
        Path("data", name).write_text("")
    with pytest.raises(ValueError, match=rf"{asked} does not exist; did you mean '{near}'\?"):
        run(checkout, sources=[{"path": asked}])
