"""Address of a store: found out within seconds, not after minutes of retries; locked across processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.tools.check import check_tracking
from stages.tracking.address import ANSWER_S, answered_in_time, has_ended, is_remote, locked_store, this_process
from stages.tracking.store import open_tracking
from tests.stages.tiny_run import REPO, tiny_params

HOLD = """
import sys, time
from stages.tracking.address import locked_store
with locked_store(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers; its address."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def section(uri: str) -> object:
    return tiny_params(publish={"tracking_uri": uri}).publish


def test_store_that_refuses_connections_is_found_by_check_and_by_publish(tmp_path: Path) -> None:
    for look in (check_tracking, open_tracking):
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"publish\.tracking_uri 'http://127\.0\.0\.1:9': the store can't be used"):
            look(section("http://127.0.0.1:9"), tmp_path)
        assert time.monotonic() - started < 30


@pytest.mark.slow
def test_store_that_never_answers_is_found_within_the_limit(tmp_path: Path, silent_server: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"publish\.tracking_uri"):
        check_tracking(section(silent_server), tmp_path)
    assert time.monotonic() - started < 30
    assert ANSWER_S < 30


def test_question_that_takes_too_long_ends_with_the_address_and_the_way_out() -> None:
    asked = threading.Event()
    with pytest.raises(ValueError, match=r"'postgresql://\*\*\*@db/x': the store did not answer within 0 s\. Start"):
        answered_in_time("postgresql://me:secret@db/x", asked.wait, seconds=0.1)
    asked.set()
    assert answered_in_time("x", lambda: 3, seconds=None) == 3


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:////proc/nowhere/mlflow.db", "/proc/nowhere/mlflow.db can't be written: "),
        ("sqlite:///notes.txt", "notes.txt is not a SQLite database"),
        ("sqlite:///folder", "folder is not a file"),
        ("sqlite:///notes.txt/mlflow.db", "mlflow.db can't be created, as .*notes.txt is not a folder"),
        ("htp://server", "the store can't be used: .*htp"),
    ],
)
def test_address_that_can_not_be_a_store_is_found_by_check(tmp_path: Path, uri: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, and not a database")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        check_tracking(section(uri), tmp_path)


def test_check_creates_nothing(tmp_path: Path) -> None:
    check_tracking(section("sqlite:///new/mlflow.db"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_addresses_in_a_network_can_be_unreachable() -> None:
    uris = ("sqlite:////x/mlflow.db", "file:///x", "mlruns", "http://x", "postgresql+psycopg2://x/y", "databricks")
    assert [is_remote(uri) for uri in uris] == [False, False, False, True, True, False]


def test_lock_keeps_other_processes_out_until_its_process_ends_however_it_ends(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with locked_store(uri), locked_store(uri):  # a second time in the same process
        pass
    holder = subprocess.Popen([sys.executable, "-c", HOLD, uri], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    entered = threading.Event()

    def enter() -> None:
        with locked_store(uri):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.5)
    holder.kill()
    holder.wait()
    waiting.join(60)
    assert entered.is_set()


def test_process_is_known_to_have_ended_only_on_this_host_and_by_its_start_too() -> None:
    here = this_process()
    host, number, start = here.rsplit(" ", 2)
    assert not has_ended(here)
    assert has_ended(f"{host} {number} {int(start) - 100}")  # another process had the number before
    assert not has_ended(f"elsewhere {number} {int(start) - 100}")
    assert not has_ended("")
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert has_ended(f"{host} {child.pid} {start}")
    assert os.getpid() == int(number)
