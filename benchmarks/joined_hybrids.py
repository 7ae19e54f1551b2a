"""Time of a training step on joined rows beside padded ones, for models whose layers mix tokens outside attention.

Run: `python benchmarks/joined_hybrids.py`. Models are random, of width 256 with four layers; each is a family of
transformers with recurrent, convolutional or linear-attention layers, or with attention code of its own. A batch is 16
documents of 20 to 400 tokens, most of them short, as in chats. The two ways take turns, and the median of the ratios of
neighbouring steps is printed, so that other load on the machine counts for both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timed_step import timed_step
from sft.train.trainer import SFTTrainer
from tests.tiny import quiet_config, tiny_model, tiny_tokenizer

WIDTH = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "head_dim": 64}
DELTA_NET = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "layer_types": ["mamba", "mamba", "mamba", "attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**HEADS, **DELTA_NET},
    "lfm2": {**HEADS, "layer_types": ["conv", "conv", "conv", "full_attention"], "block_ff_dim": 512},
    "granitemoehybrid": {"num_key_value_heads": 2, **MAMBA},
    "recurrent_gemma": {"num_key_value_heads": 1, "lru_width": 256, "block_types": ["recurrent", "attention"]},
    "mamba": {"state_size": 16},
    "bloom": {"n_layer": 4, "n_head": 4},
    "llama": {"num_key_value_heads": 2},
}


def documents(number: int, seed: int) -> Dataset:
    """Return documents of 20 to 400 tokens, half of them below 80."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (20 * torch.exp(torch.rand(number, generator=generator).square() * 3)).long().clamp(20, 400)
    return Dataset.from_dict(
        {"input_ids": [torch.randint(4, 300, (int(n),), generator=generator).tolist() for n in lengths]}
    )


def stepper(family: str, rows: Dataset, folder: str, *, joined: bool) -> Any:
    """Return a function that times one training step on one batch of all rows, and how its documents are kept apart."""
    model = tiny_model(family, **{**WIDTH, **FAMILIES[family]})
    trainer = SFTTrainer(
        model,
        args=quiet_config(folder, per_device_train_batch_size=len(rows), padding_free=joined, max_length=None),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return timed_step(trainer)[0], trainer.attention


def main() -> None:
    """Print a table of ratios, one line per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=7, help="Steps of each way.")
    given = parser.parse_args()
    rows = documents(16, seed=0)
    print("| family | document by document | padded, s | joined, s | joined / padded |\n|---|---|---|---|---|")
    for family in given.only:
        with tempfile.TemporaryDirectory() as folder:
            padded, _ = stepper(family, rows, folder, joined=False)
            joined, attention = stepper(family, rows, folder, joined=True)
            padded(), joined()
            pairs = [(padded(), joined()) for _ in range(given.steps)]
        ratio = statistics.median(second / first for first, second in pairs)
        apart = attention.rpartition("; ")[2] if "run document by document" in attention else "-"
        times = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {family} | {apart.removesuffix(' run document by document')} |", end="")
        print("".join(f" {seconds:.3f} |" for seconds in times), f"{ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
