"""Preparation side by side with trl, in one run: `make bench-prepare`, or `python benchmarks/prepare_speed.py --help`.

Each contender turns the same JSONL file of prompts and completions into packed rows with labels. Contenders run one
after the other in separate processes, for several rounds. The table has tokens per second, and ratios between
contenders of the same round. trl is installed in a separate environment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TRL_PYTHON = HERE / ".venv-trl" / "bin" / "python"


class Contender(NamedTuple):
    """A library, its number of processes, and whether the tokenizer may use threads."""

    library: str
    num_proc: int
    threads: bool


CONTENDERS = {
    "trl, one process": Contender("trl", 1, threads=True),
    "sft, one process": Contender("sft", 1, threads=True),
    "sft, one process, one thread": Contender("sft", 1, threads=False),
    "trl, two processes": Contender("trl", 2, threads=False),
    "sft, two processes": Contender("sft", 2, threads=False),
}


def write_rows(source: Path, target: Path, num_rows: int) -> None:
    """Write prompts and completions: the rows of a file, with shuffled words from the second pass on.

    Equal rows would only show how well a tokenizer's cache works.
    """
    text = source.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    words = random.Random(0)
    with target.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            prompt, completion = pair(rows[number % len(rows)])
            if number >= len(rows):
                prompt, completion = (shuffled(part, words) for part in (prompt, completion))
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def pair(row: dict[str, Any]) -> tuple[str, str]:
    """Return question and answer of a conversation's last turns, or of an instruction row."""
    if "messages" in row:
        return row["messages"][-2]["content"], row["messages"][-1]["content"]
    return "\n".join(part for part in (row["instruction"], row.get("input", "")) if part), row["output"]


def shuffled(text: str, source: random.Random) -> str:
    """Return the text with its words shuffled."""
    words = text.split(" ")
    source.shuffle(words)
    return " ".join(words)


def measure(contender: Contender, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in a separate process and environment."""
    python = TRL_PYTHON if contender.library == "trl" else Path(sys.executable)
    command = [str(python), str(HERE / "prepare_contenders.py"), contender.library, "--model", str(args.model)]
    command += ["--data", str(data), "--max-length", str(args.max_length), "--num-proc", str(contender.num_proc)]
    threads = "true" if contender.threads else "false"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": threads}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(results[-1].removeprefix("RESULT "))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return medians over rounds, and the median of the ratios to trl in the same round."""
    base = results.get("trl, one process")
    lines = [
        "| contender | tokens/s | to trl, one process | packed rows | fill | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        speeds = [one["tokens"] / one["seconds"] for one in rounds]
        ratio = ""
        if base:
            others = [one["tokens"] / one["seconds"] for one in base]
            ratios = [mine / theirs for mine, theirs in zip(speeds, others, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        peak = max(one["peak_gb"] for one in rounds)
        lines.append(
            f"| {name} | {statistics.median(speeds):,.0f} | {ratio} | {rounds[0]['rows']:,} | "
            f"{rounds[0]['fill']:.3f} | {peak:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all contenders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("~/.cache/sft/models/smollm2-135m-instruct").expanduser())
    parser.add_argument("--data", type=Path, default=HERE.parent / "data" / "shop_train.jsonl")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    args = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(args.data, data, args.rows)
        for _ in range(args.repeats):
            for name in args.only:
                results[name].append(measure(CONTENDERS[name], data, args))
                latest = results[name][-1]
                print(f"{name}: {latest['tokens'] / latest['seconds']:,.0f} tokens/s", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
