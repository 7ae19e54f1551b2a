"""Arguments that training scripts have in common: which data sets are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from sft.suggest import did_you_mean


@dataclass
class ScriptArguments:
    """The data set of a script, by name. The script reads these options; the trainer does not see them.

    Each option is described in its field's `metadata["help"]`.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set as `datasets.load_dataset` takes it: an id on the hub, or a folder with data files. Not "
            "used by scripts that are given `datasets`."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, for those that have several."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split that is evaluated, where eval_strategy is not no."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read rows while training instead of loading all of them before."}
    )
    gradient_checkpointing_use_reentrant: bool = field(
        default=False,
        metadata={"help": "For scripts that pass it on as gradient_checkpointing_kwargs; SFTConfig has the option."},
    )
    ignore_bias_buffers: bool = field(
        default=False,
        metadata={"help": "For scripts that exclude boolean buffers of old models from torch's data parallelism."},
    )


@dataclass
class DatasetConfig:
    """One data set of a mixture; all but `columns` and `fraction` are arguments of `datasets.load_dataset`.

    Attributes:
        path: Id on the hub, a folder with data files, or one data file.
        name: Configuration of the data set, for those that have several.
        data_dir: Folder inside the data set.
        data_files: Files inside the data set: one, a list, or those of each split.
        split: Split, or a slice of one such as `train[:1000]`.
        columns: Columns that are kept; None = all.
        fraction: Share of the mixture; all data sets of a mixture have one, or none has. The shares are divided by
            their sum, and no row is used twice.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """A mixture of data sets, see `sft.scripts.mixtures.get_dataset`.

    Each option is described in its field's `metadata["help"]`.

    Raises:
        ValueError: A data set is not described by the keys of `DatasetConfig`.
    """

    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Data sets of the mixture: paths on a command line, or in the file of --config a list of objects "
            "with path and, where needed, name, data_dir, data_files, split, columns and fraction."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read rows while training instead of loading all of them before."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Rows that are held out as split test: below 1 a share of all rows, else their number. None = "
            "split train alone."
        },
    )

    def __post_init__(self) -> None:
        self.datasets = [_dataset_config(entry, place) for place, entry in enumerate(self.datasets)]


def _dataset_config(entry: DatasetConfig | Mapping[str, object] | str, place: int) -> DatasetConfig:
    if isinstance(entry, DatasetConfig):
        return entry
    if isinstance(entry, str):
        return DatasetConfig(entry)
    if not isinstance(entry, Mapping) or not entry.get("path"):
        raise ValueError(f"datasets[{place}] is {entry!r:.80}: give an object with at least path")
    known = [item.name for item in fields(DatasetConfig)]
    for key in entry:
        if key not in known:
            hint = did_you_mean(str(key), known, otherwise=f"known are {', '.join(known)}")
            raise ValueError(f"datasets[{place}] has the unknown key {key!r}: {hint}")
    return DatasetConfig(**entry)  # type: ignore[arg-type]
