"""`python -m stages serve`: serve one of the models on loopback with `transformers serve`, an OpenAI-compatible API."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils.import_utils import is_serve_available

from sft.models.loading import training_device
from stages.checkout.paths import Paths
from stages.models.variants import Variant, find_variant
from stages.params.schema import Params

HOST = "127.0.0.1"
INSTALL = 'pip install "transformers[serving]"'


def run(params: Params, paths: Paths, *, model: str = "merged", port: int = 8000) -> None:
    """Serve a model until interrupted.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        model: base, tuned, merged or quantized.
        port: Port on loopback.

    Raises:
        ValueError: The model does not exist yet or is an adapter, the port is in use, or packages are missing.
    """
    if not is_serve_available():
        raise ValueError(f"the server needs packages that are not installed; type: {INSTALL}")
    variant = find_variant(paths, model)
    check_full_checkpoint(variant)
    check_port(port)
    from transformers.cli.serve import Serve  # imports a web server

    # The server lists the models of the hub's cache, and fails if that folder does not exist.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    # Requests name the model by the path that the server got: short if relative to the checkout.
    os.chdir(paths.root)
    name = model_id(variant, paths.root)
    print(f"serving {model} at http://{HOST}:{port}/v1; Ctrl-C stops. For example:\n{example(name, port)}", flush=True)
    Serve(
        name,
        host=HOST,
        port=port,
        # half precision is slow on a CPU
        dtype="float32" if training_device().type == "cpu" else "auto",
        trust_remote_code=params.model.trust_remote_code,
    )


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
    """Return the name of the model in requests: its folder, relative to the checkout if it is inside."""
    folder = variant.checkpoint.resolve()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)


def example(name: str, port: int) -> str:
    """Return a command that sends a request, to paste into another terminal."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
    return f"  curl http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
