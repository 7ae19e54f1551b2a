"""A page that compares two results: figures with paired tests, what differs, curves laid over each other, answers."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sft.evaluate.intervals import Paired
from stages.checkout.artifacts import read_json, write_text
from stages.pages.answers import (
    PER_PAGE,
    answer_cells,
    deciding_score,
    make_groups,
    shared_beginning,
    shared_ending,
    without_secrets_in_row,
)
from stages.pages.charts import Series, line_chart
from stages.pages.page import render_page, render_section, show, show_change, show_interval
from stages.params.figures import figure_of, in_order
from stages.tracking.champion import RESULTS_FOLDER
from stages.tracking.recorded import COMMIT, CURVE, DIRTY, GATE_TAG, Difference, Recorded

TEMPLATE = "comparison.html.jinja"

CHARTS = (
    ("Loss, training", "loss", True),
    ("Loss, held-out", "eval_loss", True),
    ("Token accuracy, held-out", "eval_mean_token_accuracy", False),
    ("Learning rate", "learning_rate", False),
    ("Gradient norm", "grad_norm", True),
)
"""Title, column of the curve, and whether the axis may be logarithmic."""

MODELS = ("tuned", "quantized", "base", "merged")
"""Models in the order of the table; those of training come first."""

SHOWN_FIRST = ("tuned", "quantized")

MAX_VALUE = 400
"""Longest text of a value, in characters."""

CERTAIN = 0.05
"""Largest p-value of a difference that is called better or worse."""

Tests = Mapping[str, tuple[Paired, int]]
"""`model.metric` -> paired test on the rows that both results have, and their number."""


@dataclass(frozen=True)
class Side:
    """One of two results.

    Args:
        result: What is known of it.
        folder: Folder with its curve and its outs/evaluate, under the paths that they have in a checkout.
        answers: Key of a held-out prompt -> its row in generations.jsonl.
    """

    result: Recorded
    folder: Path
    answers: Mapping[str, Mapping[str, Any]]


def write_comparison(
    file: Path, sides: tuple[Side, Side], causes: Mapping[str, Sequence[Difference]], tests: Tests, warning: str = ""
) -> None:
    """Write the page.

    Args:
        file: File to write.
        sides: The two results, called A and B.
        causes: Kind -> what differs between their inputs.
        tests: Paired tests of their figures.
        warning: What makes the comparison doubtful; empty if nothing does.
    """
    figures = figure_rows(sides, tests)
    sections = [
        render_section("figures", "Figures", "comparison/figures.html.jinja", {"tables": tables(figures)}),
        render_section("causes", "What differs", "comparison/causes.html.jinja", cause_rows(causes)),
        render_section("curves", "Training", "comparison/curves.html.jinja", {"curves": curves(sides)}),
        render_section("answers", "Answers", "comparison/answers.html.jinja", answers(sides)),
    ]
    context = {
        "sides": [describe(side.result) for side in sides],
        "headline": headline(figures, any(causes.values())),
        "warning": warning,
        "sections": sections,
    }
    write_text(file, render_page(TEMPLATE, context))


def describe(result: Recorded) -> dict[str, str]:
    """Return name, run, commit and gate of a result as texts."""
    tags = result.tags
    return {
        "name": result.name,
        "run": result.run_id or "not recorded yet",
        "commit": tags.get(COMMIT, "none")[:12] + (" with uncommitted changes" if tags.get(DIRTY) == "true" else ""),
        "gate": tags.get(GATE_TAG, "unknown"),
    }


def headline(figures: Sequence[Mapping[str, Any]], has_causes: bool) -> str:
    """Return the comparison in one line: in how many figures of the trained models B is certainly better or worse."""
    trained = [row for row in figures if row["model"] in SHOWN_FIRST]
    better, worse = (sum(row["mark"] == mark for row in trained) for mark in ("yes", "no"))
    if not any(row["differs"] for row in trained):
        return "All figures of A and B are the same" if trained else "A and B have no figures in common"
    if not any(row["p_value"] for row in trained):
        return "The figures differ; no row was measured in both, so nothing is tested"
    if not better and not worse:
        return "No figure differs by more than chance" + ("" if has_causes else ", and no input differs")
    parts = [f"{word} in {count}" for word, count in (("better", better), ("worse", worse)) if count]
    total = sum(bool(row["p_value"]) for row in trained)
    return f"B is {' and '.join(parts)} of {total} tested figures"


def figure_rows(sides: tuple[Side, Side], tests: Tests) -> list[dict[str, Any]]:
    """Return a row per figure that both results have: its values, the difference, its interval and p-value."""
    models = []
    for side in sides:
        file = side.folder / RESULTS_FOLDER / "results.json"
        models.append(read_json(file)["models"] if file.exists() else {})
    rows = []
    for model in MODELS:
        before, after = (of_side.get(model, {}) for of_side in models)
        for metric in in_order(set(before) & set(after)):
            rows.append(_figure_row(model, metric, before[metric], after[metric], tests.get(f"{model}.{metric}")))
    return rows


def _figure_row(
    model: str, metric: str, before: float, after: float, test: tuple[Paired, int] | None
) -> dict[str, Any]:
    label, kind, direction = figure_of(metric)
    row = {
        "model": model,
        "label": label,
        "before": show(before, kind),
        "after": show(after, kind),
        "difference": show_change(after - before, kind) if after != before else "none",
        "differs": after != before,
        **dict.fromkeys(("interval", "p_value", "test", "num_rows", "mark"), ""),
    }
    if test is not None:
        paired, num_rows = test
        row |= {
            "interval": show_interval(*paired.interval, kind),
            "p_value": "< 0.001" if paired.p_value < 0.001 else f"{paired.p_value:.3f}",
            "test": paired.test,
            "num_rows": f"{num_rows:,}",
        }
        if paired.p_value < CERTAIN and direction:
            row["mark"] = "yes" if paired.difference * direction > 0 else "no"
    return row


def tables(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as one table per model; those that training does not change are folded."""
    return [
        {"model": model, "rows": rows, "folded": model not in SHOWN_FIRST}
        for model in MODELS
        if (rows := [row for row in figures if row["model"] == model])
    ]


def cause_rows(causes: Mapping[str, Sequence[Difference]]) -> dict[str, Any]:
    """Return the kinds of inputs that differ, each with its values, and the names of the others."""
    return {
        "kinds": [
            {"kind": kind, "rows": [(d.name, _value(d.before), _value(d.after)) for d in found]}
            for kind, found in causes.items()
            if found
        ],
        "same": [kind for kind, found in causes.items() if not found],
    }


def _value(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}... ({len(text):,} characters)"


def curves(sides: tuple[Side, Side]) -> list[Markup]:
    """Draw the curves of both trainings over each other, as far as they were recorded."""
    tables = []
    for side in sides:
        file = side.folder / CURVE
        tables.append(list(csv.DictReader(file.open(encoding="utf-8", newline=""))) if file.exists() else [])
    drawn = []
    for title, column, may_be_log in CHARTS:
        series = [
            Series(name, [(float(row["step"]), float(row[column])) for row in table if row.get(column)], css)
            for name, css, table in zip("AB", "ab", tables, strict=True)
        ]
        if any(line.points for line in series):
            drawn.append(line_chart(title, series, may_be_log=may_be_log))
    return drawn


def answers(sides: tuple[Side, Side]) -> dict[str, Any]:
    """Return the answers to the prompts that both results have, in groups by what is right, differences first."""
    first, second = (side.answers for side in sides)
    common = [key for key in first if key in second]
    pairs = [(without_secrets_in_row(first[key]), without_secrets_in_row(second[key])) for key in common]
    metric = deciding_score([row for pair in pairs for row in pair]) if pairs else None
    prompts = [before["prompt"] for before, _ in pairs]
    start, end = shared_beginning(prompts), shared_ending(prompts)
    rows, kinds = [], []
    for before, after in pairs:
        models = [name for name in SHOWN_FIRST if name in before["answers"] and name in after["answers"]]
        shown = {
            f"{side}: {model}": row["answers"][model] for model in models for side, row in (("A", before), ("B", after))
        }
        prompt = before["prompt"][len(start) : len(before["prompt"]) - len(end)].strip()
        cells = answer_cells(shown, before["reference"], metric)
        rows.append({"id": before["id"], "prompt": prompt, "reference": before["reference"], "answers": cells})
        kinds.append(_kind(before["answers"]["tuned"], after["answers"]["tuned"], metric))
    groups = make_groups(
        rows, kinds, [name for names in KINDS.values() for name in names], KINDS[metric is not None][-1]
    )
    models = [cell["model"] for cell in rows[0]["answers"]] if rows else []
    return {
        "shown": {"groups": groups, "decided": metric is not None, "models": models},
        "shared": start.strip(),
        "num_common": len(common),
        "sizes": (len(first), len(second)),
        "per_page": PER_PAGE,
    }


KINDS = {
    True: (
        "Right in A, wrong in B",
        "Wrong in A, right in B",
        "Wrong in both, with different answers",
        "Wrong in both, with the same answer",
        "Right in both",
    ),
    False: ("Different answers", "Same answers"),
}
"""Whether a score decides -> the groups of answers of the tuned models, in their order."""


def _kind(before: Mapping[str, Any], after: Mapping[str, Any], metric: str | None) -> str:
    is_same = before["text"] == after["text"]
    if metric is None:
        return KINDS[False][is_same]
    right = tuple(answer["scores"][metric] == 1.0 for answer in (before, after))
    names = KINDS[True]
    return {(True, False): names[0], (False, True): names[1], (True, True): names[4]}.get(right) or names[2 + is_same]
