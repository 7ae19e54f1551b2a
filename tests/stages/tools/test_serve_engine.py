"""`serve --engine` starts the engine on loopback with key, short name and parsers, and passes requests through.

vLLM's environment is replaced by a program that records its command line and answers, as an engine would.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from stages.checkout.paths import Paths
from stages.engines.server import free_port
from stages.params.schema import Params
from stages.tools import serve
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run

KEY = "key-of-the-tests"
ENGINE = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if known or self.path == "/health" else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"pid": os.getpid(), "words": sys.argv[1:]}).encode())

port = int(sys.argv[sys.argv.index("--port") + 1])
if "--model" in sys.argv and "broken" in os.environ.get("ENGINE_IS", ""):
    sys.exit("ValueError: this model has no kernel here")
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A run whose template prints Hermes' calls and reasoning, and a folder of engines with a stand-in for vLLM."""
    paths = write_tiny_run(tmp_path / "run")
    template = paths.out("merge", "model", "chat_template.jinja")
    template.write_text(template.read_text() + "{# <tool_call> <think> enable_thinking #}")
    with paths.params.open("w", encoding="utf-8") as file:
        YAML().dump(tiny_params().model_dump(), file)
    python = tmp_path / "engines" / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "engine.py").write_text(ENGINE)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "engine.py"}" "$@"\n')
    python.chmod(0o755)
    (python.parents[1] / ".ready").touch()
    monkeypatch.setenv("SFT_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv(serve.KEY, KEY)
    return paths


def start(paths: Paths, port: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages", "serve", "--root", str(paths.root), "--port", str(port), *options]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_an_engine_is_started_guarded_named_and_ended(paths: Paths) -> None:
    port = free_port()
    process = start(paths, port, "--engine", "vllm")
    assert process.stdout is not None
    try:
        printed = []
        for line in process.stdout:
            printed.append(line.rstrip("\n"))
            if "curl" in line:
                break
        assert "starting vllm for merged ..." in printed
        assert f"serving merged by vllm as shop-extractor at http://127.0.0.1:{port}/v1; Ctrl-C stops." in printed
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models")
        request.add_header("Authorization", f"Bearer {KEY}")
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        words = answer["words"]
        options = dict(itertools.pairwise(words))
        assert options["--model"] == str(paths.out("merge", "model"))
        assert (options["--host"], options["--port"]) == ("127.0.0.1", str(port))
        assert options["--served-model-name"] == "shop-extractor"
        assert (options["--tool-call-parser"], options["--reasoning-parser"]) == ("hermes", "qwen3")
        assert "--enable-auto-tool-choice" in words
        assert KEY not in " ".join(words)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == 130, rest
        assert "Traceback" not in rest
        assert not psutil.pid_exists(answer["pid"])
    finally:
        process.kill()
        process.communicate()


def test_plain_answers_need_no_parsers_and_an_engine_that_ends_shows_its_last_lines(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_IS", "broken")
    process = start(paths, free_port(), "--engine", "vllm", "--plain")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert printed.splitlines()[-2:] == [
        "error: the engine vllm ended; its last lines:",
        "  ValueError: this model has no kernel here",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "llama_cpp"}, r"the engine llama_cpp is not installed, .*: `make engines` installs"),
        ({"engine": "vllm", "model": "gguf"}, "--model gguf: vllm serves merged or quantized or adapter"),
        ({"model": "gguf"}, "--model gguf: transformers serves merged or quantized"),
        ({"engine": "vllm", "model": "quantized"}, "there is no quantized model yet|contains no model"),
    ],
)
def test_what_an_engine_can_not_do_is_one_message(paths: Paths, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve.run(tiny_params(), paths, **options)


def test_a_missing_engine_is_named_before_anything_else(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_ENGINES", str(paths.root / "none"))
    for engine in ("vllm", "llama_cpp"):
        with pytest.raises(ValueError, match=rf"the engine {engine} is not installed, .*: `make engines` installs"):
            serve.run(tiny_params(), paths, engine=engine)


def test_of_several_gguf_files_the_kind_named_first_is_served(paths: Paths) -> None:
    folder = paths.out("quantize", "gguf")
    folder.mkdir(parents=True)
    for kind in ("f16", "q8_0"):
        (folder / f"model-{kind}.gguf").touch()

    def chosen(kinds: list[str] | None) -> str:
        params: Params = tiny_params(quantize={"export_gguf": kinds})
        return serve.choose_served(params, paths, "llama_cpp", "gguf").label

    assert [chosen(["q8_0", "f16"]), chosen(["f16", "q8_0"]), chosen(None)] == ["gguf-q8_0", "gguf-f16", "gguf-f16"]
