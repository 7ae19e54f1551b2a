"""Rows of several sources are mixed as datasets.interleave_datasets mixes them, and every row is accounted for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, interleave_datasets

from stages import load
from stages.checkout.artifacts import read_json
from stages.params.schema import Params, ParamsError, check_params
from tests.stages.data_root import DataRoot, turn

SIZES = {"a": 4, "b": 9, "c": 6}


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    root = DataRoot(tmp_path / "checkout")
    for name, size in SIZES.items():
        root.write(f"{name}.jsonl", [turn(f"Question {name}{i}?", f"Answer {i}.") for i in range(size)])
    root.write("eval.jsonl", [turn(f"Else {i}?", "No.") for i in range(3)])
    return root


def params(root: DataRoot, strategy: str, shares: list[float] | None = None, **section: Any) -> Params:
    sources: list[dict[str, Any]] = [{"path": f"data/{name}.jsonl"} for name in SIZES]
    for source, share in zip(sources, shares or (), strict=False):
        source["share"] = share
    given = {"sources": sources, "interleave": {"strategy": strategy, "seed": 3}, **section}
    return check_params(root.params({"eval": {"path": "data/eval.jsonl", "fraction": None}, **given}).model_dump())


@pytest.mark.parametrize("shares", [None, [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"])
def test_rows_and_their_order_are_those_of_datasets(root: DataRoot, strategy: Any, shares: list[float] | None) -> None:
    load.run(params(root, strategy, shares), root.paths)
    parts = [
        Dataset.from_dict({"id": [f"{name}.jsonl:{line + 1}" for line in range(size)]}) for name, size in SIZES.items()
    ]
    mixed = interleave_datasets(parts, probabilities=shares, seed=3, stopping_strategy=strategy)["id"][:]
    written = [row["id"] for row in root.rows("load", "train.jsonl")]
    assert [name.partition("*")[0] for name in written] == mixed
    assert len(set(written)) == len(written)
    times = Counter(mixed)
    everything = {name for part in parts for name in part["id"]}
    ledger = root.rows("load", "ledger.jsonl")
    assert {entry["id"] for entry in ledger if entry["action"] == "omit"} == everything - times.keys()
    assert {entry["id"] for entry in ledger if entry["action"] == "repeat"} == {
        n for n, count in times.items() if count > 1
    }
    assert {entry["reason"] for entry in ledger} <= {"interleave"}
    figures = read_json(root.paths.metrics("load"))
    assert figures["num_train"] == len(mixed)
    assert figures["num_omitted"] == len(everything - times.keys())
    assert figures["num_repeated"] == len(mixed) - len(times)


def test_dropped_rows_are_not_mixed(root: DataRoot) -> None:
    root.write("a.jsonl", [turn(f"Question a{i}?", "Yes." if i != 1 else "") for i in range(30)])
    load.run(params(root, "all_exhausted_without_replacement", max_dropped_fraction=0.1), root.paths)
    ids = [row["id"] for row in root.rows("load", "train.jsonl")]
    assert ids[:4] == ["a.jsonl:1", "b.jsonl:1", "c.jsonl:1", "a.jsonl:3"]
    assert len(ids) == 29 + SIZES["b"] + SIZES["c"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "concat", "shares": [1, 1, 1]}, r"sources\[0\].share would be ignored"),
        ({"strategy": "all_exhausted", "shares": [1]}, r"sources\[1\] has no share and others do"),
        (
            {"strategy": "all_exhausted", "sources": [{"path": "data/a.jsonl"}]},
            "mixes several sources, and there is one",
        ),
        (
            {
                "strategy": "first_exhausted",
                "sources": [{"path": "data/a.jsonl"}, {"path": "data/b.jsonl", "weight": 2}],
            },
            r"sources\[1\].weight: 2.0 and interleave.strategy: first_exhausted both say",
        ),
    ],
)
def test_values_that_contradict_a_mixture_are_refused(root: DataRoot, values: dict[str, Any], message: str) -> None:
    with pytest.raises((ParamsError, ValueError), match=message):
        params(root, **values)
