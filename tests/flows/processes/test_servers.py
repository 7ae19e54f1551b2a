"""Servers' logs: what the processes print, without secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.processes.servers import ServerFailed, Servers


def test_log_of_a_server_has_its_output_without_secrets(tmp_path: Path) -> None:
    secrets = {"SFT_SECRET_X": "correct-horse-battery", "SFT_MLFLOW_API_KEY": "0123456789abcdef0123456789"}
    servers = Servers(tmp_path, dict(os.environ))
    code = "import os; print(os.environ['SFT_SECRET_X'], os.environ['SFT_MLFLOW_API_KEY']); raise SystemExit(3)"

    servers.start("one", "python", "-c", code, **secrets)
    servers.running["one"].wait()
    with pytest.raises(ServerFailed, match="one ended with exit code 3:"):
        servers.check()

    assert servers.log("one").read_text() == "*** ***\n"
    assert servers.log("one").stat().st_mode & 0o777 == 0o600
