"""Environment variables of flows and stages: no telemetry, this checkout's Prefect home, the server of `make ui`.

Prefect reads its settings when it is imported, so a flow module calls `prepare_prefect` before that.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from stages.checkout.code import CODE

ROOT = Path.cwd().resolve() if Path("prefect.yaml").is_file() and Path("params.yaml").is_file() else CODE
"""The project in which this process was started, else the checkout with this code."""

QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

CREDENTIALS = ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")


def prepare_prefect(root: Path = ROOT) -> None:
    """Set the environment variables that Prefect reads at import, except those that the user has set.

    Every checkout has a separate Prefect home: deployments are identified by name only, so that two checkouts would
    overwrite each other's. If the user has set PREFECT_API_URL or PREFECT_HOME, both are left as they are.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Prefect would start a server that answers every web page
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
    if "PREFECT_API_URL" in os.environ or "PREFECT_HOME" in os.environ:
        return
    prefect_home(root).mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str(prefect_home(root))
    pages = UiLock(root).holder()
    if pages.get("api_url"):
        os.environ["PREFECT_API_URL"] = pages["api_url"]
        os.environ["PREFECT_API_AUTH_STRING"] = pages.get("credential", "")


def prefect_home(root: Path) -> Path:
    """Return the Prefect home of a checkout, with the database of its flow runs."""
    return root / ".state" / "prefect"


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment of a child: no telemetry, unbuffered output, this interpreter's tools first on PATH.

    The credentials of Prefect's server are left out unless they are among the changes: a stage does not need them.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in CREDENTIALS}
    environment = {**inherited, **QUIET, **changes}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    # bash replaces itself with the command; other shells remain as a parent that does not pass signals on
    environment["SHELL"] = "/bin/bash"
    return environment


def open_private(path: Path, flags: int) -> IO[bytes]:
    """Open a file that only this user can read, and create it and its folder if necessary; never through a symlink."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "r+b" if flags & os.O_RDWR else "wb", buffering=0)


class UiLock:
    """Lock file of the `make ui` process of a checkout, with the addresses and credentials of its servers.

    Only this user can read it. The kernel releases the lock when the process ends, however it ends, so that a stale
    file is never used.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / ".state" / "ui.lock"
        self._file: Any = None

    def acquire(self, **facts: str) -> bool:
        """Lock the file until this process ends and write `facts` into it; return False if it is locked already."""
        self._file = open_private(self.path, os.O_RDWR)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.announce(**facts)
        return True

    def announce(self, **facts: str) -> None:
        """Replace the facts in the file."""
        text = json.dumps({"pid": str(os.getpid()), **facts}).encode()
        os.ftruncate(self._file.fileno(), 0)
        os.pwrite(self._file.fileno(), text, 0)

    def holder(self) -> dict[str, str]:
        """Return what the process that has locked the file wrote into it; empty if it is not locked."""
        if not self.path.exists():
            return {}
        with self.path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read()
                return dict(json.loads(text)) if text else {}
        return {}
