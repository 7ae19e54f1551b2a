"""Asking an engine the held-out prompts: the models that it serves, and its answers compared with recorded ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from sft.chat.checks import TerminatorCheck
from stages.checkout.paths import Paths
from stages.engines.client import ask_all
from stages.engines.comparison import EngineResult, compare
from stages.engines.programs import Served, command_of
from stages.engines.prompts import Prompt
from stages.engines.server import free_port, running
from stages.evaluation.rows import EvalRows
from stages.models.variants import find_variant
from stages.params.engines import GGUFKind
from stages.params.schema import Params

ANSWERED_BY = {"merged": "tuned", "adapter": "tuned", "gguf": "tuned", "quantized": "quantized"}
"""Model that an engine serves -> the model whose answers `evaluate` recorded for the same weights, before rounding."""

ROUND_UP = 64


def find_served(params: Params, paths: Paths, engine: str, model: str | None) -> Iterator[Served]:
    """Yield the models to serve: one, or all GGUF files.

    Args:
        params: Values of params.yaml.
        paths: The checkout.
        engine: The engine.
        model: merged, quantized, adapter, gguf for all GGUF files, or the kind of one; None = the shipped one.

    Raises:
        ValueError: An earlier stage has not written the model.
    """
    if model is None:
        model = shipped(params, engine)
    name, trust = params.publish.registered_model, params.model.trust_remote_code
    if model == "gguf" or model in get_args(GGUFKind):
        folder, pattern = paths.out("quantize", "gguf"), f"model-{'*' if model == 'gguf' else model}.gguf"
        files = sorted(folder.glob(pattern))
        if not files:
            raise ValueError(
                f"{folder / pattern}: no such GGUF file; name its kind in quantize.export_gguf, such as [q8_0], and "
                "type `sft quantize`"
            )
        yield from (Served("gguf", file, name) for file in files)
    elif model == "adapter":
        variant = find_variant(paths, "tuned")
        if variant.adapter is None:
            raise ValueError("--model adapter: train.method is full, so that there is none; serve the merged model")
        if (paths.out("format", "summary.json")).is_file() and _new_tokens(paths):
            raise ValueError(
                "--model adapter: format.add_special_tokens added tokens that the base model lacks; serve merged"
            )
        yield Served("adapter", variant.checkpoint, name, variant.adapter, trust)
    else:
        yield Served(model, find_variant(paths, model).checkpoint, name, trust_remote_code=trust)


def shipped(params: Params, engine: str) -> str:
    """Return the model that is shipped for an engine."""
    if engine == "llama_cpp":
        return "gguf"
    return "quantized" if params.quantize.method != "none" else "merged"


def _new_tokens(paths: Paths) -> list[int]:
    return list(json.loads(paths.out("format", "summary.json").read_text(encoding="utf-8"))["new_token_ids"])


def answer(
    engine: str,
    served: Served,
    root: Path,
    recorded: tuple[str, list[dict[str, Any]]],
    prompts: list[Prompt],
    asked: EvalRows,
    stops: Sequence[str],
    on_progress: Callable[[int, int], None],
) -> EngineResult:
    """Ask the prompts of an engine that is started for them, and compare.

    Args:
        engine: The engine.
        served: The model.
        root: The checkout.
        recorded: Name of the model that `evaluate` asked, and its answers.
        prompts: The prompts.
        asked: The rows that they belong to.
        stops: Texts of the stop tokens.
        on_progress: Called with the number of answers, 0 as soon as the engine is ready, and the number of prompts.

    Raises:
        ValueError: The engine failed.
    """
    port = free_port()
    longest = max(len(prompt.token_ids) for prompt in prompts) + asked.max_new_tokens
    command = command_of(engine, served, root, port, -(-(longest + 1) // ROUND_UP) * ROUND_UP, parse=False)
    with running(engine, command, port) as server:
        answers = ask_all(engine, server, served.name, prompts, asked.max_new_tokens, on_progress, stops)
    result = compare(engine, served.label, recorded, prompts, answers, asked.task, asked.references)
    return replace(result, speed={**result.speed, "start_seconds": round(server.start_s, 1)})


def check_text(asked: EvalRows) -> None:
    """Check that the prompts can be sent to an engine.

    Raises:
        ValueError: They have images.
    """
    if asked.prompts_with_images:
        raise ValueError("the held-out prompts have images, which engines are not sent: they are asked text alone")


def stop_texts(paths: Paths, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of the tokens that end an answer, by the tokenizer and the generation config."""
    file = paths.out("merge", "model", "generation_config.json")
    configured = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ids = configured if isinstance(configured, list) else [configured]
    return TerminatorCheck(tokenizer, [number for number in ids if number is not None]).stop_texts
