"""What the report says of the training: curves, tokens a second, updates that were no good."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from stages.checkout.artifacts import file_digest, read_json, read_jsonl
from stages.checkout.paths import Paths
from stages.pages.charts import Series, line_chart

CHARTS = (
    ("Loss", [("train", "loss", "a"), ("held-out", "eval_loss", "b")]),
    ("Token accuracy", [("train", "mean_token_accuracy", "a"), ("held-out", "eval_mean_token_accuracy", "b")]),
    ("Learning rate", [("", "learning_rate", "a")]),
    ("Gradient norm", [("", "grad_norm", "a")]),
)
MAX_BAD_UPDATES = 50


def curves(paths: Paths) -> list[Markup]:
    """Loss, accuracy, learning rate, gradient norm and tokens a second over the steps, those that were recorded."""
    with paths.out("train", "curve.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = []
    for title, lines in CHARTS:
        series = [Series(name, points(rows, column), css) for name, column, css in lines]
        if any(s.points for s in series):
            drawn.append(line_chart(title, series))
    speed = throughput(paths)
    return [*drawn, line_chart("Tokens a second", [Series("", speed, "a")])] if speed else drawn


def points(rows: Iterable[Mapping[str, str]], column: str) -> list[tuple[float, float]]:
    """(step, value) of the rows in which a column of the curve is filled."""
    return [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]


def throughput(paths: Paths) -> list[tuple[float, float]]:
    """(step, tokens a second), where this very training ran here: times are no outs, which DVC would bring back."""
    file = paths.timings("train")
    timings = read_json(file) if file.exists() else {}
    if timings.get("curve_sha256") != file_digest(paths.out("train", "curve.csv")):
        return []
    return [(float(step), float(speed)) for step, speed in timings["throughput"]]


def bad_updates(paths: Paths) -> dict[str, Any]:
    """Updates that were no number or a spike, and what was done: the first ones, and how many there are."""
    file = paths.out("train", "bad_updates.jsonl")
    found = list(read_jsonl(file)) if file.exists() else []
    return {"num": len(found), "rows": found[:MAX_BAD_UPDATES]}
