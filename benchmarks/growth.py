"""Time per token against length, batch, rank and vocabulary: `python benchmarks/growth.py` draws benchmarks/growth.svg.

A model of SmolLM2-135M's shape with fewer layers and random weights is trained by `SFTTrainer` with LoRA in float32 on
random tokens, half of them supervised. Each point is the fastest of a few steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sft import SFTConfig, SFTTrainer  # noqa: E402

LENGTHS = (256, 512, 1024, 2048, 4096)
NUM_STEPS = 5


@dataclass(frozen=True)
class Setting:
    """One point: rows of `num_documents` documents of `length` tokens, `batch` rows per step."""

    length: int = 128
    num_documents: int = 4
    batch: int = 1
    rank: int = 16
    vocab_size: int = 49152
    num_layers: int = 6

    @property
    def num_tokens(self) -> int:
        """Number of tokens per step."""
        return self.length * self.num_documents * self.batch


CURVES: dict[str, tuple[str, list[tuple[int, Setting]]]] = {
    "one document per row": ("tokens per row", [(n, Setting(length=n, num_documents=1)) for n in LENGTHS]),
    "packed documents of 128 tokens": ("tokens per row", [(n, Setting(num_documents=n // 128)) for n in LENGTHS]),
    "rows of 512 tokens": ("tokens per step", [(512 * n, Setting(batch=n)) for n in (1, 2, 4, 8)]),
    "LoRA rank": ("rank", [(n, Setting(rank=n)) for n in (4, 8, 16, 32, 64, 128)]),
    "vocabulary": ("words", [(n, Setting(vocab_size=n)) for n in (8192, 16384, 32768, 65536, 131072)]),
}


class Clock(TrainerCallback):
    """Callback that times every step, in seconds."""

    def __init__(self) -> None:
        self.started, self.seconds = 0.0, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the step."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the time of the step."""
        self.seconds.append(time.perf_counter() - self.started)


def microseconds_per_token(setting: Setting) -> float:
    """Train a few steps and return the time per token of the fastest."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=setting.num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            LlamaForCausalLM(config),
            args=SFTConfig(
                output_dir=folder,
                max_steps=NUM_STEPS,
                per_device_train_batch_size=setting.batch,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=random_rows(setting),
            processing_class=empty_tokenizer(),
            peft_config=LoraConfig(r=setting.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return min(clock.seconds[1:]) / setting.num_tokens * 1e6


def random_rows(setting: Setting) -> Dataset:
    """Return packed rows of random tokens; the second half of each document is supervised."""
    num_rows = NUM_STEPS * setting.batch
    ids = torch.randint(setting.vocab_size, (num_rows, setting.num_documents, setting.length))
    labels = ids.clone()
    labels[:, :, : setting.length // 2] = -100
    lengths = [[setting.length] * setting.num_documents] * num_rows
    columns = {"input_ids": ids.flatten(1).tolist(), "labels": labels.flatten(1).tolist(), "seq_lengths": lengths}
    return Dataset.from_dict(columns)


def empty_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that only defines a padding token, since rows are token ids already."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")


def draw(results: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw one panel per quantity on the horizontal axis."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # keep text as text: the file is a third smaller
    import matplotlib.pyplot as plt

    axes_names = list(dict.fromkeys(CURVES[name][0] for name in results))
    figure, panels = plt.subplots(1, len(axes_names), figsize=(3.6 * len(axes_names), 3.2), sharey=True)
    for panel, quantity in zip(panels, axes_names, strict=True):
        for name, points in results.items():
            if CURVES[name][0] == quantity:
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.set(xscale="log", xlabel=quantity, ylim=(0, None))
        measured = sorted({n for name, points in results.items() if CURVES[name][0] == quantity for n, _ in points})
        panel.set_xticks(measured, [f"{n:,}" if n < 10_000 else f"{n // 1024}k" for n in measured], fontsize=8)
        panel.set_xticks([], minor=True)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("microseconds per token")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure all settings, print a table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("growth.svg"))
    args = parser.parse_args()
    results: dict[str, list[tuple[int, float]]] = {}
    for name, (quantity, settings) in CURVES.items():
        points = [(n, microseconds_per_token(replace(s, num_layers=args.layers))) for n, s in settings]
        results[name] = points
        print(f"{name}, {quantity}: " + ", ".join(f"{n} {t:.0f} us" for n, t in points), flush=True)
    draw(results, args.out)


if __name__ == "__main__":
    main()
