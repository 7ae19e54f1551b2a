"""outs/publish/promotion.html: whether a result became champion, with the conditions, figures and aliases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft.evaluate.gate import GateRow, parse_gate
from stages.checkout.artifacts import write_json, write_text
from stages.pages.comparison import cause_rows
from stages.pages.page import render_page, show, show_change
from stages.pages.verdict import CLOSED, OPEN, UNSURE, count_unmet
from stages.params.figures import all_figures, figure_of, split_figure
from stages.tracking.champion import CANDIDATE, CHAMPION, Champion
from stages.tracking.recorded import Difference

TEMPLATE = "promotion.html.jinja"


@dataclass(frozen=True)
class Decision:
    """The decision on whether a result becomes champion, and its reasons.

    Args:
        name: Name of the registered model.
        version: Version of this result.
        before: Alias -> the version it pointed to before; None if it did not exist.
        champion: The champion before; None if there was none.
        is_comparable: Whether the champion was measured on the same held-out rows.
        gate: Conditions of `evaluate.gate` with their outcomes.
        promotion: Conditions of `publish.gate` with their outcomes.
        promoted: Whether this result became, or remained, the champion.
        doubts: What the evidence lacks.
    """

    name: str
    version: str
    before: Mapping[str, str | None]
    champion: Champion | None
    is_comparable: bool
    gate: Sequence[Mapping[str, Any]]
    promotion: Sequence[GateRow]
    promoted: bool
    doubts: Sequence[str] = ()

    @property
    def headline(self) -> str:
        """The decision in one line."""
        return "; ".join([self._outcome(), *self.doubts])

    def _outcome(self) -> str:
        previous = self.before[CHAMPION]
        if self.promoted and previous == self.version:
            return f"Version {self.version} is the champion, as before"
        if self.promoted:
            place = "the first champion" if previous is None else f"the champion after version {previous}"
            return f"Promoted: version {self.version} is {place}"
        if previous is None:
            return f"Not promoted: version {self.version} is a candidate, and there is no champion"
        if previous == self.version:  # published again with other conditions
            return f"Version {self.version} stays the champion, although a condition is not met now"
        return f"Not promoted: version {previous} stays the champion"

    @property
    def reason(self) -> str:
        """The reason in one sentence."""
        unmet = [(count_unmet(rows), key) for rows, key in self._gates()]
        texts = [text.replace(" conditions", f" conditions of {key}", 1) for text, key in unmet if text]
        if self.promoted:
            return f"Every condition is met{', but ' if texts else ''}{' and '.join(texts)}."
        return f"{' and '.join(texts)}." if texts else "The gate is closed."

    @property
    def tone(self) -> str:
        """How the headline is coloured."""
        if not self.promoted:
            return CLOSED
        return UNSURE if self.doubts or any(count_unmet(rows) for rows, _ in self._gates()) else OPEN

    def _gates(self) -> list[tuple[list[Mapping[str, Any]], str]]:
        """Return the conditions of both gates with their outcomes, and the names of the gates."""
        return [(list(self.gate), "evaluate.gate"), ([asdict(row) for row in self.promotion], "publish.gate")]

    def aliases(self) -> list[tuple[str, str, str, str]]:
        """Return `(alias, version before, version now, reason)` of every alias."""
        rows = []
        for alias, moves, why in (
            (CANDIDATE, True, "it moves to every result"),
            (CHAMPION, self.promoted, "every condition is met" if self.promoted else "a condition is not met"),
        ):
            previous = self.before[alias]
            current = self.version if moves else previous
            rows.append(
                (alias, _version(previous), _version(current), why if previous != current else f"it stays: {why}")
            )
        return rows


def _version(number: str | None) -> str:
    return "none" if number is None else f"version {number}"


def write_page(
    file: Path,
    decision: Decision,
    conditions: Sequence[str],
    results: Mapping[str, Any],
    changes: Mapping[str, Sequence[Difference]] | None = None,
) -> None:
    """Write the page, and next to it a JSON file with the parts that other tools show.

    Args:
        file: File to write.
        decision: The decision on this result.
        conditions: Conditions of both gates, as in params.yaml.
        results: Results of `evaluate`.
        changes: Kind -> what differs between the inputs of the champion before (A) and of this result (B); empty or
            None if there was none, or if it was this result.
    """
    conditions_shown = [
        *({"key": "evaluate.gate", **row} for row in decision.gate),
        *({"key": "publish.gate", **vars(row)} for row in decision.promotion),
    ]
    context = {
        "decision": decision,
        "conditions": conditions_shown,
        "figures": figure_rows(decision, conditions, results),
        "causes": cause_rows(changes) if changes else None,
    }
    write_text(file, render_page(TEMPLATE, context))
    short = {"verdict": decision.headline, "reason": decision.reason, "aliases_before": dict(decision.before)}
    write_json(file.with_suffix(".json"), short)


def figure_rows(decision: Decision, conditions: Sequence[str], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return this result's figures next to the champion's: those of the conditions, then task figures and losses."""
    models, champion = all_figures(results), decision.champion.figures if decision.champion else {}
    named = [n.removeprefix(f"{CHAMPION}.") for c in parse_gate(conditions) for n in c.names]
    shipped = ("tuned", "quantized" if "quantized" in models else "merged")
    others = [f"{model}.{figure}" for model in shipped for figure in (*results["figures"], "loss", "size_mb")]
    rows = []
    for name in dict.fromkeys([*named, *others]):
        model, metric = split_figure(name)
        value = models.get(model, {}).get(metric)
        if value is None:
            continue
        label, kind, direction = figure_of(metric)
        then = champion.get(f"{CHAMPION}.{model}", {}).get(metric)
        change = None if then is None else value - then
        mark = (
            "" if not (change and direction and decision.is_comparable) else "yes" if change * direction > 0 else "no"
        )
        rows.append(
            {
                "name": f"{model}: {label[0].lower()}{label[1:]}" if label[1:2].islower() else f"{model}: {label}",
                "decides": name in named,
                "value": show(value, kind),
                "champion": "–" if then is None else show(then, kind),
                "change": "–" if change is None else show_change(change, kind),
                "mark": mark,
            }
        )
    return rows
