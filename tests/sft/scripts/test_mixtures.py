"""Mixtures of data sets from local folders and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from sft.scripts.arguments import DatasetConfig, DatasetMixtureConfig
from sft.scripts.mixtures import BUILDERS, get_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten rows a0 to a9 with a column more, and six rows b0 to b5."""
    (tmp_path / "first").mkdir()
    rows = [{"text": f"a{number}", "more": number} for number in range(10)]
    (tmp_path / "first" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "second.csv").write_text("text\n" + "".join(f"b{number}\n" for number in range(6)))
    return tmp_path


def mixture(folder: Path, *parts: dict[str, Any], **options: Any) -> Any:
    datasets = [DatasetConfig(**{**part, "path": str(folder / part["path"])}) for part in parts]
    return get_dataset(DatasetMixtureConfig(datasets, **options))


FIRST = {"path": "first", "columns": ["text"]}
SECOND = {"path": "second.csv"}


def test_folder_and_file_are_joined_in_order(folder: Path) -> None:
    joined = mixture(folder, FIRST, SECOND)
    assert isinstance(joined, DatasetDict)
    assert joined["train"]["text"][:] == [f"a{number}" for number in range(10)] + [f"b{number}" for number in range(6)]


def test_slices_and_columns_are_chosen(folder: Path) -> None:
    assert mixture(folder, {"path": "first", "split": "train[:2]", "columns": ["more"]})["train"].to_dict() == {
        "more": [0, 1]
    }


def test_shares_use_as_many_rows_as_the_smallest_allows(folder: Path) -> None:
    joined = mixture(folder, {**FIRST, "fraction": 1}, {**SECOND, "fraction": 3})["train"]
    assert joined["text"][:] == ["a0", "a1", *(f"b{number}" for number in range(6))]


def test_rows_are_held_out_by_share_or_number(folder: Path) -> None:
    for size in (0.25, 4, 4.0):
        joined = mixture(folder, FIRST, SECOND, test_split_size=size)
        assert (len(joined["train"]), len(joined["test"])) == (12, 4)


def test_streams_are_joined(folder: Path) -> None:
    joined = mixture(folder, FIRST, SECOND, streaming=True)["train"]
    assert isinstance(joined, IterableDataset)
    assert len(list(joined)) == 16


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, "No datasets were loaded"),
        ([{**FIRST, "fraction": 1}, SECOND], {}, "fraction must be set for either all data sets .*second.csv has none"),
        ([{**FIRST, "fraction": 1}], {"streaming": True}, "not supported with streaming datasets"),
        ([{**FIRST, "fraction": 0}], {}, "one must be above"),
        ([{"path": "first"}, SECOND], {}, "need the same columns: .*first has .*'more', 'text'"),
        ([FIRST], {"streaming": True, "test_split_size": 0.5}, "test_split_size=0.5 needs all rows"),
    ],
)
def test_mixtures_that_can_not_be_made_say_why(
    folder: Path, parts: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(folder, *parts, **options)


def test_file_of_another_format_is_refused(folder: Path) -> None:
    (folder / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"rows.xlsx has an unsupported format; supported are \.arrow"):
        mixture(folder, {"path": "rows.xlsx"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a", "weight": 1}, r"datasets\[0\] has the unknown key 'weight'"),
        ({"name": "a"}, "give an object with at least path"),
        (3, r"datasets\[0\] is 3"),
    ],
)
def test_entries_that_are_no_data_sets_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetMixtureConfig([entry])


@pytest.mark.parametrize("suffix", sorted(BUILDERS))
def test_every_format_of_files_is_read(tmp_path: Path, suffix: str) -> None:
    file, rows = tmp_path / f"rows{suffix}", Dataset.from_dict({"text": ["one, two", "three"]})
    match BUILDERS[suffix]:
        case "json":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "csv":
            rows.to_csv(file, index=False, sep="\t" if suffix == ".tsv" else ",")
        case "parquet":
            rows.to_parquet(file)
        case "arrow":
            rows.save_to_disk(tmp_path / "saved")
            next((tmp_path / "saved").glob("*.arrow")).rename(file)
    assert mixture(tmp_path, {"path": file.name})["train"]["text"][:] == ["one, two", "three"]
