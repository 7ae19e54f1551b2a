"""`sft serve`: serve one of the models on loopback with OpenAI's API, by `transformers serve`, vLLM or llama.cpp.

The server asks for an API key; without that, every page that a browser shows could use it. That of transformers also
refuses web pages, and has a chat page.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from starlette.types import ASGIApp
from transformers.utils.import_utils import is_serve_available

from sft.models.loading import training_device
from sft.untrusted.templates import chat_templates_in_child
from stages.access.guard import KeyRequired, OwnOriginOnly, new_key
from stages.checkout.paths import Paths
from stages.engines.programs import Served, check_installed, check_served, command_of, parsers_of
from stages.engines.server import running
from stages.engines.verify import find_served
from stages.models.variants import MADE_BY, Variant, find_variant
from stages.pages.page import render_page
from stages.params.schema import Params
from stages.tools.chat import Habits, training_habits
from stages.tools.freshness import warn_if_stale

HOST = "127.0.0.1"
KEY = "SFT_SERVE_API_KEY"
"""Environment variable with the API key. Every user of the machine can read a command line, so there is no option."""

MIN_KEY = 16
"""Fewest characters of a key that the user chooses."""

INSTALL = 'pip install "transformers[serving]"'


def run(
    params: Params,
    paths: Paths,
    *,
    model: str | None = None,
    port: int = 8000,
    engine: str = "transformers",
    plain: bool = False,
) -> None:
    """Serve a model until interrupted.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        model: base, tuned, merged, quantized, gguf or adapter; None = merged, or gguf of llama_cpp.
        port: Port on loopback.
        engine: transformers, vllm or llama_cpp.
        plain: Whether tool calls and reasoning stay in the text of an answer.

    Raises:
        ValueError: The model does not exist yet or is not one that the engine serves, the port is in use, the key is
            too short, or the engine or packages are missing.
    """
    if engine != "transformers":
        serve_by_engine(params, paths, engine, model or ("gguf" if engine == "llama_cpp" else "merged"), port, plain)
        return
    model = model or "merged"
    if model not in MADE_BY:
        check_served(engine, model)
    if not is_serve_available():
        raise ValueError(f"the server needs packages that are not installed; type: {INSTALL}")
    variant = find_variant(paths, model)
    warn_if_stale(params, paths, MADE_BY[model][0])
    check_full_checkpoint(variant)
    check_port(port)
    key = api_key(os.environ.get(KEY))
    from transformers.cli.serve import Serve  # imports a web server

    class Prepared(Serve):
        """Server that is ready, and not started before it is guarded."""

        def start_server(self) -> None:
            """Do nothing."""

    # The server lists the models of the hub's cache, and fails if that folder does not exist.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    # Requests may name the model by the path that the server got: short if relative to the checkout.
    os.chdir(paths.root)
    folder, name = model_id(variant, paths.root), short_name(params, model)
    habits = find_habits(params, paths)
    print(f"loading {model} ...", flush=True)
    served = Prepared(
        folder,
        host=HOST,
        port=port,
        # half precision is slow on a CPU
        dtype="float32" if training_device().type == "cpu" else "auto",
        trust_remote_code=params.model.trust_remote_code,
        non_blocking=True,
        log_level="error",
    )
    from stages.access.openai_api import Forms, adapt  # imports the web server

    context = {"name": name, "system": habits.system, "is_multi_turn": habits.is_multi_turn}
    forms = Forms(*parsers_of(variant.checkpoint), plain=plain)
    app = adapt(served, name, (folder, model), render_page("chat.html.jinja", context), forms)
    served.server.config.app = guarded(app, key)
    hide_requests(served.server.config)
    announce(model, name, port, key, habits.system, has_page=True)
    with chat_templates_in_child():
        served.server.run()


def serve_by_engine(params: Params, paths: Paths, engine: str, model: str, port: int, plain: bool) -> None:
    """Start vLLM or llama.cpp for a model, and wait until interrupted. Arguments and errors are those of `run`."""
    check_installed([engine], paths.root)
    check_served(engine, model)
    served = replace(choose_served(params, paths, engine, model), name=short_name(params, model))
    warn_if_stale(params, paths, {"adapter": "train", "gguf": "quantize"}.get(model) or MADE_BY[model][0])
    check_port(port)
    key = api_key(os.environ.get(KEY))
    print(f"starting {engine} for {served.label} ...", flush=True)
    with running(engine, command_of(engine, served, paths.root, port, parse=not plain), port, key) as server:
        announce(f"{served.label} by {engine}", served.name, port, key, find_habits(params, paths).system)
        server.wait()


def choose_served(params: Params, paths: Paths, engine: str, model: str) -> Served:
    """Return the model as the engine serves it; of several GGUF files, that of the kind that params.yaml names first.

    Raises:
        ValueError: An earlier stage has not written it.
    """
    found = {served.label: served for served in find_served(params, paths, engine, model)}
    first = next((kind for kind in params.quantize.export_gguf or () if f"gguf-{kind}" in found), None)
    return found.get(f"gguf-{first}") or next(iter(found.values()))


def announce(what: str, name: str, port: int, key: str, system: str | None, *, has_page: bool = False) -> None:
    """Print the address, the key and an example of a request."""
    print(f"serving {what} as {name} at http://{HOST}:{port}/v1; Ctrl-C stops.", flush=True)
    shown = f"${KEY}" if KEY in os.environ else key
    page = f"Chat page: http://{HOST}:{port}/{shown}/\n" if has_page else ""
    # sys.stdout replaces secrets by ***, and this one is for the user, who has no other way to get it
    print(
        f"{page}The API key is {shown}. For example:\n{example(name, port, shown, system)}",
        file=sys.__stdout__,
        flush=True,
    )


def short_name(params: Params, model: str) -> str:
    """Return the name of the model in requests: that of the registered model, with the variant if not `merged`."""
    name = params.publish.registered_model
    return name if model == "merged" else f"{name}-{model}"


def find_habits(params: Params, paths: Paths) -> Habits:
    """Return how conversations of the training rows begin; without system message if they can't be read or are text."""
    try:
        return training_habits(params, paths)
    except (ValueError, OSError):
        return Habits(None, 0, 0, True)


def hide_requests(config: Any) -> None:
    """Print warnings and errors only, and no line per request: the address of the chat page contains the key."""
    config.access_log = False
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logger = logging.getLogger("uvicorn.access")
    logger.handlers, logger.propagate = [], False


def api_key(given: str | None) -> str:
    """Return the API key: the one that the user gives, or else a random one.

    Raises:
        ValueError: The given one is too short, or contains what a header can't.
    """
    if given is None:
        return new_key()
    if len(given) < MIN_KEY or not (given.isascii() and given.isprintable()) or " " in given:
        raise ValueError(
            f"{KEY} has {len(given)} characters; a key has at least {MIN_KEY}, all of them ASCII and none a space. "
            f"Unset {KEY} for a random key"
        )
    return given


def guarded(app: ASGIApp, key: str) -> ASGIApp:
    """Put a server's application behind the API key, and refuse web pages, other hosts and bodies other than JSON."""
    way_out = f"send the header 'Authorization: Bearer KEY' with the key that the server printed ({KEY} sets it)"
    return OwnOriginOnly(KeyRequired(app, key, in_path=True, way_out=way_out), json_only=True)


def check_full_checkpoint(variant: Variant) -> None:
    """Check that a model is not an adapter, which the server can't load.

    Raises:
        ValueError: It is; the message names the model with the same logits.
    """
    if variant.adapter is not None:
        raise ValueError(
            "the tuned model is an adapter, and the server loads only full checkpoints: --model merged has the same "
            "logits, which the stage `merge` checks"
        )


def check_port(port: int) -> None:
    """Check that the port is free before the model is loaded.

    Raises:
        ValueError: Another process listens on it, or it is out of range.
    """
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"--port {port} can't be used on {HOST}: {error}; choose another") from None


def model_id(variant: Variant, root: Path) -> str:
    """Return the folder of the model, relative to the checkout if it is inside; requests may name the model by it."""
    folder = variant.checkpoint.resolve()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)


def example(name: str, port: int, key: str, system: str | None = None) -> str:
    """Return a command that sends a request, to paste into another terminal.

    Args:
        name: The model's name in requests.
        port: The server's port.
        key: The API key, or `$` with the environment variable that has it.
        system: System message of the training rows.
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = [*opening, {"role": "user", "content": "Hello!"}]
    body = json.dumps({"model": name, "messages": messages}, ensure_ascii=False)
    headers = f"-H \"Authorization: Bearer {key}\" -H 'Content-Type: application/json'"
    return f"  curl http://{HOST}:{port}/v1/chat/completions {headers} -d {shlex.quote(body)}"
