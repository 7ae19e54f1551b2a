"""A model hub on loopback that takes uploads: the four kinds of request that one commit makes."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

REPO = "org/shipped"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class UploadHandler(BaseHTTPRequestHandler):
    """Takes commits to REPO, which holds one stale file before; everything else is forbidden."""

    files: ClassVar[dict[str, bytes]]
    created: ClassVar[list[dict[str, Any]]]
    messages: ClassVar[list[str]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith(f"/api/models/{REPO}"):
            return self._send({}, 404)
        if path.startswith(f"/api/models/{REPO}/tree/"):
            return self._send(
                [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            )
        return self._send({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            type(self).created.append(json.loads(body))
            name = f"{self.created[-1].get('organization')}/{self.created[-1]['name']}"
            self._send({"url": f"http://{self.headers['Host']}/{name}"}, 200 if name == REPO else 403)
        elif self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            self._send({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif self.path.startswith(f"/api/models/{REPO}/commit/main"):
            for line in body.splitlines():
                self._take(**json.loads(line))
            self._send(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"http://{self.headers['Host']}/{REPO}/commit/{COMMIT}",
                }
            )
        else:
            self._send({"valid": True})

    def log_message(self, *args: object) -> None:
        pass

    def _take(self, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            self.messages.append(value["summary"])
        elif key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "deletedFile":
            del self.files[value["path"]]

    def _send(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve_uploads() -> tuple[ThreadingHTTPServer, str]:
    """Start the hub; returns the server (to shut down) and its address."""
    UploadHandler.files, UploadHandler.created, UploadHandler.messages = {"stale.safetensors": b"old"}, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), UploadHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
