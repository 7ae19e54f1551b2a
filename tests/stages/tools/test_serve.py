"""`serve` starts a real server for a model of this checkout, and a real request gets the model's own answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sft.evaluate.generation import generate_batch
from sft.models.checkpoint import load_tokenizer
from stages.checkout.paths import Paths
from stages.models.variants import find_variant, load_variant
from stages.tools import serve
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run

SECONDS = 120


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = write_tiny_run(tmp_path_factory.mktemp("serve"))
    with paths.params.open("w", encoding="utf-8") as file:
        YAML().dump(tiny_params().model_dump(), file)
    return paths


@pytest.fixture(scope="module")
def server(paths: Paths) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.socket() as probe:
        probe.bind((serve.HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "stages", "serve", "--port", str(port), "--root", str(paths.root)]
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(paths.root / "never" / "hub")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, f"http://{serve.HOST}:{port}"
    process.kill()
    process.wait()


def wait_until_it_answers(process: subprocess.Popen[str], address: str) -> None:
    for _ in range(SECONDS * 4):
        assert process.poll() is None, process.stdout.read()
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    pytest.fail(f"no server after {SECONDS} s")


def test_a_chat_request_is_answered_by_the_model_and_an_interrupt_ends_the_server(
    paths: Paths, server: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = server
    wait_until_it_answers(process, address)
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:  # where nothing was ever downloaded
        assert response.status == 200
    messages = [{"role": "system", "content": "JSON!"}, {"role": "user", "content": "London?"}]
    body = {"model": "outs/merge/model", "messages": messages, "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        choice = json.load(response)["choices"][0]
    tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
    model = load_variant(find_variant(paths, "merged"), tiny_params().model, len(tokenizer), [])
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert choice["message"]["content"] == generate_batch(model, tokenizer, [ids], 6)[0].text
    process.send_signal(signal.SIGINT)
    log = process.communicate(timeout=30)[0]
    assert process.returncode in (0, 130)
    assert f"serving merged at {address}/v1" in log
    assert "Traceback" not in log


def test_an_adapter_and_a_taken_port_are_refused_before_anything_is_loaded(paths: Paths) -> None:
    with pytest.raises(ValueError, match="--model merged has the same logits"):
        serve.run(tiny_params(), paths, model="tuned")
    with socket.socket() as taken:
        taken.bind((serve.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} can't be used"):
            serve.run(tiny_params(), paths, port=port)
    with pytest.raises(ValueError, match="--port 99999 can't be used"):
        serve.run(tiny_params(), paths, port=99999)


def test_missing_packages_are_one_line_to_type(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.tools.serve.is_serve_available", bool)
    with pytest.raises(ValueError, match=r'pip install "transformers\[serving\]"'):
        serve.run(tiny_params(), paths)


def test_a_model_outside_the_checkout_is_named_by_its_absolute_path(paths: Paths, tmp_path: Path) -> None:
    variant = find_variant(paths, "base")
    assert serve.model_id(variant, paths.root.resolve()) == "models/base"
    assert serve.model_id(variant, tmp_path) == str(variant.checkpoint.resolve())
