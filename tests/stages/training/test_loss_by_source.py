"""Where held-out rows are from several sources, the loss of each is measured in the same pass."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from ruamel.yaml import YAML

from sft.labels import IGNORE_INDEX
from stages import format as formatting
from stages import load, pack, train
from stages.checkout.artifacts import read_json
from stages.checkout.paths import EVAL_SOURCES
from stages.params.schema import load_params
from stages.tracking.store import curve_metric
from tests.stages.data_root import DataRoot, turn
from tests.stages.training_root import SHORT

pytestmark = pytest.mark.numerics


def trained(folder: Path, sources: list[dict[str, Any]], **sections: dict[str, Any]) -> DataRoot:
    """Run the stages up to `train`."""
    root = DataRoot(folder)
    root.write("short.jsonl", [turn(f"Question {i}?", f"Answer {i}.") for i in range(24)])
    root.write("long.jsonl", [turn(f"Else {i}?", f"Something else than {i}. " * 4) for i in range(16)])
    values = root.params(load={"sources": sources, "checks": {"near_duplicate": "off"}}).model_dump()
    values["train"] |= {**SHORT, "max_steps": 2, "eval_steps": 1, "samples": {**values["train"]["samples"], "count": 0}}
    values["evaluate"]["task"] = "text"
    values["evaluate"]["gate"], values["quantize"]["method"] = ["tuned.loss <= base.loss"], "none"
    values["pack"]["max_length"] = 128
    for name, section in sections.items():
        values[name] |= section
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(values, file)
    for stage in (load, formatting, pack, train):
        stage.run(load_params(folder / "params.yaml"), root.paths)
    return root


def targets_by_source(root: DataRoot) -> list[int]:
    """Trained tokens of the held-out rows of each source, without each document's first token."""
    known, counts = read_json(root.paths.out("pack", EVAL_SOURCES)), [0, 0]
    rows = load_from_disk(str(root.paths.out("pack", "eval")))
    for row, sources in zip(rows, known["rows"], strict=True):
        start = 0
        for length, source in zip(row.get("seq_lengths") or [len(row["labels"])], sources, strict=True):
            labels = row["labels"][start + 1 : start + length]
            counts[source] += sum(label != IGNORE_INDEX for label in labels)
            start += length
    return counts


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_losses_of_the_sources_are_parts_of_the_loss(tmp_path: Path, strategy: str) -> None:
    root = trained(
        tmp_path / "root", [{"path": "data/short.jsonl"}, {"path": "data/long.jsonl"}], pack={"strategy": strategy}
    )
    names = [f"eval_loss/source/{name}" for name in ("short.jsonl", "long.jsonl")]
    with root.paths.out("train", "curve.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    counts = targets_by_source(root)
    assert min(counts) > 0
    assert [name for name in rows[0] if "/" in name] == sorted(names)
    for row in rows:
        losses = [float(row[name]) for name in names]
        mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        assert mean == pytest.approx(float(row["eval_loss"]), rel=1e-5)
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    figures = read_json(root.paths.metrics("train"))
    shipped = next(row for row in rows if int(row["step"]) == figures["shipped_step"])
    assert {name: figures[name] for name in names} == {name: float(shipped[name]) for name in names}
    assert curve_metric(names[0]) == "eval/loss/source/short.jsonl"


def test_one_source_has_no_loss_of_its_own(tmp_path: Path) -> None:
    root = trained(tmp_path / "root", [{"path": "data/short.jsonl"}])
    assert not root.paths.out("pack", EVAL_SOURCES).exists()
    assert not [name for name in read_json(root.paths.metrics("train")) if "/" in name]
