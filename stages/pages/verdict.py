"""The verdict on a result in a headline: whether the gate is open, and what the evidence lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft.evaluate.evidence import MIN_ROWS
from sft.evaluate.gate import FAILED, NOT_SHOWN
from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.pages.page import percent, show
from stages.params.figures import figure_of

NEEDED = ("models", "intervals", "figures", "gate", "passed", "num_prompts")
"""Entries of results.json that pages and `publish` read."""

OPEN, UNSURE, CLOSED = "open", "unsure", "closed"
"""How the headline is coloured."""


def read_results(paths: Paths) -> dict[str, Any]:
    """Read outs/evaluate/results.json.

    Raises:
        ValueError: An earlier version wrote it, with less in it.
    """
    file = paths.out("evaluate", "results.json")
    results = read_json(file)
    lacking = [name for name in NEEDED if name not in results]
    lacking += ["gate[].verdict"] if any("verdict" not in row for row in results.get("gate", [])) else []
    if lacking:
        raise ValueError(
            f"{file} is of an earlier version of the pipeline: it lacks {', '.join(lacking)}; "
            "`sft evaluate` measures the models again"
        )
    return dict(results)


def verdict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headline, its colour, a sentence with the main figures, and whether the gate is open.

    Args:
        results: Content of outs/evaluate/results.json.
    """
    unmet, weak = count_unmet(results["gate"]), doubts(results)
    if not results["gate"]:
        headline = "Measured without a gate"
    elif not results["passed"]:
        headline = f"The gate is closed: {unmet}"
    elif unmet:
        headline = f"The gate is open, but {unmet}"
    else:
        number = len(results["gate"])
        headline = f"The gate is open: {'every' if number > 1 else 'its'} condition holds"
    has_failed = any(row["verdict"] == FAILED for row in results["gate"])
    tone = CLOSED if has_failed else UNSURE if unmet or weak or not results["gate"] else OPEN
    return {
        "passed": results["passed"],
        "tone": tone,
        "headline": "; ".join([headline, *weak]),
        "sentence": figures_sentence(results),
    }


def count_unmet(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many conditions are not met, such as `1 of 3 conditions is not shown`; empty if all are shown."""
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in (FAILED, NOT_SHOWN)}
    words = {FAILED: ("does not hold", "do not hold"), NOT_SHOWN: ("is not shown", "are not shown")}
    parts = [(number, words[verdict][number > 1]) for verdict, number in counts.items() if number]
    if len(parts) == 1:
        return f"{parts[0][0]} of {len(rows)} conditions {parts[0][1]}"
    return f"of {len(rows)} conditions, {' and '.join(f'{n} {what}' for n, what in parts)}" if parts else ""


def doubts(results: Mapping[str, Any]) -> list[str]:
    """Return what the evidence lacks: enough held-out rows, or a right answer."""
    found = []
    if results["num_prompts"] < MIN_ROWS:
        number = results["num_prompts"]
        found.append(f"only {number} held-out row{'s' if number != 1 else ''}")
    figures = results["figures"]
    metric = "exact_match" if "exact_match" in figures else figures[0]
    label, kind, direction = figure_of(metric)
    if direction > 0 and results["models"]["tuned"].get(metric) == 0:
        found.append(f"{label[0].lower() if label[1:2].islower() else label[0]}{label[1:]} is {show(0.0, kind)}")
    return found


def figures_sentence(results: Mapping[str, Any]) -> str:
    """Return a sentence with the main figure of all models and the size of the quantized one."""
    models, metric = results["models"], results["figures"][0]
    label, kind, _ = figure_of(metric)
    scores = [f"{name} {show(models[name][metric], kind)}" for name in models if metric in models[name]]
    rows = f"{results['num_prompts']} held-out row{'s' if results['num_prompts'] != 1 else ''}"
    sentence = f"{label} on {rows}: {', '.join(scores)}."
    if "quantized" in models:
        ratio = models["quantized"]["size_mb"] / models["merged"]["size_mb"]
        sentence += f" The quantized checkpoint has {percent(ratio)} of the merged one's size."
    return sentence
