"""The audit of dependencies in CI: done where there is a database to ask, else skipped aloud."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server on loopback with one answer."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(request.param).encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/jinja2"
    server.shutdown()


def test_without_a_database_the_audit_is_skipped_aloud(audit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main("http://127.0.0.1:9/jinja2") == 0
    assert (
        "AUDIT SKIPPED: the database of weaknesses (http://127.0.0.1:9/jinja2) does not answer"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("database", [{"info": {}}, {"vulnerabilities": []}], indirect=True)
def test_a_database_that_knows_nothing_is_no_clean_bill(
    audit: ModuleType, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(database) == 0
    assert "no entry on a version that is known to be weak" in capsys.readouterr().out


@pytest.mark.parametrize("database", [{"vulnerabilities": [{"id": "CVE"}]}], indirect=True)
def test_where_there_is_one_the_locked_versions_are_looked_up(
    audit: ModuleType, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    assert audit.main(database) == 1
    assert commands[0][1:5] == ["-m", "pip_audit", "--requirement", str(ROOT / "requirements.lock")]
