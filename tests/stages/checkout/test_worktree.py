"""A worktree lives as long as the process that uses it, and is removed by whoever comes next."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dvc.repo import Repo
from filelock import FileLock, Timeout

from stages.checkout.worktree import WorktreeError, abandoned, dvc_cache, living, locked_worktree, prune, use_dvc_cache

HOLD = """\
import sys
from pathlib import Path
from stages.checkout.worktree import locked_worktree
with locked_worktree(Path(sys.argv[1]), "other"):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def run(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A git and DVC project with one commit."""
    root = tmp_path / "project"
    root.mkdir()
    run(root, "git", "init", "--quiet")
    run(root, sys.executable, "-m", "dvc", "init", "--quiet")
    (root / "file").write_text("first")
    run(root, "git", "add", "--all")
    run(root, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "--message", "first")
    return root


@contextmanager
def other_process(root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that uses the worktree `other`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)],
        cwd=Path(__file__).resolve().parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def worktrees(root: Path) -> int:
    return len(run(root, "git", "worktree", "list").splitlines()) - 1


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".worktrees").iterdir())


def test_worktree_shows_the_commit_and_is_gone_after_the_block(root: Path) -> None:
    (root / "file").write_text("edited")
    with locked_worktree(root, "one") as path:
        assert (path / "file").read_text() == "first"
        assert living(root) == ["one"]
    assert worktrees(root) == 0
    assert left_over(root) == []


def test_worktree_is_removed_when_the_block_raises(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked_worktree(root, "one"):
        raise KeyboardInterrupt
    assert worktrees(root) == 0
    assert left_over(root) == []


def test_kept_worktree_stays_until_the_next_one_of_its_name(root: Path) -> None:
    with locked_worktree(root, "one", keep=True) as path:
        (path / "result").touch()
    prune(root)
    assert left_over(root) == ["one"]
    assert (path / "result").exists()
    with locked_worktree(root, "one"):
        assert not (path / "result").exists()
    assert left_over(root) == []


def test_commit_that_git_does_not_know_is_named_and_leaves_nothing(root: Path) -> None:
    with pytest.raises(WorktreeError, match=r"git worktree add .* 1234567"), locked_worktree(root, "one", "1234567"):
        pass
    assert left_over(root) == []


def test_prune_removes_what_a_killed_run_left_and_spares_the_living(root: Path) -> None:
    for name in ("dead", "loose"):
        run(root, "git", "worktree", "add", "--quiet", "--detach", f".worktrees/{name}")
    (root / ".worktrees" / "dead.lock").touch()
    with locked_worktree(root, "living") as path:
        prune(root)
        assert path.exists()
        assert not (root / ".worktrees" / "dead").exists()
        assert worktrees(root) == 2


def test_worktree_of_another_process_is_spared_until_that_process_is_killed(root: Path) -> None:
    with other_process(root) as process:
        prune(root)
        assert living(root) == ["other"]
        assert abandoned(root) == []
        assert worktrees(root) == 1
        with pytest.raises(WorktreeError, match="another process is using this worktree"):
            locked_worktree(root, "other", wait=False).__enter__()
        process.kill()
        process.wait()
        assert living(root) == []
        assert abandoned(root) == [root / ".worktrees" / "other"]
        with locked_worktree(root, "other", wait=False) as path:
            assert living(root) == ["other"]
            assert (path / "file").read_text() == "first"
    assert left_over(root) == []


def test_a_second_user_of_a_name_waits_for_the_first(root: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with locked_worktree(root, "other"):
            entered.set()

    with other_process(root) as process:
        second = threading.Thread(target=enter)
        second.start()
        assert not entered.wait(0.5)
        process.stdin.write("\n")
        process.stdin.flush()
        second.join(timeout=60)
        assert entered.is_set()
    assert left_over(root) == []


def test_lock_is_that_of_filelock(root: Path) -> None:
    lock = FileLock(root / ".worktrees" / "one.lock")
    with locked_worktree(root, "one"), pytest.raises(Timeout):
        lock.acquire(blocking=False)
    with lock:
        assert living(root) == ["one"]


def test_worktree_uses_the_dvc_cache_of_the_checkout(root: Path) -> None:
    with locked_worktree(root, "one") as path:
        assert dvc_cache(path) == path / ".dvc" / "cache"
        use_dvc_cache(path, dvc_cache(root))
        assert dvc_cache(path) == root / ".dvc" / "cache"


def test_path_of_a_dvc_cache_may_have_any_characters_and_other_settings_stay(root: Path, tmp_path: Path) -> None:
    file = root / ".dvc" / "config.local"
    file.write_text("['remote \"own\"']\n    url = /somewhere\n", encoding="utf-8")
    for name in ("Prüfung (2. Teil), #1", "it's", 'a "cache"'):
        use_dvc_cache(root, tmp_path / name)
        assert dvc_cache(root) == tmp_path / name
    with Repo(str(root)) as repo:
        assert repo.config["remote"]["own"]["url"] == "/somewhere"
