"""What the tools find in their environment: no telemetry, this checkout's Prefect home, the server of `make ui`.

Prefect reads its settings when it is imported, so a flow module imports this one first.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import flows

ROOT = Path(flows.__file__).resolve().parent.parent

QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

# A busy machine with two cores needs longer than Prefect's 20 s to bring up the server of a plain shell run.
EPHEMERAL_STARTUP_TIMEOUT_S = 120


def prepare_prefect(root: Path = ROOT) -> None:
    """Set what Prefect reads at its import; whatever the user has set wins.

    A checkout has its own Prefect home: two checkouts would otherwise overwrite each other's deployment, which is
    known by its name alone. Someone who has set PREFECT_API_URL or PREFECT_HOME uses a set-up of their own.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", str(EPHEMERAL_STARTUP_TIMEOUT_S))
    if "PREFECT_API_URL" in os.environ or "PREFECT_HOME" in os.environ:
        return
    prefect_home(root).mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str(prefect_home(root))
    api_url = UiLock(root).holder().get("api_url")
    if api_url:
        os.environ["PREFECT_API_URL"] = api_url


def prefect_home(root: Path) -> Path:
    """Where the runs of this checkout are remembered."""
    return root / ".state" / "prefect"


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a stage: no telemetry, lines as they are printed, this interpreter's tools first on PATH."""
    environment = {**os.environ, **QUIET, **changes}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    # bash replaces itself by the command it is given; other shells stay in between, and signals end there.
    environment["SHELL"] = "/bin/bash"
    return environment


class UiLock:
    """The one `make ui` of a checkout: a locked file that says where its servers are.

    The kernel drops the lock when its holder ends, however that happens, so a stale file is never believed.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / ".state" / "ui.lock"
        self._file: Any = None

    def acquire(self, **facts: str) -> bool:
        """Take the lock until this process ends and write `facts` into it; False if another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.announce(**facts)
        return True

    def announce(self, **facts: str) -> None:
        """Replace what the holder says of itself."""
        self._file.truncate(0)
        json.dump({"pid": str(os.getpid()), **facts}, self._file)
        self._file.flush()

    def holder(self) -> dict[str, str]:
        """What the present holder wrote; empty when nobody holds the lock."""
        if not self.path.exists():
            return {}
        with self.path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read()
                return dict(json.loads(text)) if text else {}
        return {}
