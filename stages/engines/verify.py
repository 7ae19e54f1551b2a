"""`sft verify --engine`: whether a serving engine gives the answers that `evaluate` recorded."""

from __future__ import annotations

import json
import sys
from typing import Any

from datasets import load_from_disk

from sft.models.checkpoint import load_tokenizer
from stages.checkout.artifacts import read_jsonl, write_json
from stages.checkout.paths import Paths
from stages.engines.asking import ANSWERED_BY, answer, check_text, find_served, stop_texts
from stages.engines.comparison import EngineResult
from stages.engines.programs import Served, check_installed, check_served
from stages.engines.prompts import read_requests
from stages.evaluation.row_scores import ANSWERS
from stages.evaluation.rows import EvalRows, read_prompts
from stages.params.schema import Params
from stages.params.tasks import load_tasks
from stages.progress import progress


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
    check_installed([engine], paths.root)
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
    check_text(asked)
    recorded = recorded_answers(paths, ANSWERED_BY[served.model], asked)
    prompts = read_requests(paths, asked, tokenizer, params.format.system_message)

    def show(done: int, total: int) -> None:
        progress(done, total, "prompts", f"{engine}, {served.label}: {done} of {total}")

    return answer(engine, served, paths.root, recorded, prompts, asked, stop_texts(paths, tokenizer), show)


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
