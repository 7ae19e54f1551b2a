"""Time of training on reasoning that is unrolled, beside one row per conversation.

Run: `python benchmarks/unroll_cost.py`. `thinking: unroll` makes a row of each answer, with the prompt that the model
gets: the earlier answers without their reasoning. The tokens that these rows begin with are computed once. The other
way is one row per conversation, with the reasoning of all answers in it, as a template prints that keeps all of it.
Both train the same answers. Models are random Llamas of width 576 with six layers and LoRA. The two ways take turns,
and the median of the ratios of neighbouring steps is printed.

Each answer but the last is computed twice: after its reasoning, where it is trained, and without it in the prompt of
the next answers. So the cost grows with the share of the answers' tokens. Attention costs less, since the rows are
shorter.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
from datasets import Dataset
from peft import LoraConfig

from benchmarks.timed_step import timed_step
from sft.train.trainer import SFTTrainer
from tests.sft.chat.reasoning_templates import QWEN3
from tests.tiny import CHATML, quiet_config, tiny_model, tiny_tokenizer

MODEL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9}
SHAPES = {
    "shorter than the answer": (30, 15, 60),
    "as long as the answer": (30, 60, 60),
    "twice as long": (30, 120, 60),
    "reasoning model": (60, 400, 80),
    "long reasoning": (60, 1200, 100),
}
"""Tokens of a question, of the reasoning and of the answer."""


def conversations(number: int, turns: int, shape: tuple[int, int, int], *, inline: bool) -> Dataset:
    """Return conversations of random letters; `inline` writes the reasoning into the text of the answers."""
    chance = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=tokens))

    rows = []
    for _ in range(number):
        messages = []
        for _ in range(turns):
            question, reasoning, answer = map(text, shape)
            said = {"content": answer, "reasoning_content": reasoning}
            if inline:
                said = {"content": f"<think>\n{reasoning}\n</think>\n\n{answer}"}
            messages += [{"role": "user", "content": question}, {"role": "assistant", **said}]
        rows.append({"messages": messages})
    return Dataset.from_list(rows)


def stepper(rows: Dataset, template: str, folder: str, **options: Any) -> Any:
    """Return a function that times one training step on all rows, and how many tokens are computed and trained."""
    trainer = SFTTrainer(
        tiny_model("llama", **MODEL, num_key_value_heads=3, head_dim=64),
        args=quiet_config(
            folder, per_device_train_batch_size=1000, max_length=None, assistant_only_loss=True, **options
        ),
        train_dataset=rows,
        processing_class=tiny_tokenizer(template),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    step, batch = timed_step(trainer)
    computed = batch["computed"].numel() if "computed" in batch else batch["input_ids"].numel()
    return step, computed, int((batch["labels"] != -100).sum())


def main() -> None:
    """Print a table of ratios, one line per shape of conversations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--turns", type=int, default=3, help="Answers per conversation.")
    parser.add_argument("--tokens", type=int, default=3000, help="About how many tokens a batch has.")
    parser.add_argument("--steps", type=int, default=7, help="Steps of each way.")
    given = parser.parse_args()
    print(
        "| question, reasoning, answer | trained | computed, one row | computed, unrolled | time, unrolled / one row |"
    )
    print("|---|---|---|---|---|")
    for name in given.only:
        shape = SHAPES[name]
        number = max(1, given.tokens // (given.turns * sum(shape)))
        with tempfile.TemporaryDirectory() as folder:
            whole = conversations(number, given.turns, shape, inline=True)
            apart = conversations(number, given.turns, shape, inline=False)
            single, plain, trained = stepper(whole, CHATML, folder)
            unrolled, shared, trained_apart = stepper(apart, QWEN3.template, folder, thinking="unroll")
            single(), unrolled()
            pairs = [(single(), unrolled()) for _ in range(given.steps)]
        ratio = statistics.median(second / first for first, second in pairs)
        print(
            f"| {', '.join(map(str, shape))} | {trained}, {trained_apart} | {plain:,} | {shared:,} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
