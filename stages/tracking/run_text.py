"""Name and note of a run in MLflow: what differs from the run before it, its main figures, and where its pages are."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from stages.checkout.foreign_text import for_markdown
from stages.checkout.redaction import redact

SHORT = {
    "train.learning_rate": "lr",
    "train.num_train_epochs": "epochs",
    "train.max_steps": "steps",
    "train.lora_r": "r",
    "train.lora_alpha": "alpha",
    "train.lora_dropout": "dropout",
    "train.per_device_train_batch_size": "rows",
    "train.gradient_accumulation_steps": "accumulation",
    "train.method": "",
    "pack.max_length": "length",
    "model.name_or_path": "",
    "model.dtype": "",
    "quantize.method": "",
    "quantize.bits": "bits",
}
"""Params in the order in which a name lists them -> their short names; empty = the value says enough."""

HEADLINES = (("exact_match", "exact"), ("token_accuracy", "accuracy"), ("loss", "loss"))
"""Figures of the tuned model, the first of which that exists is in the name."""

MAX_CHANGES, MAX_NAME = 3, 120


def run_name(
    params: Mapping[str, Any], before: Mapping[str, str] | None, figures: Mapping[str, float], model: str
) -> str:
    """Return the name of a run, such as `lr 3e-04, r 8 · exact 0.93`.

    Args:
        params: Params of the result, with dotted names.
        before: Params of the run before it as MLflow has them; None if it is the first one.
        figures: `<stage>.<metric>` -> value.
        model: Name of the base model, for the first run.
    """
    if before is None:
        text = f"{model}, lr {show_value(params['train.learning_rate'])}"
    else:
        text = describe_changes(params, before)
    return redact(" · ".join(part for part in (text, headline(figures)) if part))[:MAX_NAME]


def describe_changes(params: Mapping[str, Any], before: Mapping[str, str]) -> str:
    """Return the params that differ, the most telling ones first, such as `lr 3e-04, r 8 and 2 more`."""
    changed = [name for name, value in params.items() if name in before and not is_recorded_as(before[name], value)]
    known = list(SHORT)
    changed.sort(key=lambda name: known.index(name) if name in known else len(known))
    shown = [f"{SHORT.get(name, name.rpartition('.')[2])} {show_value(params[name])}".strip() for name in changed]
    more = f" and {len(shown) - MAX_CHANGES} more" if len(shown) > MAX_CHANGES else ""
    return ", ".join(shown[:MAX_CHANGES]) + more if shown else "same params"


def is_recorded_as(recorded: str, value: Any) -> bool:
    """Return whether MLflow has a param with this value: as text or JSON, or by its digest if it is long."""
    text = redact(value if isinstance(value, str) else json.dumps(value))
    return recorded == text or recorded.startswith(f"sha256:{hashlib.sha256(text.encode()).hexdigest()} ")


def show_value(value: Any) -> str:
    """Return a value in a few characters: numbers in full, of a path its last part, of a list its length."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.rpartition("/")[2].removeprefix("embedded:")[:24]
    if isinstance(value, list):
        return f"[{len(value)}]"
    return json.dumps(value)[:24]


def headline(figures: Mapping[str, float]) -> str:
    """Return the main figure of the tuned model, such as `exact 0.93`."""
    for name, text in HEADLINES:
        value = figures.get(f"evaluate.tuned.{name}")
        if value is not None:
            return f"{text} {value:.2f}" if name != "loss" else f"{text} {value:.3f}"
    return ""


def main_figures(figures: Mapping[str, float], metric: str, shipped: str) -> dict[str, float]:
    """Return the figures to look at first, under names by which MLflow's pages sort them before all others.

    Args:
        figures: `<stage>.<metric>` -> value.
        metric: The first figure of the task.
        shipped: Name of the model that is shipped.
    """
    places = {
        f"eval/{metric}": f"evaluate.tuned.{metric}",
        f"eval/shipped_{metric}": f"evaluate.{shipped}.{metric}",
        "eval/shipped_mb": f"evaluate.{shipped}.size_mb",
        "eval/tuned_loss": "evaluate.tuned.loss",
        "eval/base_loss": "evaluate.base.loss",
    }
    return {name: figures[place] for name, place in places.items() if place in figures}


def run_note(name: str, main: Mapping[str, float], passed: bool, report: str) -> str:
    """Return the note of a run in Markdown: the gate, its main figures, and links to its pages.

    Args:
        name: Name of the run.
        main: The main figures.
        passed: Whether the gate is passed.
        report: Link to the report.
    """
    lines = [f"**{for_markdown(name)}**: gate {'passed' if passed else 'failed'}", ""]
    lines += ["| figure | value |", "|---|---:|", *(f"| {key} | {value:.4g} |" for key, value in main.items()), ""]
    lines += [f"- [report: figures, curves, answers, lineage]({report})"]
    url = os.environ.get("SFT_FLOW_RUN_URL", "")
    if re.fullmatch(r"https?://[^\s()<>]+", url):
        lines.append(f"- [run of the flow in Prefect]({redact(url)})")
    return "\n".join(lines) + "\n"
