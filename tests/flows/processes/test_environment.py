"""The environment of flows and stages, and the file with the addresses and credentials of `make ui`."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flows.processes.environment import ROOT, UiLock, child_environment, prefect_home, prepare_prefect

PRINT_HOME = "import flows.{name}; from prefect.settings import PREFECT_HOME; print(PREFECT_HOME.value())"


@pytest.mark.parametrize("name", ["pipeline", "sweep", "nightly", "cleanup"])
def test_flow_uses_the_prefect_home_of_its_checkout(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    command = [sys.executable, "-c", PRINT_HOME.format(name=name)]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(prefect_home(ROOT))


def test_only_this_user_can_read_the_credentials_of_the_pages(tmp_path: Path) -> None:
    lock = UiLock(tmp_path)
    lock.path.parent.mkdir()
    lock.path.write_text("of an earlier version")
    lock.path.chmod(0o644)
    assert lock.acquire(prefect="http://127.0.0.1:1")
    assert stat.S_IMODE(lock.path.stat().st_mode) == 0o600
    assert UiLock(tmp_path).holder() == {"pid": str(os.getpid()), "prefect": "http://127.0.0.1:1"}
    lock.announce(credential="sft:secret")
    assert UiLock(tmp_path).holder() == {"pid": str(os.getpid()), "credential": "sft:secret"}


def test_the_credentials_of_the_pages_are_not_written_through_a_symlink(tmp_path: Path) -> None:
    lock = UiLock(tmp_path)
    lock.path.parent.mkdir()
    lock.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        lock.acquire(prefect="http://127.0.0.1:1")
    assert not (tmp_path / "elsewhere").exists()


def test_a_flow_in_the_terminal_uses_the_pages_with_their_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_API_AUTH_STRING"):
        # set, so that what is set below is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    lock = UiLock(tmp_path)
    assert lock.acquire(api_url="http://127.0.0.1:1/api", credential="sft:secret")
    prepare_prefect(tmp_path)
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert os.environ["PREFECT_API_AUTH_STRING"] == "sft:secret"
    assert os.environ["PREFECT_HOME"] == str(prefect_home(tmp_path))


def test_a_stage_does_not_get_the_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "sft:secret")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "sft:secret")
    assert "sft:secret" not in child_environment(SFT_FLOW_RUN_ID="1").values()
    assert child_environment(PREFECT_API_AUTH_STRING="sft:other")["PREFECT_API_AUTH_STRING"] == "sft:other"


def test_no_server_is_started_that_answers_web_pages(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    code = "from flows.pipeline import pipeline; pipeline()"
    environment |= {"PREFECT_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "No Prefect API URL provided" in done.stderr
    assert "Starting temporary server" not in done.stdout + done.stderr
