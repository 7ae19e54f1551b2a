"""`sft verify --engine`: whether a serving engine gives the answers that `evaluate` recorded."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from sft.chat.checks import TerminatorCheck
from sft.models.checkpoint import load_tokenizer
from stages.checkout.artifacts import read_jsonl, write_json
from stages.checkout.paths import Paths
from stages.engines.client import ask_all
from stages.engines.comparison import EngineResult, compare
from stages.engines.programs import Served, check_installed, check_served, command_of
from stages.engines.prompts import read_requests
from stages.engines.server import free_port, running
from stages.evaluation.row_scores import ANSWERS
from stages.evaluation.rows import EvalRows, read_prompts
from stages.models.variants import find_variant
from stages.params.schema import Params
from stages.params.tasks import load_tasks
from stages.progress import progress

ANSWERED_BY = {"merged": "tuned", "adapter": "tuned", "gguf": "tuned", "quantized": "quantized"}
"""Model that an engine serves -> the model whose answers `evaluate` recorded for the same weights, before rounding."""

ROUND_UP = 64


def run(params: Params, paths: Paths, engine: str, model: str | None, *, as_json: bool = False) -> int:
    """Ask the held-out prompts, print the figures, and write reports/engines/ENGINE-MODEL.json.

    Args:
        params: Values of params.yaml.
        paths: The checkout.
        engine: transformers, vllm or llama_cpp.
        model: merged, quantized, gguf or adapter; None = the shipped one.
        as_json: Whether to print JSON.

    Returns:
        Exit code: 0, as a difference is a result; the gate decides about it.

    Raises:
        ValueError: The engine is not installed or does not serve the model, or an earlier stage has not run.
    """
    check_installed(engine, paths.root)
    if model is not None:
        check_served(engine, model)
    results = []
    for served in find_served(params, paths, engine, model):
        print(f"starting {engine} for {served.label} ...", file=sys.stderr, flush=True)
        result = measure(params, paths, engine, served)
        results.append(result)
        write_json(paths.root / "reports" / "engines" / f"{engine}-{result.model}.json", result.to_dict())
        if not as_json:
            print(describe(result), flush=True)
    if as_json:
        print(json.dumps([result.to_dict() for result in results], indent=2, ensure_ascii=False))
    return 0


def find_served(params: Params, paths: Paths, engine: str, model: str | None) -> Iterator[Served]:
    """Yield the models to serve: one, or all GGUF files.

    Raises:
        ValueError: An earlier stage has not written the model.
    """
    if model is None:
        model = shipped(params, engine)
    name, trust = params.publish.registered_model, params.model.trust_remote_code
    if model == "gguf":
        files = sorted(paths.out("quantize", "gguf").glob("model-*.gguf"))
        if not files:
            raise ValueError(
                f"{paths.out('quantize', 'gguf')} has no GGUF file: name kinds in quantize.export_gguf, such as "
                "[q8_0], and type `sft quantize`"
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


def measure(params: Params, paths: Paths, engine: str, served: Served) -> EngineResult:
    """Start an engine, ask it the held-out prompts and compare its answers with the recorded ones.

    Raises:
        ValueError: `evaluate` has not run, prompts have images, or the engine failed.
    """
    section = params.evaluate
    tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
    task = load_tasks(section.task, paths.root)
    rows = load_from_disk(str(paths.out("pack", "eval"))).to_list()
    asked = EvalRows.of(rows, read_prompts(section, task, paths), tokenizer, task, section.max_new_tokens)
    if asked.prompts_with_images:
        raise ValueError("the held-out prompts have images, which `sft verify --engine` does not send")
    recorded = recorded_answers(paths, ANSWERED_BY[served.model], asked)
    prompts = read_requests(paths, asked, tokenizer, params.format.system_message)
    return answer(engine, served, paths.root, recorded, prompts, asked, stop_texts(paths, tokenizer))


def answer(
    engine: str,
    served: Served,
    root: Path,
    recorded: tuple[str, list[dict[str, Any]]],
    prompts: list[Any],
    asked: EvalRows,
    stops: Sequence[str] = (),
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
    """
    port = free_port()
    longest = max(len(prompt.token_ids) for prompt in prompts) + asked.max_new_tokens
    command = command_of(engine, served, root, port, -(-(longest + 1) // ROUND_UP) * ROUND_UP, parse=False)
    with running(engine, command, port) as server:
        answers = ask_all(
            engine,
            server,
            served.name,
            prompts,
            asked.max_new_tokens,
            lambda done, total: progress(done, total, "prompts", f"{engine}, {served.label}: {done} of {total}"),
            stops,
        )
    result = compare(engine, served.label, recorded, prompts, answers, asked.task, asked.references)
    return replace(result, speed={**result.speed, "start_seconds": round(server.start_s, 1)})


def stop_texts(paths: Paths, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of the tokens that end an answer, by the tokenizer and the generation config."""
    file = paths.out("merge", "model", "generation_config.json")
    configured = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ids = configured if isinstance(configured, list) else [configured]
    return TerminatorCheck(tokenizer, [number for number in ids if number is not None]).stop_texts


def recorded_answers(paths: Paths, name: str, asked: EvalRows) -> tuple[str, list[dict[str, Any]]]:
    """Return the answers of a model that `evaluate` recorded, in the order of the prompts.

    Raises:
        ValueError: There are none, or they are of other prompts.
    """
    file = paths.out("evaluate", ANSWERS)
    if not file.is_file():
        raise ValueError(f"{file} is missing, so there are no answers to compare with: type `sft evaluate` first")
    rows = list(read_jsonl(file))
    if [row["prompt"] for row in rows] != [prompt["prompt"] for prompt in asked.prompts]:
        raise ValueError(f"{file} is of other held-out prompts than outs/format: type `sft evaluate` first")
    return name, [row["answers"][name] for row in rows]


def describe(result: EngineResult) -> str:
    """Describe a result in a few lines."""
    lines = [
        f"{result.engine}, {result.model}: {result.num_prompts} prompts ({result.num_chats} as messages), "
        f"{result.speed['tokens_per_second']:g} tokens per second, ready after {result.speed['start_seconds']:g} s"
    ]
    for name, value in result.figures.items():
        low, high = result.intervals.get(name, (value, value))
        against = f" as the {result.compared_with} model" if name == "equal_answers" else ""
        lines.append(f"  {name:<16}{value:.4g}  ({low:.3g} to {high:.3g}){against}")
    for what, found in (("answer", result.first_difference), ("prompt", result.first_prompt_difference)):
        if found is not None:
            lines.append(f"  first other {what}, row {found['id']}:")
            lines += [f"    {side:<9} {str(found[side])[:300]}" for side in ("engine", "evaluate")]
    return "\n".join(lines)
