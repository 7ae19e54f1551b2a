"""Rows that are sorted by a number keep that order from `load` to the batches of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk

from stages import format as formatting
from stages import load, pack
from stages.checkout.artifacts import read_json, read_jsonl
from stages.pack import packing_order
from stages.params.schema import Params, ParamsError, check_params
from stages.training.setup import make_sft_config, make_trainer
from tests.stages.data_root import DataRoot, turn

NUMBERS = [(7 * number) % 20 for number in range(20)]


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    root = DataRoot(tmp_path / "checkout")
    answers = [f"Answer {i}." + " and so on" * (number % 5) for i, number in enumerate(NUMBERS)]
    root.write(
        "train.jsonl",
        [{**turn(f"Question {i}?", answers[i]), "level": str(number)} for i, number in enumerate(NUMBERS)],
    )
    root.write("eval.jsonl", [turn(f"Else {i}?", "No.") for i in range(3)])
    return root


def params(
    root: DataRoot, curriculum: str | None = "level", strategy: str = "in_order", order: str = "curriculum", **load: Any
) -> Params:
    values = root.params(load={"eval": {"path": "data/eval.jsonl", "fraction": None}, **load}).model_dump()
    values["load"]["curriculum"] = curriculum
    values["pack"] |= {"strategy": strategy, "max_length": 128, "overflow": "split"}
    values["train"] |= {"order": order, "per_device_train_batch_size": 2}
    return check_params(values)


def packed_ids(root: DataRoot, params: Params) -> list[str]:
    """Run the stages before `train`; return the rows' ids as they are packed."""
    for stage in (load, formatting, pack):
        stage.run(params, root.paths)
    return [name for entry in read_jsonl(root.paths.out("pack", "train_index.jsonl")) for name in entry["ids"]]


def level(name: str) -> int:
    return NUMBERS[int(name.partition("+")[0].rpartition(":")[2]) - 1]


@pytest.mark.parametrize("strategy", ["in_order", "none", "wrapped"])
def test_rows_are_packed_by_the_number_in_their_column(root: DataRoot, strategy: str) -> None:
    ids = packed_ids(root, params(root, strategy=strategy))
    assert list(dict.fromkeys(map(level, ids))) == list(range(20))
    used = {source["purpose"]: source["unused"] for source in read_json(root.paths.out("load", "card.json"))["sources"]}
    assert used == {"train": [], "eval": []}


def test_repeated_rows_stay_together_and_a_column_may_have_another_name(root: DataRoot) -> None:
    source = {"path": "data/train.jsonl", "weight": 2, "columns": {"level": "difficulty"}}
    ids = packed_ids(root, params(root, "difficulty", sources=[source]))
    assert [level(name) for name in ids] == [number for number in range(20) for _ in range(2)]


def test_rows_are_packed_by_their_tokens(root: DataRoot) -> None:
    packed_ids(root, params(root, "length", "none"))
    lengths = [len(row) for row in load_from_disk(str(root.paths.out("pack", "train")))["input_ids"]]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 4


def test_without_a_curriculum_in_order_keeps_the_order_of_the_data(root: DataRoot) -> None:
    ids = packed_ids(root, params(root, None, order="sequential"))
    assert ids == [f"train.jsonl:{number + 1}" for number in range(20)]


def test_a_row_without_a_number_is_dropped(root: DataRoot) -> None:
    rows = [{**turn(f"Question {i}?", "Yes."), "level": i} for i in range(30)]
    rows[4]["level"] = "easy"
    rows[7]["level"] = None
    root.write("train.jsonl", rows)
    load.run(params(root, max_dropped_fraction=0.1), root.paths)
    dropped = [(entry["id"], entry["reason"], entry["detail"]) for entry in root.rows("load", "ledger.jsonl")]
    assert [entry for entry in dropped if entry[1] == "curriculum"] == [
        ("train.jsonl:5", "curriculum", "column 'level' holds str 'easy', a number is needed"),
        ("train.jsonl:8", "curriculum", "column 'level' holds null, a number is needed"),
    ]


def test_a_column_that_no_row_has_is_named(root: DataRoot) -> None:
    with pytest.raises(ValueError, match=r"load\.curriculum: no row of data/train.jsonl .*'levle'.*mean 'level'"):
        load.run(params(root, "levle"), root.paths)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"curriculum": None}, "train.order: curriculum needs load.curriculum"),
        ({"order": "shuffled"}, "load.curriculum: level would be ignored with train.order: shuffled"),
        ({"strategy": "bfd"}, "pack.strategy: bfd would sort them by their length"),
    ],
)
def test_values_that_would_undo_the_order_are_refused(root: DataRoot, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params(root, **values)


def test_the_trainer_takes_rows_in_that_order_in_every_epoch(root: DataRoot) -> None:
    given = params(root)
    packed_ids(root, given)
    rows = load_from_disk(str(root.paths.out("pack", "train")))["input_ids"]
    trainer = make_trainer(given, root.paths, make_sft_config(given.train, root.paths.root / "checkpoints"), [])
    for _ in range(2):
        batches = [batch["input_ids"].flatten().tolist() for batch in trainer.get_train_dataloader()]
        assert batches == [
            [token for row in rows[start : start + 2] for token in row] for start in range(0, len(rows), 2)
        ]


def test_rehearsed_documents_lie_at_even_distances_among_the_sorted_ones() -> None:
    keys, rehearsed = np.array([3, 1, 2, 0, 0, 0]), np.array([False, False, False, False, True, True])
    assert packing_order(keys, rehearsed).tolist() == [3, 4, 1, 2, 5, 0]
    assert packing_order(keys, np.zeros(6, dtype=bool)).tolist() == [3, 4, 5, 1, 2, 0]
