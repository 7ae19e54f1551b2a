"""Training side by side with trl, in one run: `make bench`, or `python benchmarks/train_speed.py --help`.

All contenders train the same model on the same rows: by LoRA or QLoRA (r=16, all linear layers), or all weights.
Contenders run one after the other in separate processes. The table has tokens per second, and ratios between contenders
of this run. trl is installed in a separate environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent))
from compare import record
from contenders import ABLATIONS, CONTENDERS, DTYPE, METHODS, ON_GPU, now

HERE = Path(__file__).resolve().parent
TRL_PYTHON = HERE / ".venv-trl" / "bin" / "python"
LORA_RANK = 16


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in a separate process and environment."""
    python = TRL_PYTHON if name.startswith("trl") else Path(sys.executable)
    command = [str(python), str(HERE / "contenders.py"), name, "--model", str(args.model), "--data", str(args.data)]
    command += ["--steps", str(args.steps), "--method", args.method, "--max-length", str(args.max_length)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(results[-1].removeprefix("RESULT "))


def matrix_bound(model_dir: Path, method: str, num_tokens: int, supervised: float) -> float:
    """Return the tokens per second of a step's matrix products alone, at the speed that torch has in this run.

    They are: the products of the forward pass and of the backward pass through the weights; those of the LoRA matrices
    forward and backward or, if all weights are trained, those for the gradients of the weights; those of the head
    forward and backward, on supervised tokens.

    Args:
        model_dir: Folder with the model's config.
        method: lora, full or qlora.
        num_tokens: Tokens of a step.
        supervised: Share of tokens with a target.
    """
    config = AutoConfig.from_pretrained(model_dir)
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layers = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layers += [(hidden, inner), (hidden, inner), (inner, hidden)]
    products = []
    for width, out in layers:
        products += [(num_tokens, width, out), (num_tokens, out, width)]
        if method == "full":
            products.append((out, num_tokens, width))
            continue
        products += [(num_tokens, width, LORA_RANK), (num_tokens, LORA_RANK, out)] * 2
        products += [(LORA_RANK, num_tokens, width), (out, num_tokens, LORA_RANK)]
    targets = max(1, round(num_tokens * supervised))
    vocabulary = [(targets, hidden, config.vocab_size), (targets, config.vocab_size, hidden)]
    vocabulary += [(config.vocab_size, targets, hidden)] * (method == "full")
    seconds = config.num_hidden_layers * sum(map(product_seconds, products)) + sum(map(product_seconds, vocabulary))
    return num_tokens / seconds


def product_seconds(shape: tuple[int, int, int]) -> float:
    """Return the shortest time of one matrix product, in seconds."""
    rows, middle, columns = shape
    device = "cuda" if ON_GPU else "cpu"
    left = torch.randn(rows, middle, device=device, dtype=DTYPE)
    right = torch.randn(middle, columns, device=device, dtype=DTYPE)
    times = []
    for _ in range(5):
        started = now()
        torch.mm(left, right)
        times.append(now() - started)
    return min(times)


def table(results: dict[str, list[dict[str, Any]]], bound: float) -> str:
    """Return medians over repeats and their ratios to trl's two settings."""
    speed = {name: statistics.median(r["tokens"] / r["seconds"] for r in runs) for name, runs in results.items()}
    memory = {name: max(r["peak_gb"] for r in runs) for name, runs in results.items()}
    documented, best = "trl, as documented", "trl, its best setting"
    lines = ["| contender | tokens/s | to documented | to best | of the matrix bound | peak GB | first and last loss |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, runs in results.items():
        share = f"{speed[name] / bound:.0%}"
        ratios = [f"{speed[name] / speed[other]:.2f}" if other in speed else "" for other in (documented, best)]
        losses = runs[0]["losses"]
        lines.append(
            f"| {name} | {speed[name]:.0f} | {ratios[0]} | {ratios[1]} | {share} | {memory[name]:.1f} | "
            f"{losses[0]:.4f}, {losses[-1]:.4f} |"
        )
    return "\n".join([*lines, "", f"matrix products alone: {bound:.0f} tokens/s"])


def main() -> None:
    """Measure all contenders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("~/.cache/sft/models/smollm2-135m-instruct").expanduser())
    parser.add_argument("--data", type=Path, default=HERE.parent / "data" / "shop_train.jsonl")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each contender")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--max-length", type=int, default=512, help="for contenders without their own max_length")
    parser.add_argument("--only", nargs="*", choices={**CONTENDERS, **ABLATIONS}, default=list(CONTENDERS))
    parser.add_argument("--ablate", action="store_true", help="also run with one speed-up off at a time")
    parser.add_argument("--record", action="store_true", help="append the ratios to record.jsonl, for compare.py")
    args = parser.parse_args()
    names = [*args.only, *(name for name in ABLATIONS if args.ablate)]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            results[name].append(measure(name, args))
            latest = results[name][-1]
            print(f"{name}: {latest['tokens'] / latest['seconds']:.0f} tokens/s", file=sys.stderr, flush=True)
    supervised = statistics.mean(run["supervised"] for runs in results.values() for run in runs)
    bound = matrix_bound(args.model, args.method, 1024, supervised)
    print(table(results, bound))
    if args.record:
        benchmark = f"train {args.model.name} {args.method} {args.data.name} {args.max_length}"
        record(benchmark, ratios_of(results, bound))


def ratios_of(results: dict[str, list[dict[str, Any]]], bound: float) -> dict[str, float]:
    """Return sft's speed over that of each other contender, and over the bound."""
    speed = {name: statistics.median(r["tokens"] / r["seconds"] for r in runs) for name, runs in results.items()}
    own = {name: value for name, value in speed.items() if name.startswith("sft")}
    ratios = {f"{name} / {other}": own[name] / speed[other] for name in own for other in speed if other not in own}
    return ratios | {f"{name} / matrix bound": value / bound for name, value in own.items()}


if __name__ == "__main__":
    main()
