"""Mixtures of data sets, loaded as `DatasetMixtureConfig` describes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from sft.data.sources import READERS
from sft.data.text_reader import data_suffix
from sft.scripts.arguments import DatasetConfig, DatasetMixtureConfig

logger = logging.getLogger(__name__)

BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Suffix of a data file -> the builder of `datasets` that reads it."""


def get_dataset(mixture_config: DatasetMixtureConfig) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load the data sets of a mixture and join them, one after another.

    With `fraction`, the first rows of each data set are kept, as many as its share of the largest mixture in which no
    row is used twice.

    Args:
        mixture_config: Data sets, and how many rows are held out.

    Returns:
        Split `train`, and split `test` if `test_split_size` is given.

    Raises:
        ValueError: There are no data sets, their columns differ, or shares are missing or can't be formed.
    """
    configs = mixture_config.datasets
    if not configs:
        raise ValueError(
            "No datasets were loaded: datasets is empty. Name at least one data set, such as DatasetConfig(path='data')"
        )
    fractions = [config.fraction for config in configs]
    if any(fraction is not None for fraction in fractions):
        _check_fractions(configs, streaming=mixture_config.streaming)
    parts = [_load(config, streaming=mixture_config.streaming) for config in configs]
    _check_columns(configs, parts)
    if fractions[0] is not None:
        parts = _shares(parts, [float(fraction or 0) for fraction in fractions])
    joined = datasets.concatenate_datasets(parts)
    if isinstance(joined, datasets.IterableDataset):
        if mixture_config.test_split_size is not None:
            raise ValueError(
                f"test_split_size={mixture_config.test_split_size} needs all rows, and streaming=True reads them one "
                "by one: give the held-out rows as a data set of their own, or set streaming to False"
            )
        return datasets.IterableDatasetDict({"train": joined})
    logger.info("the mixture has %d rows of %d data sets", len(joined), len(parts))
    if mixture_config.test_split_size is None:
        return datasets.DatasetDict({"train": joined})
    size = mixture_config.test_split_size
    # a command line and a file give 200 rows as 200.0, which `datasets` would refuse as a share
    return joined.train_test_split(test_size=int(size) if size >= 1 and float(size).is_integer() else size)


def _load(config: DatasetConfig, *, streaming: bool) -> Any:
    path, files = config.path, config.data_files
    if Path(path).is_file():  # `datasets.load_dataset` takes a folder, but not one file
        suffix = data_suffix(Path(path))
        if suffix not in BUILDERS:
            raise ValueError(f"{path} has an unsupported format; supported are {', '.join(sorted(READERS))}")
        options = {"sep": "\t"} if suffix == ".tsv" else {}
        path, files = BUILDERS[suffix], str(Path(path).resolve())
    else:
        options = {}
    loaded = datasets.load_dataset(
        path,
        name=config.name,
        data_dir=config.data_dir,
        data_files=files,
        split=config.split,
        streaming=streaming,
        **options,
    )
    chosen = loaded if config.columns is None else loaded.select_columns(config.columns)
    if chosen.features is None:
        return chosen
    features = datasets.Features({name: _plain_text(feature) for name, feature in chosen.features.items()})
    return chosen if features == chosen.features else chosen.cast(features)


def _plain_text(feature: Any) -> Any:
    """Return a column's type with `string` for `large_string`; otherwise text of CSV and JSON files can't be joined."""
    if isinstance(feature, datasets.Value) and feature.dtype == "large_string":
        return datasets.Value("string")
    if isinstance(feature, datasets.List):
        return datasets.List(_plain_text(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {name: _plain_text(part) for name, part in feature.items()}
    return feature


def _check_fractions(configs: Sequence[DatasetConfig], *, streaming: bool) -> None:
    without = [config.path for config in configs if config.fraction is None]
    if without:
        raise ValueError(
            f"fraction must be set for either all data sets of a mixture or none; {', '.join(without)} has none"
        )
    if streaming:
        raise ValueError("fraction is not supported with streaming datasets, whose number of rows is not known")
    wrong = [config for config in configs if config.fraction is not None and config.fraction < 0]
    if wrong or not any(config.fraction for config in configs):
        raise ValueError(
            f"fractions are {[config.fraction for config in configs]}: none may be below 0, and one must be above"
        )


def _check_columns(configs: Sequence[DatasetConfig], parts: Sequence[Any]) -> None:
    """Check that all data sets have the same columns: joined, a missing one would be filled with nulls."""
    names = [sorted(part.column_names or ()) for part in parts]
    for config, columns in zip(configs, names, strict=True):
        if columns and names[0] and columns != names[0]:
            raise ValueError(
                f"the data sets of a mixture need the same columns: {configs[0].path} has {names[0]}, {config.path} "
                f"has {columns}. Rename them, or choose with columns"
            )


def _shares(parts: Sequence[Any], fractions: Sequence[float]) -> list[Any]:
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True) if weight > 0)
    return [part.select(range(round(weight * total))) for part, weight in zip(parts, weights, strict=True)]
