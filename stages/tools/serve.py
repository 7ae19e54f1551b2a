"""`python -m stages serve`: one of the models behind OpenAI's API on loopback, by `transformers serve`."""

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
    """Serve until interrupted.

    Args:
        params: The pipeline's values.
        paths: The checkout.
        model: base, tuned, merged or quantized.
        port: On loopback.

    Raises:
        ValueError: The model is not there yet or is an adapter, the port is taken, or packages are missing.
    """
    if not is_serve_available():
        raise ValueError(f"the server needs packages that are not installed; type: {INSTALL}")
    variant = find_variant(paths, model)
    check_whole(variant)
    check_port(port)
    from transformers.cli.serve import Serve  # imports the web server, which nothing else needs

    # The server lists models of the hub's cache, and fails where there has never been one.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    # Requests name the model as the server does: short, where it lies in the checkout.
    os.chdir(paths.root)
    name = model_id(variant, paths.root)
    print(f"serving {model} at http://{HOST}:{port}/v1; Ctrl-C ends. For example:\n{example(name, port)}", flush=True)
    Serve(
        name,
        host=HOST,
        port=port,
        # half precision is slow on a CPU
        dtype="float32" if training_device().type == "cpu" else "auto",
        trust_remote_code=params.model.trust_remote_code,
    )


def check_whole(variant: Variant) -> None:
    """Refuse an adapter, which the server can't load.

    Raises:
        ValueError: Says which model computes the same.
    """
    if variant.adapter is not None:
        raise ValueError(
            "the tuned model is an adapter on its base, and the server loads whole checkpoints: --model merged has the "
            "same logits, as the stage merge has proved"
        )


def check_port(port: int) -> None:
    """Make sure that the port is free before the model is loaded.

    Raises:
        ValueError: Something listens there, or it is no port.
    """
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"--port {port} can't be used on {HOST}: {error}; give another") from None


def model_id(variant: Variant, root: Path) -> str:
    """What requests call the model: its folder, relative to the checkout where it lies in it."""
    folder = variant.checkpoint.resolve()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)


def example(name: str, port: int) -> str:
    """A request to paste into another terminal."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
    return f"  curl http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
