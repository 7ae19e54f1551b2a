"""Rendering of pages, formatting of their figures, and the texts that more than one page has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact

TEMPLATES = Path(__file__).with_name("templates")

MAX_LEDGER_IDS = 5

# action in a ledger -> its text on a page
ACTIONS = {
    "drop": "left out",
    "omit": "not taken",
    "repeat": "repeated",
    "repair": "repaired",
    "warn": "stays",
    "cut": "cut off at the limit",
    "split": "divided",
}

MARKS = {"shown": ("yes", "✓"), "not shown": ("unsure", "?"), "failed": ("no", "✗")}
"""Verdict on a condition of the gate -> its CSS class and its sign."""

NBSP = "\u00a0"


@dataclass(frozen=True)
class Section:
    """A section of a page, which the links at the top lead to.

    Args:
        anchor: Id of its element.
        heading: Its heading, and the text of the link.
        body: Its HTML, without the heading.
    """

    anchor: str
    heading: str
    body: Markup


def render_section(anchor: str, heading: str, template: str, context: Mapping[str, Any]) -> Section:
    """Render a section of a page from a template of this package."""
    return Section(anchor, heading, Markup(render_page(template, context)))


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """Render a template of this package; an undefined value raises `UndefinedError`.

    Secrets in values are replaced, and the values are escaped, except `Markup`, which this package builds itself.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=without_secrets,
    )
    environment.globals["marks"] = MARKS
    environment.filters["soft_breaks"] = soft_breaks
    return environment.get_template(template).render(context)


def without_secrets(value: Any) -> Any:
    """Return a value of a page with its secrets replaced if it is a text."""
    return redact(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def percent(value: float) -> str:
    """Format a share as a percentage with one decimal, or none if that is 0."""
    text = f"{100 * value:.1f}"
    return f"{text.removesuffix('.0')}{NBSP}%"


def show_change(value: float, kind: str) -> str:
    """Format a difference with its sign; a difference of shares in percentage points."""
    if kind == "megabytes":
        return f"{value:+,.1f}{NBSP}MB"
    return f"{100 * value:+.1f}{NBSP}points" if kind == "percent" else f"{value:+.3f}"


def show_interval(low: float, high: float, kind: str) -> str:
    """Format the interval of a difference, with its unit once; an empty text if it is 0 throughout."""
    if low == high == 0:
        return ""
    first, last = show_change(low, kind), show_change(high, kind)
    return f"{first.partition(NBSP)[0]} to {last}"


def show(value: float, kind: str) -> str:
    """Format a figure.

    Args:
        value: Its value.
        kind: `percent`, `megabytes` or `number`.
    """
    if kind == "percent":
        return percent(value)
    if kind == "megabytes":
        return f"{value:,.0f}{NBSP}MB" if value >= 10 else f"{value:.2g}{NBSP}MB"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def ledger_summary(paths: Paths, *, with_stream: bool = False) -> list[dict[str, Any]]:
    """Count the rows in the ledgers by stage, reason and action, and return the counts with the first row ids.

    Args:
        paths: Paths of the checkout.
        with_stream: Whether to count those of the stream that `train` read, too, which is there after the training.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    ids: dict[tuple[str, str, str], list[str]] = {}
    streamed = paths.out("train", "stream", "ledger.jsonl")
    files = [paths.out(stage, "ledger.jsonl") for stage in ("load", "format", "pack")]
    for path in [*files, streamed] if with_stream else files:
        for entry in read_jsonl(path) if path.exists() else ():
            stage = f"train, {entry['stage']}" if path == streamed else entry["stage"]
            key = (stage, entry["reason"], ACTIONS[entry["action"]])
            counts[key] += 1
            first = ids.setdefault(key, [])
            if len(first) < MAX_LEDGER_IDS:
                first.append(str(entry["id"]))
    return [
        {"stage": key[0], "reason": key[1].replace("_", " "), "action": key[2], "count": count, "ids": ids[key]}
        for key, count in counts.most_common()
    ]


def rows_sentence(card: Mapping[str, Any]) -> str:
    """Return a sentence on how many rows of all sources are used for what, as counted by `load` in card.json."""
    parts = [
        f"{card['num_train']:,} to train on",
        f"{card['num_eval']:,} held out",
        f"{card['num_dropped']:,} left out",
    ]
    if card["num_omitted"]:
        parts.append(
            f"{card['num_omitted']:,} not taken (max_rows, weight, interleave, or an unfinished rehearsed answer)"
        )
    if card["num_repeated"]:
        parts.append(f"{card['num_repeated']:,} of the training rows are repetitions")
    of = "rows were read"
    if card.get("streaming"):
        of = "rows were read, the first ones of a stream and those held out; train read on (outs/train/stream)"
    return f"{card['num_rows_in']:,} {of}: {', '.join(parts)}."


def soft_breaks(text: str) -> Markup:
    """Return text or markup with `<wbr>` after punctuation, where lines of JSON without spaces may break."""
    return Markup(re.sub(r"([,:{}\[\]])(?=\S)", r"\1<wbr>", str(Markup("{}").format(without_secrets(text)))))
