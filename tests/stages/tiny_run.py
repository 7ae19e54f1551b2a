"""Outs of the stages before quantize, evaluate and publish, made with a tiny model and without running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft.evaluate.likelihood import evaluate_model
from sft.labels import IGNORE_INDEX
from stages.checkout.artifacts import write_json, write_jsonl, write_text
from stages.checkout.paths import Paths
from stages.models.base import folder_digest
from stages.params.schema import Params, load_params
from tests.tiny import tiny_model, tiny_tokenizer

REPO = Path(__file__).resolve().parents[2]
GATE = ["tuned.loss <= 2 * base.loss", "tuned.exact_match >= 0.5"]
# GPTQ packs no layer narrower than its smallest group.
WIDE = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
CURVE = """step,loss,eval_loss,learning_rate,grad_norm,mean_token_accuracy,eval_mean_token_accuracy
1,2.5,,0.0001,3.5,0.4,
2,1.5,1.6,0.0005,2.5,0.6,0.55
3,0.5,{eval_loss},0.0001,1.5,0.9,0.85
"""
SOURCE = {
    "purpose": "train",
    "path": "tiny.jsonl",
    "kind": "messages",
    "num_rows": 5,
    "sha256": {"tiny.jsonl": "5e" * 32},
}
CARD = {
    "sources": [SOURCE],
    "num_rows_in": 8,
    "num_train": 4,
    "num_eval": 3,
    "num_repeated": 0,
    "num_omitted": 0,
    "num_dropped": 1,
    "dropped": {"duplicate": 1},
}
PACKED = {"documents": 3, "rows": 2, "tokens": 150, "trained_tokens": 70, "fill": 0.9}


def tiny_params(**overrides: dict[str, Any]) -> Params:
    """The repository's own params with the sections' values that a tiny run needs, and `section={...}` on top."""
    values = load_params(REPO / "params.yaml").model_dump()
    values["model"] |= {"name_or_path": "models/base"}
    values["quantize"] |= {"group_size": 32, "num_calibration_rows": 4, "calibration_length": 32}
    values["evaluate"] |= {"max_new_tokens": 4, "batch_size": 2, "gate": GATE, "gate_needs": "value"}
    values["evaluate"] |= {"test": None}
    values["evaluate"]["regression"] |= {"path": None}
    for section, changes in overrides.items():
        values[section] |= changes
    return Params.model_validate(values)


def write_tiny_run(root: Path) -> Paths:
    """Write outs of load, format, pack, train and merge below `root`."""
    paths, tokenizer = Paths(root), tiny_tokenizer()
    base = tiny_model(**WIDE)
    _save(base, tokenizer, root / "models" / "base")
    record = {"name_or_path": "models/base", "revision": None, "resolved": "models/base"}
    write_json(paths.out("load", "base_model.json"), {**record, "digest": folder_digest(root / "models" / "base")})
    write_json(paths.out("load", "card.json"), CARD)
    write_jsonl(
        paths.out("load", "ledger.jsonl"),
        [{"id": "tiny.jsonl:5", "stage": "load", "reason": "duplicate", "action": "drop"}],
    )
    write_json(paths.metrics("load"), {"num_train": 4, "num_eval": 3})
    tokenizer.save_pretrained(paths.out("format", "tokenizer"))
    write_json(paths.out("format", "summary.json"), {"new_token_ids": []})
    _write_rows(paths, tokenizer)
    _write_training(paths, base, tokenizer)
    return paths


def _write_rows(paths: Paths, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, rows = [], []
    for number, city in enumerate(("London", "Paris", "<b>Rome</b>")):
        answer = json.dumps({"city": city, "items": [{"quantity": number}]})
        prompt = f"<|im_start|>system\nJSON!<|im_end|>\n<|im_start|>user\n{city}?<|im_end|>\n<|im_start|>assistant\n"
        prompts.append(
            {"id": f"tiny.jsonl:{number + 1}", "prompt": prompt, "reference": answer, "add_special_tokens": False}
        )
        before, after = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{answer}<|im_end|>")
        )
        rows.append({"input_ids": before + after, "labels": [IGNORE_INDEX] * len(before) + after})
    write_jsonl(paths.out("format", "prompts.jsonl"), prompts)
    for split in ("train", "eval"):
        packed = {name: [rows[0][name] + rows[1][name], rows[2][name]] for name in ("input_ids", "labels")}
        packed["seq_lengths"] = [[len(row["input_ids"]) for row in rows[:2]], [len(rows[2]["input_ids"])]]
        Dataset.from_dict(packed).save_to_disk(str(paths.out("pack", split)))
    write_json(paths.metrics("pack"), {"train": PACKED})


def _write_training(paths: Paths, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(paths.out("train", "model"))
    rows = load_from_disk(str(paths.out("pack", "eval"))).to_list()
    eval_loss = evaluate_model(adapter.eval(), rows, tokens_per_batch=2048)["loss"]
    write_text(paths.out("train", "curve.csv"), CURVE.format(eval_loss=eval_loss))
    write_json(paths.metrics("train"), {"loss": 0.5, "eval_loss": eval_loss, "steps": 3})
    merged = PeftModel.from_pretrained(tiny_model(**WIDE), paths.out("train", "model")).merge_and_unload()
    _save(merged, tokenizer, paths.out("merge", "model"))
    write_json(paths.metrics("merge"), {"max_logit_diff": 1.2e-6})
    write_json(paths.out("quantize", "report.json"), {"method": "none", "reason": "not quantized in this test"})
    write_json(paths.metrics("quantize"), {"method": "none"})


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
