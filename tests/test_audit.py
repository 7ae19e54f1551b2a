"""The audit of dependencies in CI: run if there is a database to query, else skipped with a message."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.ci_scripts import script

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def audit() -> ModuleType:
    return script("audit")


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


def test_without_a_database_the_audit_is_skipped_with_a_message(
    audit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main("http://127.0.0.1:9/jinja2") == 0
    assert (
        "AUDIT SKIPPED: the vulnerability database (http://127.0.0.1:9/jinja2) is not usable: "
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("database", [{"info": {}}, {"vulnerabilities": []}], indirect=True)
def test_an_empty_answer_of_the_database_skips_the_audit(
    audit: ModuleType, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(database) == 0
    assert "it lists no vulnerability for a version known to have some" in capsys.readouterr().out


@pytest.mark.parametrize("database", [{"vulnerabilities": [{"id": "CVE"}]}], indirect=True)
def test_with_a_database_the_locked_versions_are_audited(
    audit: ModuleType, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    assert audit.main(database) == 1
    assert commands[0][1:5] == ["-m", "pip_audit", "--requirement", str(ROOT / "requirements.lock")]
