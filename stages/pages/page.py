"""What the pages share: one style, one way to render, and the facts that more than one of them shows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths

TEMPLATES = Path(__file__).with_name("templates")

MAX_LEDGER_IDS = 5

# what the ledger calls what was done -> how a page says it
ACTIONS = {
    "drop": "left out",
    "omit": "not taken",
    "repair": "repaired",
    "warn": "stays",
    "cut": "cut off at the limit",
    "split": "divided, nothing lost",
}

NBSP = "\u00a0"


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """Render one of the templates of this room; what a page shows is escaped, and a missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["soft_breaks"] = soft_breaks
    return environment.get_template(template).render(context)


def percent(value: float) -> str:
    """A share as a percentage with one decimal, none where it is exact."""
    text = f"{100 * value:.1f}"
    return f"{text.removesuffix('.0')}{NBSP}%"


def show_change(value: float, kind: str) -> str:
    """A difference with its sign; of shares in points."""
    if kind == "megabytes":
        return f"{value:+,.1f}{NBSP}MB"
    return f"{100 * value:+.1f}{NBSP}points" if kind == "percent" else f"{value:+.3f}"


def show(value: float, kind: str) -> str:
    """A figure as people read it."""
    if kind == "percent":
        return percent(value)
    if kind == "megabytes":
        return f"{value:,.0f}{NBSP}MB" if value >= 10 else f"{value:.2g}{NBSP}MB"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def ledger_summary(paths: Paths) -> list[dict[str, Any]]:
    """Rows that were left out, cut, repaired or warned of, counted by stage, reason and action, with the first ids."""
    counts: Counter[tuple[str, str, str]] = Counter()
    ids: dict[tuple[str, str, str], list[str]] = {}
    for stage in ("load", "format", "pack"):
        path = paths.out(stage, "ledger.jsonl")
        for entry in read_jsonl(path) if path.exists() else ():
            key = (entry["stage"], entry["reason"], ACTIONS[entry["action"]])
            counts[key] += 1
            first = ids.setdefault(key, [])
            if len(first) < MAX_LEDGER_IDS:
                first.append(str(entry["id"]))
    return [
        {"stage": key[0], "reason": key[1].replace("_", " "), "action": key[2], "count": count, "ids": ids[key]}
        for key, count in counts.most_common()
    ]


def rows_sentence(card: Mapping[str, Any]) -> str:
    """What became of the rows of all sources, as `load` counted them in card.json."""
    parts = [
        f"{card['num_train']:,} to train on",
        f"{card['num_eval']:,} held out",
        f"{card['num_dropped']:,} left out",
    ]
    if card["num_omitted"]:
        parts.append(f"{card['num_omitted']:,} not taken, as max_rows and weight say")
    if card["num_repeated"]:
        parts.append(f"{card['num_repeated']:,} of the training rows are repetitions by weight")
    return f"{card['num_rows_in']:,} rows were read: {', '.join(parts)}."


def soft_breaks(text: str) -> Markup:
    """Text, or marked text, that may break after punctuation: JSON without spaces would break inside words."""
    return Markup(re.sub(r"([,:{}\[\]])(?=\S)", r"\1<wbr>", str(Markup("{}").format(text))))
