"""Rows with other names for things: read as params.yaml says, and a name that nothing has is an error."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from stages import load
from stages.checkout.artifacts import read_json
from tests.stages.data_root import DataRoot, turn


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    return DataRoot(tmp_path / "checkout")


def run(root: DataRoot, **section: Any) -> dict[str, Any]:
    load.run(root.params(load=section), root.paths)
    return read_json(root.paths.metrics("load"))


def records(root: DataRoot) -> list[dict[str, Any]]:
    rows = [row for split in ("train", "eval") for row in root.rows("load", f"{split}.jsonl")]
    return sorted(({name: row[name] for name in row if name != "id"} for row in rows), key=str)


def test_columns_are_renamed_in_sources_and_in_the_held_out_file(root: DataRoot) -> None:
    columns = {"pergunta": "question", "resposta": "answer"}
    for name, number in (("train", 3), ("eval", 1)):
        with (root.paths.data / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [["pergunta", "resposta", "answerer"], *[[f"{name}{i}?", "Sim.", "x"] for i in range(number)]]
            )
    held_out = {"path": "data/eval.csv", "fraction": None, "columns": columns}
    run(root, sources=[{"path": "data/train.csv", "columns": columns}], eval=held_out)
    assert records(root) == [turn(f"{name}?", "Sim.") for name in ("eval0", "train0", "train1", "train2")]


def test_roles_of_any_tags_are_translated(root: DataRoot) -> None:
    rows = [
        {"conversations": [{"from": "Kunde", "value": f"q{i}"}, {"from": "berater", "value": "a"}]} for i in range(20)
    ]
    root.write("train.jsonl", rows)
    run(root, sources=[{"path": "data/train.jsonl", "roles": {"kunde": "user", "Berater": "assistant"}}])
    assert records(root) == sorted((turn(f"q{i}", "a") for i in range(20)), key=str)


def test_template_makes_conversations_of_any_columns(root: DataRoot) -> None:
    root.write("train.jsonl", [{"en": f"cat {i}", "de": f"Katze {i}", "note": None} for i in range(20)])
    template = {"system": "Translate.{{ note }}", "user": "English: {{ en }}", "assistant": "{{ de | upper }}"}
    run(root, sources=[{"path": "data/train.jsonl", "template": template}])
    system = {"role": "system", "content": "Translate."}
    expected = [{"messages": [system, *turn(f"English: cat {i}", f"KATZE {i}")["messages"]]} for i in range(20)]
    assert records(root) == sorted(expected, key=str)


def test_row_that_the_template_does_not_fit_stands_in_the_ledger(root: DataRoot) -> None:
    root.write("train.jsonl", [*[{"q": f"q{i}", "a": [str(i)]} for i in range(20)], {"q": "last"}])
    template = {"user": "{{ q }}", "assistant": "{{ a[0] }}"}
    run(root, sources=[{"path": "data/train.jsonl", "template": template}], max_dropped_fraction=0.5)
    (entry,) = root.rows("load", "ledger.jsonl")
    assert (entry["id"], entry["reason"]) == ("train.jsonl:21", "template")
    assert "'a' is undefined" in entry["detail"]


def test_template_can_reach_nothing_but_the_row(root: DataRoot) -> None:
    root.write("train.jsonl", [{"q": f"q{i}"} for i in range(20)])
    template = {"user": "{{ q }}", "assistant": "{{ q.__class__.__mro__ }}"}
    with pytest.raises(ValueError, match="20 of 20 train rows"):
        run(root, sources=[{"path": "data/train.jsonl", "template": template}])


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"columns": {"mesages": "text"}},
            r"load\.sources\[0\]\.path: .*columns names 'mesages', .*did you mean 'mess",
        ),
        (
            {"roles": {"bot": "assistant"}},
            r"roles names 'bot', a role that no row has; there are \['assistant', 'user'",
        ),
        ({"template": {"user": "{{ q }}", "assistant": "x"}}, "template names 'q', a column that no row has"),
        ({"columns": {"messages": "text", "text": "text"}}, "columns 'messages' and 'text' would both be 'text'"),
        ({"template": {"user": "{{ q", "assistant": "x"}}, r"template\.user\n.*not a Jinja template: .*line 1"),
        (
            {"template": {"user": "a", "assistant": "x"}, "roles": {"bot": "user"}},
            "remove columns, roles and message_keys",
        ),
        ({"roles": {"bot": "robot"}}, r"roles\.bot"),
    ],
)
def test_mapping_that_fits_nothing_is_refused(root: DataRoot, mapping: dict[str, Any], message: str) -> None:
    root.write("train.jsonl", [{**turn("q", "a"), "text": "t"}])
    with pytest.raises(ValueError, match=message):
        run(root, sources=[{"path": "data/train.jsonl", **mapping}])


def test_mapping_of_held_out_rows_needs_a_file_of_them(root: DataRoot) -> None:
    with pytest.raises(ValueError, match="columns belong to the sources here"):
        run(root, eval={"path": None, "fraction": 0.5, "columns": {"a": "text"}})


def test_numbers_in_columns_become_text_by_the_template(root: DataRoot) -> None:
    root.write("train.jsonl", [{"a": i, "b": i * i} for i in range(20)])
    run(root, sources=[{"path": "data/train.jsonl", "template": {"user": "{{ a }}^2?", "assistant": "{{ b }}"}}])
    assert turn("7^2?", "49") in records(root)
