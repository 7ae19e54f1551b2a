"""A checkout in which the stage `train` can run: a tiny base model, packed rows, params.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from ruamel.yaml import YAML
from transformers import PreTrainedModel

from sft.labels import IGNORE_INDEX
from stages import train
from stages.checkout.artifacts import write_json, write_jsonl
from stages.checkout.paths import Paths
from stages.models.base import folder_digest
from stages.params.schema import LaunchSection, load_params
from tests.tiny import tiny_model, tiny_tokenizer

REPO = Path(__file__).resolve().parents[2]
NUM_ROWS = 21
SHORT = {
    "max_steps": 8,
    "learning_rate": 1e-2,
    "lora_r": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 2,
}

ENDLESS = {"max_steps": 1_000_000, "save_steps": 1_000_000, "eval_steps": 1_000_000, "logging_steps": 1}


def launch_section(**values: Any) -> LaunchSection:
    """The shipped `train.launch` with other values."""
    shipped = load_params(REPO / "params.yaml").train.launch.model_dump()
    return LaunchSection.model_validate({**shipped, **values})


def make_training_root(root: Path, model: PreTrainedModel | None = None, **train: Any) -> Paths:
    """Write what earlier stages would have written, and params.yaml with `train` in its section.

    Args:
        root: The checkout.
        model: The base; None = a tiny Llama.
        train: Values of the section.
    """
    paths, tokenizer, base = Paths(root), tiny_tokenizer(), root / "models" / "base"
    (model or tiny_model()).save_pretrained(base)
    tokenizer.save_pretrained(base)
    record = {"name_or_path": str(base), "revision": None, "resolved": str(base)}
    write_json(paths.out("load", "base_model.json"), {**record, "digest": folder_digest(base)})
    tokenizer.save_pretrained(paths.out("format", "tokenizer"))
    write_json(paths.out("format", "summary.json"), {"new_token_ids": []})
    for split, numbers in (("train", range(NUM_ROWS)), ("eval", range(NUM_ROWS, NUM_ROWS + 5))):
        Dataset.from_list([packed_row(number) for number in numbers]).save_to_disk(str(paths.out("pack", split)))
    prompts = [{"id": "a:1", "prompt": "What?", "reference": "{}", "add_special_tokens": False}]
    write_jsonl(paths.out("format", "prompts.jsonl"), prompts)
    set_params(root, **train)
    return paths


def packed_row(number: int) -> dict[str, Any]:
    """Two or three documents of different lengths in a row."""
    tokenizer, ids, labels, lengths = tiny_tokenizer(), [], [], []
    for part in range(2 + number % 2):
        question = tokenizer(f"What is {number} and {part}?")["input_ids"]
        answer = tokenizer(json.dumps({"sum": [number + part] * (1 + number % 3)}) + "<|im_end|>")["input_ids"]
        ids += question + answer
        labels += [IGNORE_INDEX] * len(question) + answer
        lengths.append(len(question) + len(answer))
    return {"input_ids": ids, "labels": labels, "seq_lengths": lengths}


def set_params(root: Path, launch: dict[str, Any] | None = None, **train: Any) -> None:
    """Write params.yaml: the shipped one, short, with other values of the section `train`."""
    values = load_params(REPO / "params.yaml").model_dump()
    values["model"]["name_or_path"] = str(root / "models" / "base")
    values["train"] |= {**SHORT, **train}
    values["train"]["launch"] |= launch or {}
    values["evaluate"]["gate"] = ["tuned.loss <= base.loss"]
    values["evaluate"]["test"] = values["evaluate"]["regression"]["path"] = None
    values["quantize"]["method"] = "none"
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(values, file)


def environment() -> dict[str, str]:
    """One thread a process, no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train_here(paths: Paths) -> None:
    """Run the stage `train` in this process, which saves the start of another one."""
    train.run(load_params(paths.root / "params.yaml"), paths)


def start_stage(paths: Paths, stage: str = "train", **variables: str) -> subprocess.Popen[str]:
    """`python -m stages train` as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "stages", stage, "--root", str(paths.root)],
        cwd=REPO,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_stage(paths: Paths, stage: str = "train", code: int = 0, **variables: str) -> str:
    """Run a stage to its end; returns what it printed."""
    process = start_stage(paths, stage, **variables)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output
