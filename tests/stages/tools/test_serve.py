"""`serve` starts a real server for a model of this checkout, and a real request gets the model's own answer."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
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
KEY = "key-of-the-tests"
EVIL = "http://evil.example"
BODY = {"model": "outs/merge/model", "messages": [{"role": "user", "content": "London?"}], "max_tokens": 1}


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
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(paths.root / "never" / "hub"), serve.KEY: KEY},
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


def ask(address: str, path: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Send a request, and return the status and the body of the answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{address}{path}", data, named)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_web_pages_and_programs_without_the_key_get_no_answer(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    wait_until_it_answers(process, address)
    key, body = f"Bearer {KEY}", json.dumps(BODY).encode()
    chat, kind = "/v1/chat/completions", "application/json"

    no_key = (
        401,
        "refused: the key is missing or wrong; send the header 'Authorization: Bearer KEY' with the key that the "
        "server printed (SFT_SERVE_API_KEY sets it)\n",
    )
    assert ask(address, chat, body, Content_Type=kind) == no_key
    assert ask(address, chat, body, Content_Type=kind, Authorization="Bearer guess") == no_key
    assert ask(address, "/v1/models") == no_key
    assert ask(address, "/load_model", body, Content_Type=kind) == no_key
    assert ask(address, "/reset", b"{}", Content_Type=kind) == no_key
    assert ask(address, "/openapi.json") == no_key
    foreign = (403, f"refused: the request comes from a page of {EVIL!r}, and not of {address}\n")
    assert ask(address, chat, body, Content_Type=kind, Authorization=key, Origin=EVIL) == foreign
    assert ask(address, "/v1/models", Authorization=key, Origin=EVIL) == foreign
    rebound = ask(address, "/v1/models", Authorization=key, Host="evil.example")
    assert rebound == (
        403,
        "refused: the request is for 'evil.example', and this server answers only for 127.0.0.1 or localhost\n",
    )
    for simple in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(address, chat, body, Content_Type=simple, Authorization=key) == (
            415,
            f"refused: the body's Content-Type is {simple!r}; send application/json\n",
        )
    preflight = urllib.request.Request(f"{address}{chat}", method="OPTIONS")
    preflight.add_header("Origin", EVIL)
    preflight.add_header("Access-Control-Request-Method", "POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(preflight, timeout=60)
    assert (refused.value.code, refused.value.headers["access-control-allow-origin"]) == (403, None)

    assert ask(address, chat, body, Content_Type=kind, Authorization=key)[0] == 200


def post(address: str, **fields: object) -> tuple[int, str]:
    body = {"messages": [{"role": "user", "content": "London?"}], "temperature": 0, **fields}
    asked = {"Content_Type": "application/json", "Authorization": f"Bearer {KEY}"}
    return ask(address, "/v1/chat/completions", json.dumps(body).encode(), **asked)


def test_the_model_has_a_short_name_and_errors_have_the_shape_of_openai(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = server
    wait_until_it_answers(process, address)
    listed = json.loads(ask(address, "/v1/models", Authorization=f"Bearer {KEY}")[1])
    assert [model["id"] for model in listed["data"]] == ["shop-extractor"]
    assert json.loads(post(address, model="merged", max_tokens=1)[1])["model"] == "shop-extractor"
    for fields, status, param, message in (
        ({"model": "gpt-5"}, 404, "model", "the model 'gpt-5' is not served; this server has 'shop-extractor'"),
        ({"messages": []}, 400, "messages", "`messages` must be a list of at least one message"),
        ({"n": 2}, 400, "n", "`n` is not supported by this server: leave it out or send 1"),
        ({"max_tokens": 0}, 400, "max_tokens", "`max_tokens` is 0; it must be an integer of at least 1"),
    ):
        found, text = post(address, **fields)
        error = json.loads(text)["error"]
        assert (found, error["param"], error["message"]) == (status, param, message)
        assert error["type"] in ("invalid_request_error", "not_found_error")


def test_an_answer_that_ends_with_a_stop_token_at_the_limit_is_not_cut_off(
    paths: Paths, server: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = server
    wait_until_it_answers(process, address)
    assert json.loads(post(address, max_tokens=1)[1])["choices"][0]["finish_reason"] == "length"
    tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
    model = load_variant(find_variant(paths, "merged"), tiny_params().model, len(tokenizer), [])
    messages = [{"role": "user", "content": "London?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    first = int(model(input_ids=ids).logits[0, -1].argmax())
    config = json.dumps({"eos_token_id": first, "max_new_tokens": 1})
    assert json.loads(post(address, generation_config=config)[1])["choices"][0]["finish_reason"] == "stop"
    events = post(address, generation_config=config, stream=True)[1].strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"


def test_the_chat_page_is_behind_the_key(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    wait_until_it_answers(process, address)
    assert ask(address, "/")[0] == 401
    status, page = ask(address, f"/{KEY}/")
    assert (status, KEY in page) == (200, False)
    assert "<title>Chat with shop-extractor</title>" in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_chat_request_is_answered_by_the_model_and_an_interrupt_ends_the_server(
    paths: Paths, server: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = server
    wait_until_it_answers(process, address)
    assert ask(address, "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200  # where nothing was ever downloaded
    messages = [{"role": "system", "content": "JSON!"}, {"role": "user", "content": "London?"}]
    body = {"model": "shop-extractor", "messages": messages, "max_tokens": 6, "temperature": 0}
    asked = {"Content_Type": "application/json", "Authorization": f"Bearer {KEY}"}
    choice = json.loads(ask(address, "/v1/chat/completions", json.dumps(body).encode(), **asked)[1])["choices"][0]
    tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
    model = load_variant(find_variant(paths, "merged"), tiny_params().model, len(tokenizer), [])
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert choice["message"]["content"] == generate_batch(model, tokenizer, [ids], 6)[0].text
    process.send_signal(signal.SIGINT)
    log = process.communicate(timeout=30)[0]
    assert process.returncode in (0, 130)
    assert f"serving merged as shop-extractor at {address}/v1" in log
    assert f"Chat page: {address}/$SFT_SERVE_API_KEY/" in log
    assert '-H "Authorization: Bearer $SFT_SERVE_API_KEY"' in log
    assert KEY not in log
    assert "Traceback" not in log


def test_a_random_key_is_shown_to_the_user(paths: Paths) -> None:
    with socket.socket() as probe:
        probe.bind((serve.HOST, 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != serve.KEY}
    command = [sys.executable, "-m", "stages", "serve", "--port", str(port), "--root", str(paths.root)]
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
    shown = None
    try:
        for line in process.stdout or ():
            if shown := re.search(r'-H "Authorization: Bearer ([\w-]{43})"', line):
                break
    finally:
        process.terminate()
        process.communicate()
    assert shown is not None


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


def test_the_key_is_random_unless_it_is_given() -> None:
    assert serve.api_key("a-key-of-my-own-1") == "a-key-of-my-own-1"
    assert len(serve.api_key(None)) == 43
    assert serve.api_key(None) != serve.api_key(None)
    with pytest.raises(
        ValueError, match=r"SFT_SERVE_API_KEY has 5 characters; a key has at least 16, all of them ASCII"
    ):
        serve.api_key("short")
    with pytest.raises(ValueError, match="none a space"):
        serve.api_key("a key with some spaces")


def test_the_example_can_be_pasted() -> None:
    command = serve.example("models/it's", 8000, "the-key")
    words = shlex.split(command)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert words[2:6] == ["-H", "Authorization: Bearer the-key", "-H", "Content-Type: application/json"]
    assert json.loads(words[7])["model"] == "models/it's"
