"""Every row that goes into the pipeline comes out, or stands in the ledger with a reason; nothing half-done is left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import load
from stages.checkout.artifacts import read_json
from tests.stages.data_root import ROWS, DataRoot, turn


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataRoot:
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    return DataRoot(tmp_path / "checkout")


def run(root: DataRoot, **section: Any) -> dict[str, Any]:
    load.run(root.params(load=section), root.paths)
    return read_json(root.paths.metrics("load"))


def test_records_keep_their_place_and_content(root: DataRoot) -> None:
    root.write("train.jsonl", ROWS)
    root.write("eval.jsonl", [turn("Held out?", "Yes.")])
    figures = run(root, eval={"path": "data/eval.jsonl", "fraction": None})
    assert root.rows("load", "train.jsonl") == [
        {"id": f"train.jsonl:{number}", **row} for number, row in enumerate(ROWS, start=1)
    ]
    assert root.rows("load", "eval.jsonl") == [{"id": "eval.jsonl:1", **turn("Held out?", "Yes.")}]
    assert root.rows("load", "ledger.jsonl") == []
    assert figures == {
        "num_rows_in": 21, "num_train": 20, "num_eval": 1, "num_repeated": 0, "num_omitted": 0,
        "num_dropped": 0, "dropped_fraction": 0.0, "dropped": {}, "repaired": {}, "warned": {},
    }  # fmt: skip
    base_model = read_json(root.paths.out("load", "base_model.json"))
    assert base_model["name_or_path"] == str(root.model)
    assert len(base_model["digest"]) == 64


def test_every_bad_row_stands_in_the_ledger_with_its_reason(root: DataRoot) -> None:
    bad = [
        turn("Empty?", " "),
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
        {"messages": None},
        ROWS[3],
        turn("Held out?", "Yes."),
        {"messages": [*turn("a", "b")["messages"], {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ud83d"}]},
    ]
    root.write("train.jsonl", ROWS + bad)
    root.write("eval.jsonl", [turn("Held out?", "Yes."), turn("Held out?", "Yes.")])
    section = {"eval": {"path": "data/eval.jsonl", "fraction": None}, "max_dropped_fraction": 0.5}
    figures = run(root, **section)
    ledger = root.rows("load", "ledger.jsonl")
    assert [(entry["id"], entry["reason"]) for entry in ledger] == [
        ("eval.jsonl:2", "duplicate"),
        ("train.jsonl:21", "empty_answer"),
        ("train.jsonl:22", "unknown_role"),
        ("train.jsonl:23", "no_answer"),
        ("train.jsonl:24", "missing_column"),
        ("train.jsonl:25", "duplicate"),
        ("train.jsonl:26", "in_eval"),
        ("train.jsonl:27", "wrong_order"),
        ("train.jsonl:28", "bad_unicode"),
    ]
    assert ledger[5] == {
        "id": "train.jsonl:25",
        "stage": "load",
        "reason": "duplicate",
        "action": "drop",
        "detail": "the same as train.jsonl:4",
    }
    assert figures["num_rows_in"] == figures["num_train"] + figures["num_eval"] + figures["num_dropped"] == 30
    assert figures["dropped"]["duplicate"] == 2
    card = read_json(root.paths.out("load", "card.json"))
    assert [source["dropped"].get("duplicate") for source in card["sources"]] == [1, 1]
    relaxed = run(root, **section, require_alternation=False)
    assert "wrong_order" not in relaxed["dropped"]


def test_lines_that_cannot_be_read_stop_the_stage_or_go_to_the_ledger(root: DataRoot) -> None:
    root.write("train.jsonl", ROWS)
    with (root.paths.data / "train.jsonl").open("ab") as file:
        file.write(b'{"messages": [\n\xff\xfe\n7\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:21:\d+: not JSON"):
        run(root)
    figures = run(root, checks={"unreadable": "drop"}, max_dropped_fraction=0.5)
    ledger = root.rows("load", "ledger.jsonl")
    assert [(entry["id"], entry["reason"], entry["action"]) for entry in ledger] == [
        (f"train.jsonl:{number}", "unreadable", "drop") for number in (21, 22, 23)
    ]
    assert "not UTF-8 (bytes ff fe" in ledger[1]["detail"]
    assert figures["num_rows_in"] == figures["num_train"] + figures["num_eval"] + 3 == 23
    with pytest.raises(ValueError, match=r"unreadable 3 times, first train\.jsonl:21"):
        run(root, checks={"unreadable": "drop"}, max_dropped_fraction=0.05)
    (root.paths.data / "train.jsonl").write_text("no\nrow\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:1:1: not JSON"):
        run(root, checks={"unreadable": "drop"}, max_dropped_fraction=0.5)


def test_rows_with_images_are_dropped_rather_than_trained_without_them(root: DataRoot) -> None:
    part = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    answer = {"role": "assistant", "content": "B"}
    bad = [
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Who?"}]}, answer]},
        {**turn("What is this?", "Nothing."), "images": ["../../secret.png"]},
    ]
    root.write("train.jsonl", [*ROWS, *bad, {**turn("And this?", "Text."), "images": []}])
    assert run(root, max_dropped_fraction=0.5)["dropped"] == {"has_media": 2}
    assert [entry["detail"] for entry in root.rows("load", "ledger.jsonl")] == [
        "message 0 has an image, and the base model (llama) reads text alone",
        "the column images holds images, and the base model (llama) reads text alone",
    ]
    with pytest.raises(ValueError, match="has_media 2 times"):
        run(root, max_dropped_fraction=0.05)


def test_too_many_dropped_rows_stop_and_say_which(root: DataRoot) -> None:
    root.write("train.jsonl", [*ROWS, *[turn(f"Empty {i}", "") for i in range(4)], ROWS[0]])
    with pytest.raises(
        ValueError,
        match=r"5 of 25 train rows \(20\.0%\).*max_dropped_fraction 0\.1 .*empty_answer 4 times, first train\.jsonl:21 "
        r".*train\.jsonl:23 .*duplicate 1 times, first train\.jsonl:25",
    ):
        run(root, max_dropped_fraction=0.1)


def test_held_out_rows_stay_the_same_when_rows_are_appended(root: DataRoot) -> None:
    root.write("train.jsonl", ROWS)
    run(root)
    before = root.rows("load", "eval.jsonl")
    assert 0 < len(before) < len(ROWS)
    root.write("train.jsonl", [*ROWS, *[turn(f"New {number}?", "Yes.") for number in range(20)]])
    run(root)
    after = root.rows("load", "eval.jsonl")
    assert after[: len(before)] == before
    assert len(after) > len(before)
    run(root, seed=1)
    assert root.rows("load", "eval.jsonl") != after


def test_sources_of_different_kinds_are_mixed(root: DataRoot) -> None:
    root.write("a.jsonl", [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}] + [
        {"conversations": [{"from": "human", "value": f"x{i}"}, {"from": "gpt", "value": "y"}]} for i in range(9)
    ])  # fmt: skip
    table = [{"instruction": f"Add {i}", "input": "1" if i else None, "output": "2"} for i in range(10)]
    pq.write_table(pa.Table.from_pylist(table), root.paths.data / "b.parquet")
    (root.paths.data / "c.csv").write_text("prompt,completion\n" + "".join(f"q{i},a\n" for i in range(10)))
    (root.paths.data / "sub").mkdir()
    (root.paths.data / "sub" / "d.json").write_text(json.dumps([{"text": f"once {i}"} for i in range(10)]))
    figures = run(root, sources=[{"path": f"data/{name}"} for name in ("a.jsonl", "b.parquet", "c.csv", "sub")])
    assert figures["num_train"] + figures["num_eval"] == 40
    rows = {row["id"]: row for split in ("train", "eval") for row in root.rows("load", f"{split}.jsonl")}
    assert rows["b.parquet:1"]["messages"][0]["content"] == "Add 0"
    assert rows["b.parquet:2"]["messages"][0]["content"] == "Add 1\n\n1"
    assert rows["c.csv:2"] == {"id": "c.csv:2", "prompt": "q0", "completion": "a"}
    assert rows["sub/d.json:1"] == {"id": "sub/d.json:1", "text": "once 0"}
    card = read_json(root.paths.out("load", "card.json"))
    assert [source["kind"] for source in card["sources"]] == ["messages", "messages", "prompt_completion", "text"]
    assert set(card["sources"][3]["sha256"]) == {"sub/d.json"}


def test_a_linked_file_is_read(root: DataRoot, tmp_path: Path) -> None:
    root.write("../elsewhere.jsonl", ROWS)
    (root.paths.data / "train.jsonl").symlink_to(root.paths.root / "elsewhere.jsonl")
    assert run(root)["num_rows_in"] == 20


def broken_line(root: DataRoot) -> None:
    (root.paths.data / "train.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"messages": [}\n')


def no_rows(root: DataRoot) -> None:
    root.write("train.jsonl", [])


def unknown_columns(root: DataRoot) -> None:
    root.write("train.jsonl", [{"title": "x", "body": "y"}])


def token_ids(root: DataRoot) -> None:
    root.write("train.jsonl", [{"input_ids": [1, 2]}])


def nothing(root: DataRoot) -> None:
    root.write("trian.jsonl", ROWS)


def one_row(root: DataRoot) -> None:
    root.write("train.jsonl", ROWS[:1])


@pytest.mark.parametrize(
    ("prepare", "section", "message"),
    [
        (broken_line, {}, r"data/train\.jsonl:2:15: not JSON"),
        (no_rows, {}, r"load\.sources\[0\]\.path: data/train\.jsonl has no rows"),
        (unknown_columns, {}, r"load\.sources\[0\]\.path: data/train\.jsonl: columns \['body', 'title'\] are none of"),
        (token_ids, {}, r"contains token ids"),
        (nothing, {}, r"load\.sources\[0\]\.path: .*data/train\.jsonl does not exist; .* contains trian\.jsonl"),
        (
            one_row,
            {"eval": {"path": "data/none.jsonl", "fraction": None}},
            r"load\.eval\.path: .*none\.jsonl does not exist",
        ),
        (one_row, {}, r"no row is left for (train|eval); load\.eval\.fraction 0\.3 of 1 rows"),
        (one_row, {"sources": [{"path": "../x.jsonl"}]}, r"'\.\./x\.jsonl' lies outside data/.*dvc import-url"),
        (one_row, {"sources": [{"path": "data/train.jsonl", "split": "test"}]}, r"\['split'\] would be ignored"),
        (one_row, {"sources": [{"path": "data/train.jsonl", "config": "x"}]}, r"\['config'\] would be ignored"),
    ],
)
def test_bad_input_is_one_message_and_leaves_everything_as_it_was(
    root: DataRoot, prepare: Callable[[DataRoot], None], section: dict[str, Any], message: str
) -> None:
    earlier = root.paths.out("load", "train.jsonl")
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier result\n")
    prepare(root)
    with pytest.raises(ValueError, match=message):
        run(root, **section)
    assert earlier.read_text() == "earlier result\n"
    assert sorted(path.name for path in root.paths.root.joinpath("outs").iterdir()) == ["load"]
    assert not root.paths.metrics("load").exists()


def test_a_base_model_that_does_not_exist_stops_before_anything_is_written(root: DataRoot) -> None:
    root.write("train.jsonl", ROWS)
    params = root.params()
    params = params.model_copy(update={"model": params.model.model_copy(update={"name_or_path": "./nowhere"})})
    with pytest.raises(ValueError, match="nowhere"):
        load.run(params, root.paths)
    assert not root.paths.root.joinpath("outs").exists()


def test_a_data_set_of_the_hub_that_cannot_be_read_names_its_key(
    root: DataRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = r"params\.yaml, load\.sources\[0\]\.path: .*'org/name'.*HF_HUB_OFFLINE is set: unset it.*set hub: false"
    with pytest.raises(ValueError, match=words):
        run(root, sources=[{"path": "org/name", "hub": True}])


def test_the_same_input_gives_the_same_bytes(root: DataRoot) -> None:
    root.write("train.jsonl", ROWS)
    contents = []
    for _ in range(2):
        run(root)
        folder = root.paths.out("load")
        contents.append({path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()})
    assert contents[0] == contents[1]
    names = {"base_model.json", "card.json", "eval.jsonl", "index.json", "ledger.jsonl", "summary.json", "train.jsonl"}
    assert set(contents[0]) == names


def held_out_ids(root: DataRoot) -> list[str]:
    return [row["id"] for row in root.rows("load", "eval.jsonl")]


def test_count_of_held_out_rows_is_shared_out_among_the_sources(root: DataRoot) -> None:
    for name, number in (("a", 60), ("b", 30), ("c", 11)):
        root.write(f"{name}.jsonl", [turn(f"{name}{i}?", "Yes.") for i in range(number)])
    sources = [{"path": f"data/{name}.jsonl"} for name in "abc"]
    figures = run(root, sources=sources, eval={"path": None, "fraction": None, "count": 10})
    assert (figures["num_eval"], figures["num_train"]) == (10, 91)
    before = held_out_ids(root)
    assert [sum(name.startswith(letter) for name in before) for letter in "abc"] == [6, 3, 1]
    root.write("a.jsonl", [turn(f"a{i}?", "Yes.") for i in range(61)])
    run(root, sources=sources, eval={"path": None, "fraction": None, "count": 10})
    assert len(set(before) - set(held_out_ids(root))) <= 1
    with pytest.raises(ValueError, match=r"load\.eval\.count 102 holds out every row: there are 102 valid ones"):
        run(root, sources=sources, eval={"path": None, "fraction": None, "count": 102})


def test_max_rows_takes_the_same_rows_again_and_says_what_it_left(root: DataRoot) -> None:
    root.write("train.jsonl", [*ROWS, ROWS[0], turn("Empty?", "")])
    root.write("eval.jsonl", [ROWS[5]])
    section: dict[str, Any] = {
        "sources": [{"path": "data/train.jsonl", "max_rows": 7}],
        "eval": {"path": "data/eval.jsonl", "fraction": None},
        "max_dropped_fraction": 0.2,
    }
    figures = run(root, **section)
    taken = root.rows("load", "train.jsonl")
    assert len(taken) == figures["num_train"] == 7
    assert (figures["num_omitted"], figures["num_dropped"]) == (12, 3)
    assert figures["dropped"] == {"duplicate": 1, "empty_answer": 1, "in_eval": 1}
    root.write("train.jsonl", [*ROWS, turn("New?", "Yes.")])
    run(root, **section)
    assert len({row["id"] for row in taken} - {row["id"] for row in root.rows("load", "train.jsonl")}) <= 1
    section["sources"][0]["max_rows"] = 500
    assert run(root, **section)["num_omitted"] == 0


def test_weight_repeats_rows_or_takes_a_part_of_them_but_never_of_those_held_out(root: DataRoot) -> None:
    for name in ("a", "b"):
        root.write(f"{name}.jsonl", [turn(f"{name}{i}?", "Yes.") for i in range(200)])
    figures = run(root, sources=[{"path": "data/a.jsonl", "weight": 2.5}, {"path": "data/b.jsonl", "weight": 0.25}])
    train = [row["id"] for row in root.rows("load", "train.jsonl")]
    assert len(set(train)) == len(train)
    num = {name: sum(row.startswith(name) for row in train) for name in ("a", "b")}
    held = {name: sum(row.startswith(name) for row in held_out_ids(root)) for name in ("a", "b")}
    assert num["a"] == pytest.approx(2.5 * (200 - held["a"]), rel=0.1)
    assert num["b"] == pytest.approx(0.25 * (200 - held["b"]), rel=0.4)
    assert len(set(held_out_ids(root))) == sum(held.values())
    assert figures["num_rows_in"] + figures["num_repeated"] == (
        figures["num_train"] + figures["num_eval"] + figures["num_omitted"]
    )
    assert {entry["reason"] for entry in root.rows("load", "ledger.jsonl")} == {"weight"}


def test_a_source_behind_a_url_is_read_and_its_version_is_in_the_card(root: DataRoot) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/chats.jsonl", content)
    try:
        run(root, sources=[{"path": "memory://bucket/chats.jsonl"}])
    finally:
        system.rm("/bucket", recursive=True)
    (card,) = read_json(root.paths.out("load", "card.json"))["sources"]
    assert card["sha256"] == {"memory:///bucket/chats.jsonl": hashlib.sha256(content).hexdigest()}
    assert card["versions"]["memory:///bucket/chats.jsonl"]["size"] == len(content)
    ids = [row["id"] for split in ("train", "eval") for row in root.rows("load", f"{split}.jsonl")]
    assert "memory:///bucket/chats.jsonl:1" in ids
    message = r"load\.sources\[0\]\.path: memory://bucket/chats\.jsonl does not exist"
    with pytest.raises(ValueError, match=message):
        run(root, sources=[{"path": "memory://bucket/chats.jsonl"}])


def test_of_a_stream_the_first_rows_are_taken(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    root.write("../hub/train.jsonl", ROWS)
    folder, read = str(root.paths.root / "hub"), datasets.load_dataset
    # a folder in the place of the hub, which tests can't reach
    monkeypatch.setattr(datasets, "load_dataset", lambda _, *args, **options: read(folder, *args, **options))
    source = {"path": "team/rows", "hub": True, "streaming": True, "max_rows": 15}
    figures = run(root, sources=[source])
    assert figures["num_rows_in"] == 15
    (card,) = read_json(root.paths.out("load", "card.json"))["sources"]
    assert (card["num_rows"], card["streaming"]) == (15, True)
    with pytest.raises(ValueError, match="streaming is for data sets of the hub"):
        run(root, sources=[{"path": "data/train.jsonl", "streaming": True}])
