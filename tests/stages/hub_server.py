"""A model hub of one repository on loopback: just the three kinds of request that a download makes."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

REPO = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    """Answers for REPO at COMMIT and `main`; everything else does not exist."""

    folder: ClassVar[Path]
    requests_seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        type(self).requests_seen.append(f"{self.command} {self.path}")
        path, _, _ = self.path.partition("?")
        parts = path.strip("/").split("/")
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            self._send(200, json.dumps([self._entry(file) for file in sorted(self.folder.iterdir())]).encode())
        elif path.startswith("/api/models/"):
            self._answer_info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif "/".join(parts[:2]) == REPO and parts[2] == "resolve" and (self.folder / parts[4]).is_file():
            self._answer_file(self.folder / parts[4], with_body)
        else:
            self._error(404, "EntryNotFound")

    def _entry(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file.read_bytes())}

    def _answer_info(self, repo: str, revision: str) -> None:
        if repo == "org/gated":
            return self._error(403, "GatedRepo")
        if repo != REPO:
            return self._error(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound")
        files = [{"rfilename": f.name, "size": f.stat().st_size} for f in sorted(self.folder.iterdir())]
        return self._send(200, json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": files}).encode())

    def _answer_file(self, file: Path, with_body: bool) -> None:
        content = file.read_bytes()
        self._send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT}, with_body)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def serve_hub(folder: Path) -> tuple[ThreadingHTTPServer, str]:
    """Serve a folder as REPO; returns the server (to shut down) and its address."""
    HubHandler.folder = folder
    HubHandler.requests_seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
