"""A file or folder is replaced in one step: after a failure or a kill, what is at its place is complete or missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft.folders import partial_file, replacing_folder

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from sft.folders import replacing_folder
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
where, path = sys.argv[1], Path(sys.argv[2])
with replacing_folder(path) as folder:
    (folder / "a.txt").write_text("new")
    if where == "while it is written":
        kill()
    (folder / "b.txt").write_text("new")
    if where == "while the old one is deleted":
        shutil.rmtree = kill
"""


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder with two files of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.txt").write_text("old")
    (folder / "c.txt").write_text("old")
    return folder


def test_a_finished_folder_takes_the_place_of_the_earlier_one(target: Path) -> None:
    with replacing_folder(target) as folder:
        (folder / "a.txt").write_text("new")
        assert contents(target) == {"a.txt": "old", "c.txt": "old"}
    assert contents(target) == {"a.txt": "new"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_first_folder_is_made_with_its_parents_and_the_usual_permissions(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "deep" / "out") as folder:
        assert not (tmp_path / "deep" / "out").exists()
        (folder / "a.txt").write_text("new")
    (tmp_path / "usual").mkdir()
    assert contents(tmp_path / "deep" / "out") == {"a.txt": "new"}
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_run_leaves_the_earlier_folder(target: Path, error: type[BaseException]) -> None:
    (target.parent / ".out.partial").mkdir()
    with pytest.raises(error), replacing_folder(target) as folder:  # noqa: PT012
        (folder / "a.txt").write_text("new")
        raise error
    assert contents(target) == {"a.txt": "old", "c.txt": "old"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("while it is written", {"a.txt": "old", "c.txt": "old"}),
        ("while the old one is deleted", {"a.txt": "new", "b.txt": "new"}),
    ],
)
def test_a_kill_leaves_a_complete_folder_and_the_next_run_cleans_up(
    target: Path, where: str, left: dict[str, str]
) -> None:
    command = [sys.executable, "-c", KILLED, where]
    killed = subprocess.run([*command, str(target)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert contents(target) == left
    first = target.with_name("first")
    subprocess.run([*command, str(first)], cwd=ROOT, check=False)
    assert first.exists() is (where != "while it is written")
    for path in (target, first):
        with replacing_folder(path) as folder:
            (folder / "d.txt").write_text("next")
    assert sorted(path.name for path in target.parent.iterdir()) == ["first", "out"]
    assert contents(target) == contents(first) == {"d.txt": "next"}


def test_without_overwrite_only_a_missing_or_empty_folder_is_written(target: Path) -> None:
    with pytest.raises(FileExistsError, match="out is not empty"), replacing_folder(target, overwrite=False):
        pytest.fail("the block ran")
    assert contents(target) == {"a.txt": "old", "c.txt": "old"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    (target.parent / "empty").mkdir()
    for name in ("empty", "missing"):
        with replacing_folder(target.parent / name, overwrite=False) as folder:
            (folder / "a.txt").write_text("new")
        assert contents(target.parent / name) == {"a.txt": "new"}


def test_without_overwrite_files_that_came_up_meanwhile_are_kept(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"), replacing_folder(tmp_path / "out", overwrite=False):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a.txt").write_text("other")
    assert contents(tmp_path / "out") == {"a.txt": "other"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_earlier_folder_comes_back_if_the_new_one_cannot_be_renamed(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails_for_the_new_one(path: Path, to: Path) -> Path:
        if path.name == ".out.partial":
            raise PermissionError("another process has a file in it open")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(PermissionError, match="another process"), replacing_folder(target) as folder:
        (folder / "a.txt").write_text("new")
    assert contents(target) == {"a.txt": "old", "c.txt": "old"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_finished_file_takes_the_place_of_the_earlier_one(target: Path) -> None:
    with partial_file(target / "a.txt") as partial:
        partial.write_text("new")
        assert (target / "a.txt").read_text() == "old"
    assert contents(target) == {"a.txt": "new", "c.txt": "old"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_was_not_finished_leaves_the_earlier_one(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), partial_file(target / "a.txt") as partial:  # noqa: PT012
        partial.write_text("new")
        raise error
    with pytest.raises(FileNotFoundError), partial_file(target / "a.txt"):
        pass  # nothing was written
    assert contents(target) == {"a.txt": "old", "c.txt": "old"}


def test_a_link_to_a_folder_and_a_changed_working_directory_are_followed(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target.parent / "link").symlink_to(target)
    monkeypatch.chdir(target.parent)
    with replacing_folder(Path("link")) as folder:
        os.chdir("/")
        (folder / "a.txt").write_text("new")
    assert (target.parent / "link").readlink() == target
    assert contents(target) == {"a.txt": "new"}


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError), replacing_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "a file"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
