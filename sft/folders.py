"""Replacement of a file or folder in one step, so that a reader never finds one that is half written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that takes the place of `path` when the block ends without an exception.

    The file lies next to `path`, on the same file system, and is renamed to it. Until then, the file at `path` is left
    as it is. If the block raises, the temporary file is deleted. The block has to write it.

    Args:
        path: File to write, in an existing folder.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an exception.

    The folder lies next to `path`, on the same file system, and is renamed to it. Until then, the folder at `path` is
    left as it is. If the block or the renaming raises, the new folder is deleted. If the process is killed, `path` is
    either the old folder, the new one or missing, but never incomplete; the next call deletes what was left next to
    it. Two processes must not replace the same folder at the same time.

    Args:
        path: Folder to write. Missing parents are created.
        overwrite: Whether an existing folder is replaced. If False, only a missing or empty folder is accepted.

    Raises:
        FileExistsError: `overwrite` is False and the folder at `path` is not empty.
    """
    path = Path(path).resolve()  # the block may change the working directory
    if not overwrite and path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty, and nothing in it may be overwritten. Give another folder.")
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    for leftover in (partial, replaced):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.is_dir() and overwrite:
            path.rename(replaced)  # deleting it in place would leave half of it if the process were killed meanwhile
        elif path.is_dir():
            path.rmdir()
        try:
            partial.rename(path)
        except BaseException:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
