"""A checkout made of a shipped folder alone, with data that the user gives, in which its stages can be run again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from stages.checkout.artifacts import file_digest, write_text
from stages.checkout.foreign_text import for_terminal
from stages.shipping.code_archive import ARCHIVE, unpack_archive
from stages.shipping.folder import take_file
from stages.shipping.record import FOLDER, PARAMS, Record

DVC_SETTINGS = "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"


@contextmanager
def unpacked_checkout(shipped: Path, record: Record, home: Path, keep: bool) -> Iterator[Path]:
    """Unpack the code of a shipped folder into a temporary folder for the time of the block.

    The folder has no git and an empty DVC cache, so that every stage is computed.

    Args:
        shipped: The shipped folder.
        record: Its record.
        home: Folder in which a base model is looked for that params.yaml names by a relative path.
        keep: Don't delete the temporary folder after the block.

    Yields:
        The temporary folder.

    Raises:
        ValueError: The archive can't be unpacked.
    """
    folder = Path(tempfile.mkdtemp(prefix="sft-reproduce-")).resolve()
    try:
        unpack_archive(shipped / FOLDER / ARCHIVE, folder)
        shutil.copyfile(shipped / FOLDER / PARAMS, folder / PARAMS)
        write_text(folder / ".dvc" / "config", DVC_SETTINGS)
        base = Path(record.base_model.name_or_path)
        if not base.is_absolute() and (home / base).is_dir() and not (folder / base).exists():
            (folder / base).parent.mkdir(parents=True, exist_ok=True)
            (folder / base).symlink_to((home / base).resolve())
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def place_data(files: Mapping[str, str], data: Path | None, checkout: Path) -> None:
    """Put the data of a repetition into its checkout, and check that it is the recorded data.

    Args:
        files: Path below data/ -> recorded SHA-256.
        data: Folder whose files become those of data/; None = data/ is there already.
        checkout: The checkout.

    Raises:
        ValueError: A file is missing or is another one than was recorded.
    """
    source = checkout / "data" if data is None else data
    for name, digest in files.items():
        file = source / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"the record names a file outside of data/: {for_terminal(name)}")
        if not file.is_file():
            raise ValueError(
                f"{for_terminal(str(file))} is missing: the run read it (SHA-256 {digest[:12]}); give the folder with "
                "the run's data: --data FOLDER"
            )
        if (found := file_digest(file)) != digest:
            raise ValueError(
                f"{for_terminal(str(file))} is another file than the run read: SHA-256 {found[:12]} instead of "
                f"{digest[:12]}; give the folder with the run's data: --data FOLDER"
            )
    if data is not None and data.is_dir():  # none is needed if all rows come from the hub
        shutil.copytree(data, checkout / "data", copy_function=_take, dirs_exist_ok=True)
    (checkout / "data").mkdir(parents=True, exist_ok=True)


def _take(source: str, target: str) -> str:
    """Copy or link a file in the place of another; the form that `shutil.copytree` calls."""
    Path(target).unlink(missing_ok=True)
    take_file(Path(source), Path(target))
    return target
